"""A class gets everything it needs and no solution; a teacher gets every solution, and notes that fit the notebooks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from chapters import kit
from minissl.errors import InputError

ROOT = Path(__file__).parent.parent
LESSONS = kit.lessons()
SOLVED = [path for path in LESSONS if (kit.CHAPTERS / "solutions" / path.name).exists()]
NOTES = [kit.CHAPTERS / "notes" / f"{path.stem}.md" for path in SOLVED]


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """Both kits, far from the repository."""
    out = tmp_path_factory.mktemp("kits")
    return {who: kit.make(who, out) for who in ("student", "teacher")}


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": kit.source(cell)} for cell in found if kind in (None, cell["cell_type"])]


def said(path):
    """All text of a notebook, what was printed included."""
    return json.dumps([[cell["source"], cell.get("outputs")] for cell in cells(path)], ensure_ascii=False)


def environment(folder):
    """As `start.py` makes it: the kit's own minissl, whatever else is installed."""
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request):
    return request.param


def test_a_student_sees_the_lesson_as_it_is_and_exercises_that_nobody_has_run(kits, lesson):
    ours, theirs = cells(lesson), cells(kits["student"] / "chapters" / lesson.name)
    start = kit.beginning(ours)
    assert len(ours) == len(theirs)
    for i, (own, cell) in enumerate(zip(ours, theirs)):
        if cell["cell_type"] == "code":
            assert cell["source"] == own["source"]  # a stub is as unfinished as it was
            assert cell["outputs"] == ([] if i >= start else own["outputs"])
            assert cell["execution_count"] == (None if i >= start else own["execution_count"])


def test_a_student_gets_no_solution(kits, lesson):
    folder = kits["student"]
    assert [path for path in folder.rglob("*") if path.name in ("solutions", "notes", "tests")] == []
    text = said(folder / "chapters" / lesson.name)
    assert "solutions/" not in text
    solutions = kit.CHAPTERS / "solutions" / lesson.name
    if solutions.exists():
        asked = "\n".join(cell["source"] for cell in cells(lesson))
        lines = {line for cell in cells(solutions, "code") for line in cell["source"].splitlines()}
        new = [line for line in lines if line.strip() not in asked and len(line.strip()) > 20]
        assert len(new) > 5
        assert [line for line in new if json.dumps(line.strip(), ensure_ascii=False)[1:-1] in text] == []


def test_a_teacher_has_each_solution_after_its_exercise(kits, lesson):
    if lesson not in SOLVED:
        assert cells(kits["teacher"] / "chapters" / lesson.name) == cells(lesson)
        return
    solved = kit.numbered(cells(kit.CHAPTERS / "solutions" / lesson.name))
    merged = cells(kits["teacher"] / "chapters" / lesson.name)
    assert len({cell["id"] for cell in merged}) == len(merged)
    own = [cell for cell in merged if not cell["id"].startswith(("solution", "heading"))]
    words = [" ".join(" ".join(cell["source"] for cell in found).split()) for found in (own, cells(lesson))]
    assert words[0] == words[1]  # nothing of the lesson is lost, or moved
    texts = [cell["source"] for cell in merged]
    for number in set(solved) - {0}:
        asked = next(i for i, text in enumerate(texts) if text.startswith(f"**{number}. "))
        answered = texts.index(f"#### Solution {number}")
        after = [i for i, text in enumerate(texts) if text.startswith(f"**{number + 1}. ")]
        assert asked < answered < min([*after, len(texts)])
        there = texts[answered + 1 : answered + 1 + len(solved[number])]
        assert there == [cell["source"].replace("../../data", "../data") for cell in solved[number]]


def test_a_teacher_has_notes_for_every_chapter(kits):
    assert sorted(path.name for path in (kits["teacher"] / "chapters" / "notes").iterdir()) == [n.name for n in NOTES]
    assert all(path.exists() for path in NOTES)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_zip_unpacks_to_a_course_that_runs_where_nothing_else_is(kits, who, tmp_path):
    shutil.unpack_archive(kits[who].with_suffix(".zip"), tmp_path)
    folder = tmp_path / who
    code = "import minissl.pretrained as p; print(p.__file__, p.OWN.is_dir(), p.load('scenes/dino').training)"
    here = {"cwd": folder / "chapters", "capture_output": True, "text": True, "check": True}
    file, data, training = subprocess.run([sys.executable, "-c", code], env=environment(folder), **here).stdout.split()
    assert Path(file).is_relative_to(folder)
    assert (data, training) == ("True", "False")
    for path in (folder / "chapters").glob("*.ipynb"):
        for name in re.findall(
            r"\"((?:\.\./)+data/[\w./]+)\"", "\n".join(cell["source"] for cell in cells(path, "code"))
        ):
            assert (folder / "chapters" / name).exists(), (path.name, name)


def test_start_opens_jupyterlab_or_says_what_is_lacking(kits, tmp_path):
    folder = Path(shutil.copytree(kits["student"], tmp_path / "student"))
    asked = [sys.executable, str(folder / "start.py"), "--version"]
    assert re.match(r"\d+\.\d+", subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace('  "numpy",', '  "numpy",\n  "no-such-thing>=2",'))
    found = subprocess.run(asked, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.strip() == "This Python lacks no-such-thing; START.md says how to install that."


def test_a_kit_replaces_a_kit_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kit, "FILES", ("pyproject.toml",))  # the rest takes its time
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.md").write_text("mine")
    with pytest.raises(InputError, match="is there and is no kit"):
        kit.make("student", tmp_path)
    assert kit.main(["student", "--out", str(tmp_path)]) == 2
    assert "is no kit" in capsys.readouterr().err
    assert (tmp_path / "student" / "thesis.md").read_text() == "mine"
    assert kit.main(["teacher", "--out", str(tmp_path)]) == 0
    (tmp_path / "teacher" / "old.md").write_text("of last year")
    kit.make("teacher", tmp_path)
    assert not (tmp_path / "teacher" / "old.md").exists()


