"""The course as a class gets it, and as its teacher does: python -m chapters.kit student, or teacher.

A kit is a folder that needs nothing outside itself but Python with the packages that pyproject.toml lists: code, data
and notebooks lie in it as they do here, so every path in a notebook stays true. It goes to a class as one zip file, and
`start.py` in it opens the course, without a network and without minissl being installed. The exercises of a student's
notebooks are stubs that nobody has run; in a teacher's the solution stands after each, and lesson notes lie beside.

It is a script in this folder and no part of the package, because it knows one thing only: how these notebooks are
written. The exercises come last, under "## Exercises", each begins with its number in bold, and the solution has the
same number in the notebook of the same name in solutions/.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minissl.errors import InputError

CHAPTERS = Path(__file__).parent
ROOT = CHAPTERS.parent
FILES = (
    "README.md",
    "pyproject.toml",
    "minissl",
    "data/README.md",
    "data/checkpoints",
    "data/pictures",
    "data/recorded",
)
WHERE = re.compile(r"Solutions: `chapters/solutions/\w+\.ipynb`\.")
BEGINS = re.compile(r"^(?=\*\*(\d+)\. )", re.MULTILINE)  # of an exercise, or its solution

START = '''"""Open the course in JupyterLab, on its map: python start.py. START.md says what has to be installed."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAP = "/lab/tree/chapters/0_map.ipynb"


def lacking() -> list[str]:
    """The packages that pyproject.toml lists and this Python has not."""
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|lab) = \\[(.*?)\\]$", text, re.MULTILINE | re.DOTALL)
    needed = {name for some in lists for name in re.findall(r'"([\\w-]+)', some)}
    there = {re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower() for found in metadata.distributions()}
    return sorted(needed - there)


if __name__ == "__main__":
    if lacking():
        sys.exit(f"This Python lacks {', '.join(lacking())}; START.md says how to install that.")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    lab = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={HERE}", f"--LabApp.default_url={MAP}"]
    sys.exit(subprocess.call(lab + sys.argv[1:]))
'''

Cell = dict[str, Any]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(notebook: dict[str, Any], path: Path) -> None:
    """As Jupyter writes it, so that a notebook nothing was changed in has the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def lessons() -> list[Path]:
    """The notebooks of the course, in reading order."""
    return sorted(CHAPTERS.glob("[0-9]*.ipynb"))


def beginning(cells: list[Cell]) -> int:
    """The first cell after the one that says "## Exercises"."""
    return 1 + next(i for i, cell in enumerate(cells) if re.search(r"^## Exercises", source(cell), re.MULTILINE))


def numbered(cells: Iterable[Cell]) -> dict[int, list[Cell]]:
    """Cells by the exercise they are of; 0 has those before the first. A text that begins one in its middle is cut."""
    found, number = {0: []}, 0
    for cell in cells:
        for i, piece in enumerate(pieces(cell)):
            if begins := BEGINS.match(piece["source"]):
                number = int(begins[1])
            found.setdefault(number, []).append(piece | ({"id": f"{cell['id']}-{i}"} if i else {}))
    return found


def pieces(cell: Cell) -> Iterator[Cell]:
    """A cell, in as many as it has exercises that begin in it; its source as one string."""
    if cell["cell_type"] == "code":
        yield cell | {"source": source(cell)}
        return
    cuts = [begins.start() for begins in BEGINS.finditer(source(cell))]
    for start, end in zip([0, *cuts], [*cuts, None]):
        if text := source(cell)[start:end].strip():
            yield cell | {"source": text}


def for_student(notebook: dict[str, Any]) -> dict[str, Any]:
    """A lesson whose exercises nobody has run, and that does not say where solutions are."""
    start, cells = beginning(notebook["cells"]), []
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown" and WHERE.search(source(cell)):
            cell = cell | {"source": WHERE.sub("Your teacher has the solutions.", source(cell))}
        if cell["cell_type"] == "code" and i >= start:
            cell = cell | {"outputs": [], "execution_count": None}
        cells.append(cell)
    return notebook | {"cells": cells}


def for_teacher(notebook: dict[str, Any], solutions: dict[str, Any] | None) -> dict[str, Any]:
    """A lesson with the solution after each exercise; those cells have the tag "solution" and run by themselves."""
    if solutions is None:
        return notebook
    start, cells = beginning(notebook["cells"]), []
    solved = numbered(solutions["cells"])
    needs = [cell for cell in solved.pop(0) if cell["cell_type"] == "code"]
    for number, asked in numbered(notebook["cells"][start:]).items():
        cells += asked
        if number == 0:
            cells += [heading("What the solutions need"), *map(tagged, needs)]
        elif number in solved:
            cells += [heading(f"Solution {number}"), *map(tagged, solved[number])]
    return notebook | {"cells": notebook["cells"][:start] + cells}


def heading(text: str) -> Cell:
    name = "heading-" + text.lower().replace(" ", "-")
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": f"#### {text}"}


def tagged(cell: Cell) -> Cell:
    """A solution's cell as part of the lesson, which lies a folder higher."""
    about = cell["metadata"] | {"tags": ["solution"]}
    text = cell["source"].replace("../../data", "../data")
    return cell | {"id": f"solution-{cell['id']}", "metadata": about, "source": text}


def make(who: str, out: Path) -> Path:
    """Write the kit of "student" or "teacher" into out/who, and out/who.zip beside it; what was there goes.

    Raises:
        InputError: if there is a folder of that name which no kit is in.
    """
    folder = out / who
    if folder.exists() and not (folder / "start.py").exists():
        raise InputError(f"{folder} is there and is no kit; move it, or choose another folder with --out.")
    shutil.rmtree(folder, ignore_errors=True)
    for name in FILES:
        copy(ROOT / name, folder / name)
    for path in lessons():
        solutions = CHAPTERS / "solutions" / path.name
        if who == "student":
            made = for_student(read(path))
        else:
            made = for_teacher(read(path), read(solutions) if solutions.exists() else None)
        write(made, folder / "chapters" / path.name)
    (folder / "start.py").write_text(START, encoding="utf-8", newline="\n")
    copy(CHAPTERS / "notes" / f"{who}.md", folder / "START.md")
    if who == "teacher":
        for path in lessons():
            if (notes := CHAPTERS / "notes" / f"{path.stem}.md").exists():
                copy(notes, folder / "chapters" / "notes" / notes.name)
    shutil.make_archive(str(folder), "zip", out, who)
    return folder


def copy(here: Path, there: Path) -> None:
    there.parent.mkdir(parents=True, exist_ok=True)
    if here.is_dir():
        shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(here, there)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m chapters.kit", description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=("student", "teacher"))
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="the folder a kit is made in; else build")
    asked = parser.parse_args(words)
    try:
        folder = make(asked.who, asked.out)
    except InputError as error:
        print(f"kit: {error}", file=sys.stderr)
        return 2
    print(f"{folder}, and the same as {folder.name}.zip beside it; START.md in it says how to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
