"""Build the course's kits for a class: python -m chapters.kit student, or teacher.

A kit is a folder that needs nothing outside itself but Python and the packages that pyproject.toml lists. Code, data
and notebooks have the same relative paths as in the repository. `start.py` opens the course without a network and
without minissl being installed; a zip file of the folder is written beside it. In a student's notebooks exercises are
not executed; in a teacher's the solution follows each exercise, and lesson notes are added.

The notebooks' form is assumed here: exercises come last, under "## Exercises"; each begins with its number in bold, and
its solution has the same number in the notebook of the same name in solutions/.
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
SOLUTIONS_SENTENCE = re.compile(r"Solutions: `chapters/solutions/\w+\.ipynb`\.")
EXERCISE_START = re.compile(r"^(?=\*\*(\d+)\. )", re.MULTILINE)  # of an exercise or of its solution

START = '''"""Open the course's map in JupyterLab: python start.py. START.md lists the packages to install."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAP = "/lab/tree/chapters/0_map.ipynb"


def missing_packages() -> list[str]:
    """Return the packages that pyproject.toml lists and this Python does not have."""
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|lab) = \\[(.*?)\\]$", text, re.MULTILINE | re.DOTALL)
    required = {name for names in lists for name in re.findall(r'"([\\w-]+)', names)}
    installed = {re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower() for package in metadata.distributions()}
    return sorted(required - installed)


if __name__ == "__main__":
    if missing := missing_packages():
        sys.exit(f"This Python has no {', '.join(missing)}; START.md says how to install packages.")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    lab = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={HERE}", f"--LabApp.default_url={MAP}"]
    sys.exit(subprocess.call(lab + sys.argv[1:]))
'''

Cell = dict[str, Any]


def source(cell: Cell) -> str:
    """Return a cell's source as one string."""
    return "".join(cell["source"])


def read(path: Path) -> dict[str, Any]:
    """Load a notebook as JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(notebook: dict[str, Any], path: Path) -> None:
    """Write a notebook in Jupyter's own layout, so that an unchanged notebook has the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def lessons() -> list[Path]:
    """Return the notebooks of the course in reading order."""
    return sorted(CHAPTERS.glob("[0-9]*.ipynb"))


def beginning(cells: list[Cell]) -> int:
    """Return the index of the first cell after the heading "## Exercises"."""
    return 1 + next(i for i, cell in enumerate(cells) if re.search(r"^## Exercises", source(cell), re.MULTILINE))


def numbered(cells: Iterable[Cell]) -> dict[int, list[Cell]]:
    """Group cells by the exercise they belong to; 0 holds those before the first.

    A text cell in which another exercise begins is split there.
    """
    groups: dict[int, list[Cell]] = {0: []}
    number = 0
    for cell in cells:
        for i, piece in enumerate(pieces(cell)):
            if start := EXERCISE_START.match(piece["source"]):
                number = int(start[1])
            groups.setdefault(number, []).append(piece | ({"id": f"{cell['id']}-{i}"} if i else {}))
    return groups


def pieces(cell: Cell) -> Iterator[Cell]:
    """Split a text cell before each exercise that begins in it; the source of each piece is one string."""
    if cell["cell_type"] == "code":
        yield cell | {"source": source(cell)}
        return
    cuts = [start.start() for start in EXERCISE_START.finditer(source(cell))]
    for start, end in zip([0, *cuts], [*cuts, None]):
        if text := source(cell)[start:end].strip():
            yield cell | {"source": text}


def for_student(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a lesson without outputs of exercises and without the path of its solutions."""
    start, cells = beginning(notebook["cells"]), []
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown" and SOLUTIONS_SENTENCE.search(source(cell)):
            cell = cell | {"source": SOLUTIONS_SENTENCE.sub("Your teacher has the solutions.", source(cell))}
        if cell["cell_type"] == "code" and i >= start:
            cell = cell | {"outputs": [], "execution_count": None}
        cells.append(cell)
    return notebook | {"cells": cells}


def for_teacher(notebook: dict[str, Any], solutions: dict[str, Any] | None) -> dict[str, Any]:
    """Return a lesson with the solution after each exercise; those cells are tagged "solution" and run alone."""
    if solutions is None:
        return notebook
    start, cells = beginning(notebook["cells"]), []
    solved = numbered(solutions["cells"])
    setup = [cell for cell in solved.pop(0) if cell["cell_type"] == "code"]
    for number, exercise in numbered(notebook["cells"][start:]).items():
        cells += exercise
        if number == 0:
            cells += [heading("What the solutions need"), *map(tagged, setup)]
        elif number in solved:
            cells += [heading(f"Solution {number}"), *map(tagged, solved[number])]
    return notebook | {"cells": notebook["cells"][:start] + cells}


def heading(text: str) -> Cell:
    """Return a text cell with a heading of level 4."""
    name = "heading-" + text.lower().replace(" ", "-")
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": f"#### {text}"}


def tagged(cell: Cell) -> Cell:
    """Return a solution's cell with its tag, and with paths for the folder of the lessons, one level up."""
    metadata = cell["metadata"] | {"tags": ["solution"]}
    text = cell["source"].replace("../../data", "../data")
    return cell | {"id": f"solution-{cell['id']}", "metadata": metadata, "source": text}


def make(audience: str, out: Path) -> Path:
    """Write the kit of "student" or "teacher" into out/audience, and a zip file beside it. An older kit is replaced.

    Raises:
        InputError: if the folder exists and holds something else than a kit.
    """
    folder = out / audience
    if folder.exists() and not (folder / "start.py").exists():
        raise InputError(f"{folder} exists and is not a kit; move it, or choose another folder with --out.")
    shutil.rmtree(folder, ignore_errors=True)
    for name in FILES:
        copy(ROOT / name, folder / name)
    for path in lessons():
        solutions = CHAPTERS / "solutions" / path.name
        if audience == "student":
            notebook = for_student(read(path))
        else:
            notebook = for_teacher(read(path), read(solutions) if solutions.exists() else None)
        write(notebook, folder / "chapters" / path.name)
    (folder / "start.py").write_text(START, encoding="utf-8", newline="\n")
    copy(CHAPTERS / "notes" / f"{audience}.md", folder / "START.md")
    if audience == "teacher":
        for path in lessons():
            if (notes := CHAPTERS / "notes" / f"{path.stem}.md").exists():
                copy(notes, folder / "chapters" / "notes" / notes.name)
    shutil.make_archive(str(folder), "zip", out, audience)
    return folder


def copy(path: Path, destination: Path) -> None:
    """Copy a file or a folder, without compiled Python files."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, destination, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(path, destination)


def main(words: list[str]) -> int:
    """Build a kit. Returns 0, or 2 if the output folder is not a kit."""
    parser = argparse.ArgumentParser(prog="python -m chapters.kit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("audience", choices=("student", "teacher"))
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder that the kit is written to")
    options = parser.parse_args(words)
    try:
        folder = make(options.audience, options.out)
    except InputError as error:
        print(f"kit: {error}", file=sys.stderr)
        return 2
    print(f"Written: {folder} and {folder.name}.zip beside it. START.md in it says how to begin.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
