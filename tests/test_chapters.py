"""Notebooks: short cells, no code of their own, committed outputs, a text for every image, small files.

`make test` runs them with nbval.
"""

import ast
import json
import re
from pathlib import Path
from statistics import median

import numpy
import pytest
import torch

from minissl.notebook.course_table import course_table
from minissl.notebook.exercises import check, difference

ROOT = Path(__file__).parent.parent
CHAPTERS = ROOT / "chapters"
NOTEBOOKS = sorted(CHAPTERS.rglob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.parent == CHAPTERS]
MAP = CHAPTERS / "0_map.ipynb"  # the first page; its one exercise shows how exercises work
CHAPTER_LESSONS = [path for path in LESSONS if path != MAP]
WIDGET = "application/vnd.jupyter.widget-view+json"

every_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
every_chapter = pytest.mark.parametrize("lesson", CHAPTER_LESSONS, ids=lambda path: path.stem)


def read_cells(path, cell_type=None):
    """Return a notebook's cells, each with its source as one string."""
    content = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in content if cell_type in (None, c["cell_type"])]


def has_output(cell, mime_type):
    return any(mime_type in output.get("data", {}) for output in cell.get("outputs", []))


def split_at_exercises(lesson):
    """Return a lesson's cells before its exercises, and from their heading on."""
    cells = read_cells(lesson)
    start = next(i for i, cell in enumerate(cells) if "## Exercises" in cell["source"])
    return cells[:start], cells[start:]


def definitions(source):
    """Return the names of the functions and classes that a cell defines."""
    source = "\n".join(line for line in source.splitlines() if not line.startswith("%"))  # without notebook magic
    nodes = ast.walk(ast.parse(source))
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def code_sources(cells):
    return [cell["source"] for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: str(path.relative_to(CHAPTERS)))
def notebook(request):
    return request.param


def test_there_are_lessons():
    assert CHAPTER_LESSONS


def test_a_notebook_has_at_most_600_kb(notebook):
    assert notebook.stat().st_size <= 600_000


def test_outputs_are_committed_and_none_is_an_error(notebook):
    for cell in read_cells(notebook, "code"):
        assert cell["execution_count"], cell["source"]
        assert "error" not in [output["output_type"] for output in cell["outputs"]], cell["source"]


@every_lesson
def test_cells_are_short(lesson):
    lines = [len(cell["source"].splitlines()) for cell in read_cells(lesson, "code")]
    assert max(lines) <= 15
    assert median(lines) <= 6


@every_lesson
def test_code_lives_in_the_package(lesson):
    lesson_cells, _ = split_at_exercises(lesson)
    assert [name for source in code_sources(lesson_cells) for name in definitions(source)] == []


@every_lesson
def test_displayed_code_is_the_code_that_runs(lesson):
    package = [path.read_text(encoding="utf-8") for path in (ROOT / "minissl").rglob("*.py")]
    for cell in read_cells(lesson, "code"):
        if "inspect.getsource(" in cell["source"]:
            shown = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            for part in filter(
                str.strip, re.split(r"^(?=(?: {4})?(?:def|class|@)\b)|\n{3,}", shown, flags=re.MULTILINE)
            ):
                assert any(part.rstrip() in code for code in package), part


def test_every_image_has_its_own_alternative_text():
    texts = []
    for path in NOTEBOOKS:
        for cell in read_cells(path):
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt")
            assert bool(alt) == has_output(cell, "image/png"), (path.name, cell["source"])
            texts += [alt] if alt else []
            assert "![](" not in cell["source"], path.name
    assert [text for text in texts if "\n" in text] == []
    assert len(set(texts)) == len(texts)


@every_lesson
def test_a_still_image_stands_beside_each_widget(lesson):
    cells = read_cells(lesson)
    for i, cell in enumerate(cells):
        if has_output(cell, WIDGET):
            assert any(has_output(near, "image/png") for near in cells[max(0, i - 3) : i + 3]), cell["source"]


