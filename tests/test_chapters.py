"""The notebooks are what design says: one idea a cell, no code of their own, outputs kept, light.

That they run is tested by nbval, in `make test`.
"""

import ast
import json
import re
from pathlib import Path
from statistics import median

import numpy
import pytest
import torch

from minissl.exercises import check, difference

ROOT = Path(__file__).parent.parent
CHAPTERS = ROOT / "chapters"
NOTEBOOKS = sorted(CHAPTERS.rglob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.parent == CHAPTERS]
MAP = CHAPTERS / "0_map.ipynb"  # the first page: no chapter, and its one exercise only shows how they work
AFTER_IT = [path for path in LESSONS if path != MAP]


def cells(path, kind):
    content = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in content if cell["cell_type"] == kind]


def definitions(source):
    source = "\n".join(line for line in source.splitlines() if not line.startswith("%"))  # notebook magic is no Python
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: str(path.relative_to(CHAPTERS)))
def notebook(request):
    return request.param


def test_there_are_notebooks():
    assert LESSONS


def test_a_notebook_is_light(notebook):
    assert notebook.stat().st_size <= 600_000


def test_outputs_are_kept_and_none_is_an_error(notebook):
    for cell in cells(notebook, "code"):
        assert cell["execution_count"], cell["source"]
        assert "error" not in [output["output_type"] for output in cell["outputs"]], cell["source"]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_cell_is_one_idea(lesson):
    lines = [len(cell["source"].splitlines()) for cell in cells(lesson, "code")]
    assert max(lines) <= 15
    assert median(lines) <= 6


def everything(lesson):
    """All cells, and where the exercises begin."""
    found = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    return found, next(i for i, cell in enumerate(found) if "## Exercises" in "".join(cell["source"]))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_code_lives_in_the_package(lesson):
    found, start = everything(lesson)
    sources = ["".join(cell["source"]) for cell in found[:start] if cell["cell_type"] == "code"]
    assert [name for source in sources for name in definitions(source)] == []


@pytest.mark.parametrize("lesson", AFTER_IT, ids=lambda path: path.stem)
def test_exercises_have_tested_solutions(lesson):
    found, start = everything(lesson)
    after = [cell for cell in found[start:] if cell["cell_type"] == "code"]
    stubs = {name for cell in after for name in definitions("".join(cell["source"])) if not name.startswith("slow_")}
    assert len(re.findall(r"^\*\*\d\. ", "\n".join("".join(c["source"]) for c in found), re.MULTILINE)) >= 4
    solved = cells(CHAPTERS / "solutions" / lesson.name, "code")
    assert stubs <= {name for cell in solved for name in definitions(cell["source"])}
    assert sum("assert" in cell["source"] for cell in solved) >= 3


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_code_that_is_shown_is_the_code_that_runs(lesson):
    package = {path: path.read_text(encoding="utf-8") for path in (ROOT / "minissl").rglob("*.py")}
    for cell in cells(lesson, "code"):
        if "print(inspect.getsource(" in "".join(cell["source"]):
            shown = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            for part in filter(str.strip, re.split(r"^(?=(?: {4})?(?:def|class|@)\b)|\n{3,}", shown, flags=re.M)):
                assert any(part.rstrip() in code for code in package.values()), part


def rows_of_the_map():
    """What its two tables say of each chapter, by column."""
    text, tables = "\n".join(cell["source"] for cell in cells(MAP, "markdown")), []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[field.strip() for field in line.split("|")[1:-1]] for line in table.splitlines()]
        tables.append([dict(zip(head, row)) for row in rows])
    what, costs = tables
    assert [re.match(r"\[([\d.]+?)\.? ", row["chapter"])[1] for row in what] == [row["chapter"] for row in costs]
    return [cost | row for row, cost in zip(what, costs)]