def test_a_text_with_two_exercises_is_cut_where_the_second_begins():
    text = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["End of one.\n", "\n", "**2. Mend** it."]}
    code = {"cell_type": "code", "id": "b", "metadata": {}, "source": "x = 1", "outputs": []}
    found = kit.numbered([text | {"source": "**1. Do** it.", "id": "c"}, text, code])
    assert {n: [cell["source"] for cell in some] for n, some in found.items()} == {
        0: [],
        1: ["**1. Do** it.", "End of one."],
        2: ["**2. Mend** it.", "x = 1"],
    }
    assert len({cell["id"] for some in found.values() for cell in some}) == 4


def told(notes):
    """Each plan of a chapter's notes: minutes -> rows of (start, stop, headings named, what happens)."""
    parts = re.split(r"^## (\d+) minutes$", notes.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    row = re.compile(r"^\| (\d+)-(\d+) \| \*(.*)\* \| (.*) \|$", re.MULTILINE)
    return {
        plan: [(int(a), int(b), name, said) for a, b, name, said in row.findall(x)]
        for plan, x in zip(*[iter(parts)] * 2)
    }


def headings(path, depth):
    """The headings of a notebook, down to so many signs."""
    text = "\n\n".join(cell["source"] for cell in cells(path, "markdown"))
    return re.findall(rf"^#{{1,{depth}}} (.*)", text, re.MULTILINE)


@pytest.mark.parametrize(("notes", "path"), [*zip(NOTES, SOLVED)], ids=lambda path: path.stem)
def test_notes_name_what_is_there(notes, path):
    """In notes each name in italics is a heading, each exercise has its number, and each `piece` of code is there."""
    text, lesson = notes.read_text(encoding="utf-8"), said(path)
    named = {" ".join(name.split()) for name in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text)}
    assert named <= set(headings(path, 3))
    numbers = re.findall(r"[Ee]xercises?\s((?:\d(?:,\s|\sand\s|\sor\s|\sto\s)?)+)", text)
    numbers += [row[3] for plan in told(notes).values() for row in plan if row[2] == "Exercises"]
    exercises = kit.numbered(cells(path)[kit.beginning(cells(path)) :])
    assert numbers
    assert {int(n) for some in numbers for n in re.findall(r"\b\d\b", some)} <= exercises.keys() - {0}
    for piece in re.findall(r"`([^`\n]+)`", text):
        assert json.dumps(piece, ensure_ascii=False)[1:-1] in lesson, piece


@pytest.mark.parametrize(("notes", "path"), [*zip(NOTES, SOLVED)], ids=lambda path: path.stem)
def test_the_long_plan_passes_every_section(notes, path):
    passed = [name for _, _, name, _ in told(notes)["180"]]
    assert [name for name in headings(path, 2)[1:] if name not in passed] == []  # the first is the title


@pytest.mark.parametrize("notes", NOTES, ids=lambda path: path.stem)
def test_the_minutes_of_a_plan_add_up(notes):
    """Each plan is a table whose first column runs from 0 to its end without a gap; the long one has a break."""
    plans = told(notes)
    assert list(plans) == ["45", "90", "180"]
    for end, rows in plans.items():
        assert [start for start, *_ in rows] == [0, *[stop for _, stop, *_ in rows[:-1]]]
        assert rows[-1][1] == int(end)
        assert all(start < stop for start, stop, *_ in rows)
        assert sum(row[3] == "Break." for row in rows) == (end == "180")


@pytest.mark.parametrize("notes", NOTES, ids=lambda path: path.stem)
def test_every_question_is_put_and_answered(notes):
    plans, answers = re.split(r"^## Questions, and answers to expect$", notes.read_text("utf-8"), flags=re.MULTILINE)
    assert "## Misconceptions" in answers
    asked = set(re.findall(r"\b[Qq]uestion ([A-Z])\b", plans))
    assert asked == set(re.findall(r"^- \*\*([A-Z])\.\*\*", answers, re.MULTILINE))
    assert len(asked) >= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's own, about how it talks to a kernel
def test_the_solutions_in_a_teachers_notebook_run(kits, monkeypatch):
    """Those of the last chapter, which also read a file, by themselves and in their new place."""
    folder = kits["teacher"]
    monkeypatch.setenv("PYTHONPATH", str(folder))
    notebook = nbformat.read(folder / "chapters" / "3_6_compare.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
    assert sum("assert" in cell.source for cell in notebook.cells) >= 3
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "chapters")}}).execute()
    assert "Right, in 2 cases." in json.dumps(notebook)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_map_runs_in_a_students_kit(kits, monkeypatch):
    folder = kits["student"]
    monkeypatch.setenv("PYTHONPATH", str(folder))
    notebook = nbformat.read(folder / "chapters" / "0_map.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "chapters")}}).execute()
    assert "All is in place" in json.dumps(notebook)
