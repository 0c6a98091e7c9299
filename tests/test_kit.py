"""Kits for a class: the student's has no solution, the teacher's has each one after its exercise; both run alone."""

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

LESSONS = kit.lessons()
SOLVED = [path for path in LESSONS if (kit.CHAPTERS / "solutions" / path.name).exists()]
NOTES = [kit.CHAPTERS / "notes" / f"{path.stem}.md" for path in SOLVED]


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """Both kits, in a folder outside the repository."""
    out = tmp_path_factory.mktemp("kits")
    return {audience: kit.make(audience, out) for audience in ("student", "teacher")}


def read_cells(path, cell_type=None):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": kit.source(cell)} for cell in cells if cell_type in (None, cell["cell_type"])]


def full_text(path):
    """Return all text of a notebook, outputs included."""
    return json.dumps([[cell["source"], cell.get("outputs")] for cell in read_cells(path)], ensure_ascii=False)


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request):
    return request.param


def test_a_students_lesson_is_the_same_with_unexecuted_exercises(kits, lesson):
    original, copied = read_cells(lesson), read_cells(kits["student"] / "chapters" / lesson.name)
    start = kit.beginning(original)
    assert len(original) == len(copied)
    for i, (before, after) in enumerate(zip(original, copied)):
        if after["cell_type"] == "code":
            assert after["source"] == before["source"]
            assert after["outputs"] == ([] if i >= start else before["outputs"])
            assert after["execution_count"] == (None if i >= start else before["execution_count"])


def test_a_student_gets_no_solution(kits, lesson):
    folder = kits["student"]
    assert [path for path in folder.rglob("*") if path.name in ("solutions", "notes", "tests")] == []
    text = full_text(folder / "chapters" / lesson.name)
    assert "solutions/" not in text
    solutions = kit.CHAPTERS / "solutions" / lesson.name
    if solutions.exists():
        exercises = "\n".join(cell["source"] for cell in read_cells(lesson))
        lines = {line for cell in read_cells(solutions, "code") for line in cell["source"].splitlines()}
        new = [line for line in lines if line.strip() not in exercises and len(line.strip()) > 20]
        assert len(new) > 5
        assert [line for line in new if json.dumps(line.strip(), ensure_ascii=False)[1:-1] in text] == []


def test_a_teacher_gets_each_solution_after_its_exercise(kits, lesson):
    merged = read_cells(kits["teacher"] / "chapters" / lesson.name)
    if lesson not in SOLVED:
        assert merged == read_cells(lesson)
        return
    solved = kit.numbered(read_cells(kit.CHAPTERS / "solutions" / lesson.name))
    assert len({cell["id"] for cell in merged}) == len(merged)
    kept = [cell for cell in merged if not cell["id"].startswith(("solution", "heading"))]
    words = [" ".join(" ".join(cell["source"] for cell in cells).split()) for cells in (kept, read_cells(lesson))]
    assert words[0] == words[1]
    texts = [cell["source"] for cell in merged]
    for number in set(solved) - {0}:
        exercise = next(i for i, text in enumerate(texts) if text.startswith(f"**{number}. "))
        solution = texts.index(f"#### Solution {number}")
        next_exercise = [i for i, text in enumerate(texts) if text.startswith(f"**{number + 1}. ")]
        assert exercise < solution < min([*next_exercise, len(texts)])
        inserted = texts[solution + 1 : solution + 1 + len(solved[number])]
        assert inserted == [cell["source"].replace("../../data", "../data") for cell in solved[number]]


def test_a_teacher_gets_notes_for_every_chapter(kits):
    assert all(path.exists() for path in NOTES)
    assert sorted(path.name for path in (kits["teacher"] / "chapters" / "notes").iterdir()) == [n.name for n in NOTES]