def minutes_to_read(lesson):
    """150 words a minute, a quarter of a minute for each cell, half of one for each figure, up to the exercises."""
    found, start = everything(lesson)
    words = sum(len("".join(c["source"]).split()) for c in found[: start + 1] if c["cell_type"] == "markdown")
    code = [cell for cell in found[:start] if cell["cell_type"] == "code"]
    figures = sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    return words / 150 + len(code) / 4 + figures / 2


def test_the_map_has_every_chapter_in_order():
    assert [re.search(r"\((.*)\)", row["chapter"])[1] for row in rows_of_the_map()] == [p.name for p in AFTER_IT]


@pytest.mark.parametrize("lesson", AFTER_IT, ids=lambda path: path.stem)
def test_the_map_is_right_about_a_chapter(lesson):
    row = rows_of_the_map()[AFTER_IT.index(lesson)]
    text = "\n".join(cell["source"] for cell in cells(lesson, "markdown"))
    opening = {"2": "[Aa]bout two minutes", "1": "Less than a minute"}[row["minutes to run"]]
    assert re.search(opening, text)
    on_a_gpu = re.search(r"`--preset gpu`.* about (\d+ minutes)", text)
    assert row["photographs, GPU"] == (on_a_gpu[1] if on_a_gpu else "3 hours")
    assert int(row["exercises"]) == len(re.findall(r"^\*\*\d\. ", text, re.MULTILINE))
    assert abs(int(row["minutes to read"]) - minutes_to_read(lesson)) < 5
    target, time = re.fullmatch(r"`make (\w+)`, (.*)", row["from nothing, CPU"]).groups()
    makefile = (CHAPTERS.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:.*\({time}[,;]", makefile, re.MULTILINE)


def test_the_answer_that_the_map_gives_is_right():
    stub, (line,) = {}, re.findall(r"<summary>.*?`(return .*?)`", cells(MAP, "markdown")[-1]["source"], re.DOTALL)
    for cell in cells(MAP, "code")[-3:]:  # the specification, the stub, the check
        exec(cell["source"].replace('take their mean."""', f'take their mean."""\n    {line}'), stub)
    assert stub["check"](stub["your_share"], stub["slow_share"], [(torch.arange(6) % 2, torch.arange(6) % 3)])


def test_a_check_says_what_is_wrong(capsys):
    cases = [(torch.arange(4.0),), (torch.ones(2),)]
    assert check(lambda x: 2 * x, lambda x: x + x, cases)
    assert not check(lambda x: x, lambda x: x + x, cases)
    assert not check(lambda x: None, lambda x: x, cases)
    assert not check(lambda x: x[:, 7], lambda x: x, cases)
    said = capsys.readouterr().out
    assert "Right, in 2 cases." in said
    assert "75 % of the numbers differ; the first at [1] should be 2, yours is 1." in said
    assert "Not begun" in said
    assert "Case 1: your code stopped with IndexError" in said


@pytest.mark.parametrize(
    ("found", "right", "says"),
    [
        (1.0, 1.00001, ""),
        (1.0, 2.0, "the answer is 2.0, yours is 1.0."),
        ([1], torch.ones(1), "a tensor of shape (1,) is asked for, yours is a list."),
        (torch.ones(2), torch.ones(3), "the shape should be (3,), yours is (2,)."),
        (3, 3, ""),
        (torch.tensor(1.0), 1.0, ""),
        (0.5, torch.tensor(0.5), ""),
        (torch.ones(2), 1.0, "one number is asked for, yours is a tensor of shape (2,)."),
        ([0.5], 0.5, "one number is asked for, yours is a list."),
        ("0.5", 0.5, "one number is asked for, yours is a str."),
        (numpy.float32(0.5), 0.5, ""),
        (torch.tensor(2.0), torch.tensor(1.0), "the answer is 1.0, yours is 2.0."),
        (torch.tensor(1.0), torch.ones(2), "the shape should be (2,), yours is ()."),
    ],
)
def test_a_difference_in_a_sentence(found, right, says):
    assert difference(found, right) == says
