"""The notebooks are what design says: one idea a cell, no code of their own, outputs kept, light.

That they run is tested by nbval, in `make test`.
"""

import ast
import json
import re
from pathlib import Path
from statistics import median

import pytest
import torch

from minissl.exercises import check, difference

CHAPTERS = Path(__file__).parent.parent / "chapters"
NOTEBOOKS = sorted(CHAPTERS.rglob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.parent == CHAPTERS]


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


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_code_lives_in_the_package_and_exercises_have_tested_solutions(lesson):
    everything = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    start = next(i for i, cell in enumerate(everything) if "## Exercises" in "".join(cell["source"]))
    sources = ["".join(cell["source"]) for cell in everything[:start] if cell["cell_type"] == "code"]
    assert [name for source in sources for name in definitions(source)] == []
    after = [cell for cell in everything[start:] if cell["cell_type"] == "code"]
    stubs = {name for cell in after for name in definitions("".join(cell["source"])) if not name.startswith("slow_")}
    assert len(re.findall(r"^\*\*\d\. ", "\n".join("".join(c["source"]) for c in everything), re.MULTILINE)) >= 4
    solved = cells(CHAPTERS / "solutions" / lesson.name, "code")
    assert stubs <= {name for cell in solved for name in definitions(cell["source"])}
    assert sum("assert" in cell["source"] for cell in solved) >= 3


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
    ],
)
def test_a_difference_in_a_sentence(found, right, says):
    assert difference(found, right) == says