@pytest.mark.slow
@pytest.mark.parametrize("audience", ["student", "teacher"])
def test_a_zip_file_unpacks_to_a_course_that_runs_alone(kits, audience, tmp_path):
    shutil.unpack_archive(kits[audience].with_suffix(".zip"), tmp_path)
    folder = tmp_path / audience
    code = "from minissl.hub import pretrained as p; print(p.__file__, p.load_encoder('scenes/dino').training)"
    options = {"cwd": folder / "chapters", "capture_output": True, "text": True, "check": True}
    environment = os.environ | {"PYTHONPATH": str(folder)}
    file, training = subprocess.run([sys.executable, "-c", code], env=environment, **options).stdout.split()
    assert Path(file).is_relative_to(folder)
    assert training == "False"
    for path in (folder / "chapters").glob("*.ipynb"):
        code = "\n".join(cell["source"] for cell in read_cells(path, "code"))
        for name in re.findall(r"\"((?:\.\./)+data/[\w./]+)\"", code):
            assert (folder / "chapters" / name).exists(), (path.name, name)


@pytest.mark.slow
def test_start_opens_jupyterlab_or_names_missing_packages(kits, tmp_path):
    folder = Path(shutil.copytree(kits["student"], tmp_path / "student"))
    command = [sys.executable, str(folder / "start.py"), "--version"]
    assert re.match(r"\d+\.\d+", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace('  "numpy",', '  "numpy",\n  "no-such-package>=2",'))
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "no-such-package" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_kit_replaces_a_kit_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kit, "FILES", ("pyproject.toml",))  # copying the rest takes seconds
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.md").write_text("mine")
    with pytest.raises(InputError, match="--out"):
        kit.make("student", tmp_path)
    assert kit.main(["student", "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "student" / "thesis.md").read_text() == "mine"
    assert kit.main(["teacher", "--out", str(tmp_path)]) == 0
    (tmp_path / "teacher" / "old.md").write_text("of last year")
    kit.make("teacher", tmp_path)
    assert not (tmp_path / "teacher" / "old.md").exists()


def test_a_text_cell_with_two_exercises_is_split():
    text = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["End of one.\n", "\n", "**2. Mend** it."]}
    code = {"cell_type": "code", "id": "b", "metadata": {}, "source": "x = 1", "outputs": []}
    exercises = kit.numbered([text | {"source": "**1. Do** it.", "id": "c"}, text, code])
    assert {number: [cell["source"] for cell in cells] for number, cells in exercises.items()} == {
        0: [],
        1: ["**1. Do** it.", "End of one."],
        2: ["**2. Mend** it.", "x = 1"],
    }
    assert len({cell["id"] for cells in exercises.values() for cell in cells}) == 4


@pytest.mark.parametrize(("notes", "path"), [*zip(NOTES, SOLVED)], ids=lambda path: path.stem)
def test_notes_refer_to_what_the_lesson_has(notes, path):
    """Names in italics are headings of the lesson, code in backticks occurs in it."""
    text, lesson_text = notes.read_text(encoding="utf-8"), full_text(path)
    prose = "\n\n".join(cell["source"] for cell in read_cells(path, "markdown"))
    headings = set(re.findall(r"^#{1,3} (.*)", prose, re.MULTILINE))
    names = {" ".join(name.split()) for name in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text)}
    assert names <= headings
    assert names
    for code in re.findall(r"`([^`\n]+)`", text):
        assert json.dumps(code, ensure_ascii=False)[1:-1] in lesson_text, code


def run_notebook(notebook, folder):
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "chapters")}}).execute()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own, about its event loop
def test_the_solutions_in_a_teachers_notebook_run(kits, monkeypatch):
    """The last chapter's, which also read a file, run alone and in their new folder."""
    monkeypatch.setenv("PYTHONPATH", str(kits["teacher"]))
    notebook = nbformat.read(kits["teacher"] / "chapters" / "3_6_compare.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
    assert sum("assert" in cell.source for cell in notebook.cells) >= 3
    run_notebook(notebook, kits["teacher"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_map_runs_in_a_students_kit(kits, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(kits["student"]))
    run_notebook(nbformat.read(kits["student"] / "chapters" / "0_map.ipynb", as_version=4), kits["student"])