@every_chapter
def test_the_course_table_is_the_recorded_one(lesson):
    cells = [cell for cell in read_cells(lesson, "code") if re.search(r"\bcourse_table\(Path\(", cell["source"])]
    assert len(cells) == (lesson != CHAPTER_LESSONS[-1])  # the last chapter has the whole scoreboard instead
    for cell in cells:
        num_rows = int(re.search(r"scoreboard\.json\"\), (\d+)\)", cell["source"])[1])
        printed = "".join("".join(output["text"]) for output in cell["outputs"])
        assert printed == course_table(ROOT / "data/recorded/scoreboard.json", num_rows) + "\n"


@every_chapter
def test_exercises_have_tested_solutions(lesson):
    _, exercise_cells = split_at_exercises(lesson)
    stubs = {name for source in code_sources(exercise_cells) for name in definitions(source)}
    solved = code_sources(read_cells(CHAPTERS / "solutions" / lesson.name))
    defined = {name for source in solved for name in definitions(source)}
    assert {name for name in stubs if not name.startswith("slow_")} <= defined
    assert sum("assert" in source for source in solved) >= 3


@every_chapter
def test_exercises_are_numbered_and_checked(lesson):
    _, cells = split_at_exercises(lesson)
    checked, number = {}, 0
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for title in re.findall(r"^\*\*(\d+)\. ", cell["source"], re.MULTILINE):
                assert int(title) == number + 1
                number += 1
                checked[number] = False
        elif number:
            checked[number] |= "check(" in cell["source"] or "if " in cell["source"]
    assert number >= 4
    assert all(checked.values()), checked


def map_tables():
    """Return the rows of the map's tables of chapters, each as {column: text}."""
    text, tables = "\n".join(cell["source"] for cell in read_cells(MAP, "markdown")), []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[field.strip() for field in line.split("|")[1:-1]] for line in table.splitlines()]
        if "chapter" in head:
            tables.append([dict(zip(head, row)) for row in rows])
    return tables


def test_the_map_lists_every_chapter_in_order():
    overview = map_tables()[0]
    assert [re.search(r"\((.*)\)", row["chapter"])[1] for row in overview] == [path.name for path in CHAPTER_LESSONS]


def test_the_map_names_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for table in map_tables() for row in table for target in re.findall(r"`make (\w+)`", str(row))}
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_solution_in_the_map_is_right():
    space, (line,) = {}, re.findall(r"<summary>.*?`(return .*?)`", read_cells(MAP, "markdown")[-1]["source"], re.DOTALL)
    specification, stub, checks = code_sources(split_at_exercises(MAP)[1])
    assert stub.rstrip().endswith('"""')
    for source in (specification, f"{stub.rstrip()}\n    {line}", checks):
        exec(source, space)
    yours, slow = (next(space[name] for name in definitions(source)) for source in (stub, specification))
    assert space["check"](yours, slow, [(torch.arange(6) % 2, torch.arange(6) % 3)])


def test_check_names_the_first_difference(capsys):
    cases = [(torch.arange(4.0),), (torch.ones(2),)]
    assert check(lambda x: 2 * x, lambda x: x + x, cases)
    assert not check(lambda x: x, lambda x: x + x, cases)
    assert re.search(r"\[1\].* 2\b.* 1\b", capsys.readouterr().out)  # position, expected and given value
    assert not check(lambda x: None, lambda x: x, cases)
    assert not check(lambda x: x[:, 7], lambda x: x, cases)
    assert "IndexError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected", "named"),
    [
        (1.0, 2.0, ["1.0", "2.0"]),
        ([1], torch.ones(1), ["(1,)", "list"]),
        (torch.ones(2), torch.ones(3), ["(3,)", "(2,)"]),
        (torch.ones(2), 1.0, ["(2,)"]),
        ([0.5], 0.5, ["list"]),
        ("0.5", 0.5, ["str"]),
        (torch.tensor(2.0), torch.tensor(1.0), ["1.0", "2.0"]),
        (torch.tensor(1.0), torch.ones(2), ["(2,)", "()"]),
    ],
)
def test_difference_names_what_is_wrong(given, expected, named):
    message = difference(given, expected)
    assert all(word in message for word in named), message
    assert message


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1.0, 1.00001), (3, 3), (torch.tensor(1.0), 1.0), (0.5, torch.tensor(0.5)), (numpy.float32(0.5), 0.5)],
)
def test_difference_accepts_equal_answers(given, expected):
    assert difference(given, expected) == ""
