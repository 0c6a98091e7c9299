"""The chapters are one story: each opens with a question and its price, shows what it says, and hands on a question.

And its exercises tell a student what is wrong: each check below is given typical mistakes, and the solution.
"""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import scoreboard

ROOT = Path(__file__).parent.parent
CHAPTERS = ROOT / "chapters"
LESSONS = sorted(CHAPTERS.glob("[1-3]*.ipynb"))
LEARNT = {  # what each learns by, as the GPU's log calls it, and how many rows the table has at its end
    "1_transfer_learning": ("transfer", 2),
    "2_clip": ("clip", 3),
    "3_1_pretext_tasks": ("pretext", 6),
    "3_2_simclr": ("simclr", 7),
    "3_3_dino": ("dino", 8),
    "3_4_dinov2": ("dinov2", 9),
    "3_5_dinov3": ("dinov3", 10),
}
WIDGETS = {  # what a reader may move, and where: chapter -> what the cells that draw them call
    "2_clip": ["text_box("],  # search by a sentence
    "3_2_simclr": ["change=list("],  # the augmentation microscope
    "3_3_dino": ["temperature=(", "cell=list(", "scene=(", "moment=(", "picker("],  # centring, collapse, seeing
    "3_5_dinov3": ["scene=(", "picker(", "frame=("],  # Gram before and after
}


def cells(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def has(cell, kind):
    return any(kind in output.get("data", {}) for output in cell.get("outputs", []))


def before_and_after(lesson):
    """A chapter's cells up to where its exercises begin, that one included, and from there on."""
    found = cells(lesson)
    start = next(i for i, cell in enumerate(found) if "## Exercises" in cell["source"])
    return found[: start + 1], found[start:]


by_chapter = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
but_the_last = pytest.mark.parametrize("lesson", LESSONS[:-1], ids=lambda path: path.stem)


def test_every_picture_is_told_to_who_does_not_see_it():
    told = []
    for path in sorted(CHAPTERS.rglob("*.ipynb")):
        for cell in cells(path):
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt")
            assert bool(alt) == has(cell, "image/png"), (path.name, cell["source"])
            told += [alt] if alt else []
            assert "![](" not in cell["source"], path.name
    assert len(told) > 100
    assert [alt for alt in told if len(alt) < 40 or not alt.endswith(".") or "\n" in alt] == []
    assert len(set(told)) == len(told)


@by_chapter
def test_a_chapter_opens_with_a_question_and_its_price(lesson):
    opening = next(cell["source"] for cell in cells(lesson) if cell["cell_type"] == "markdown")
    first, promise = opening.split("After this chapter you can")
    assert "?" in first
    assert re.search(r"minutes? on a laptop's CPU.*No GPU is needed", promise)


@but_the_last
def test_the_minutes_on_a_gpu_are_those_of_its_log(lesson):
    gpu = json.loads((ROOT / "data/recorded/gpu.json").read_text(encoding="utf-8"))
    looks = 100 * 10_000 / gpu["methods"][LEARNT[lesson.stem][0]]["images_per_second"] / 60
    text = "\n".join(cell["source"] for cell in before_and_after(lesson)[0])
    said = re.search(r"about (\d+) minutes at the speed an (\w+) showed", text)
    assert abs(int(said[1]) - looks) < 1
    assert said[2] in gpu["gpu"]


@by_chapter
def test_a_chapter_names_its_sources(lesson):
    assert len(set(re.findall(r"arxiv\.org/abs/[\d.]+", "\n".join(cell["source"] for cell in cells(lesson))))) >= 2


@by_chapter
def test_an_equation_stands_beside_the_code_that_computes_it(lesson):
    found = before_and_after(lesson)[0]
    for i, cell in enumerate(found):
        if cell["cell_type"] == "markdown" and "$$" in cell["source"]:
            assert any(after["cell_type"] == "code" for after in found[i + 1 : i + 2]), cell["source"]


@by_chapter
def test_a_chapter_ends_with_what_was_learnt(lesson):
    ending = "\n".join(cell["source"] for cell in before_and_after(lesson)[0]).split("## What we know now")[1]
    assert len(re.findall(r"^- ", ending, re.MULTILINE)) >= 3


@but_the_last
def test_the_table_so_far_has_the_recorded_numbers_and_a_question_is_left(lesson):
    found = before_and_after(lesson)[0]
    (at,) = [i for i, cell in enumerate(found) if cell["source"].find("# The table so far") >= 0]
    assert "**The table so far" in found[at - 1]["source"]
    rows = json.loads((ROOT / "data/recorded/scoreboard.json").read_text(encoding="utf-8"))["rows"]
    names = list(scoreboard.ROWS)[: LEARNT[lesson.stem][1]]
    columns = dict.fromkeys(("knn", "linear", "linear_color", "linear_action", "linear_place", "J&F"), "")
    table = scoreboard.table({name: rows[name] for name in names}, columns).splitlines()[2:]
    shown = "".join(found[at]["outputs"][0]["text"]).splitlines()[1:]
    assert [re.findall(r"\d+\.\d", line) for line in shown] == [re.findall(r"\d+\.\d", line) for line in table]
    assert [line.split()[0] for line in shown] == names
    left = "\n".join(cell["source"] for cell in found[at + 1 :])
    assert re.search(r"(next|third|last) (chapter|method)", left)


@pytest.mark.parametrize(("chapter", "drawn"), WIDGETS.items())
def test_what_moves_has_a_still_picture_beside_it(chapter, drawn):
    found = cells(CHAPTERS / f"{chapter}.ipynb")
    widgets = [i for i, cell in enumerate(found) if has(cell, "application/vnd.jupyter.widget-view+json")]
    assert len(widgets) == len(drawn)
    for i, call in zip(widgets, drawn):
        assert call in found[i]["source"]
        assert any(has(cell, "image/png") for cell in found[max(0, i - 3) : i + 3]), found[i]["source"]


@by_chapter
def test_there_are_exercises_of_every_kind(lesson):
    after = before_and_after(lesson)[1]
    titles = re.findall(r"^\*\*(\d)\. ([A-Z]\w+)", "\n".join(cell["source"] for cell in after), re.MULTILINE)
    assert [int(number) for number, _ in titles] == list(range(1, len(titles) + 1))
    assert len(titles) >= 4
    assert {"Predict", "Implement", "Explore"} <= {kind for _, kind in titles}
    assert {"Break", "Broken"} & {kind for _, kind in titles}
    for number, _ in titles:  # what has no check says at least what is amiss
        sources = exercise(lesson, number)
        assert any("check(" in source or "if " in source for source in sources), (lesson.stem, number)


def exercise(lesson, number):
    """The code of an exercise, cell by cell."""
    found, sources, inside = before_and_after(lesson)[1], [], False
    for cell in found:
        title = re.search(r"^\*\*(\d)\. ", cell["source"], re.MULTILINE) if cell["cell_type"] == "markdown" else None
        inside = title[1] == str(number) if title else inside
        sources += [cell["source"]] if inside and cell["cell_type"] == "code" else []
    return sources


def named(node):
    """The names that a statement gives a value."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def reply(lesson, number, answer):
    """What an exercise prints to who answers so: `answer` in place of the stub, all else as it stands."""
    space, given = {}, ast.parse(answer).body
    code = [re.sub("(?m)^%.*", "", cell["source"]) for cell in cells(lesson) if cell["cell_type"] == "code"]
    nodes = [node for source in ["import torch.nn.functional as F", *code] for node in ast.parse(source).body]
    exec(compile(ast.Module([x for x in nodes if isinstance(x, ast.Import | ast.ImportFrom)], []), "", "exec"), space)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for source in exercise(lesson, number):
            body = []
            for node in ast.parse(source).body:
                body += next(([new] for new in given if named(new) and named(new) == named(node)), [node])
            exec(compile(ast.Module(body, []), "exercise", "exec"), space)
    return said.getvalue()


# Chapter, exercise: what the check says to an answer. First what is right, then what people get wrong.
REPLIES = r"""
1_ 2: Case 1 of 30: your_vote = lambda x, y, q, k: int(y[(x @ q).topk(k).indices].bincount().argmax())
1_ 2: Case 1[1-9] of 30: your_vote = lambda x, y, q, k: int(y[torch.cosine_similarity(x, q[None]).argmax()])
2_ 1: Right: guess = 2.079
2_ 1: Right: guess = math.log(8)
2_ 1: is 20.1. so many captions: guess = 3.0
2_ 2: Case 2 of 3: your_loss = lambda x, y, s: F.cross_entropy(s * x @ y.T, torch.arange(len(x)))
2_ 2: Case 3 of 3: your_loss = lambda x, y, s: F.cross_entropy(F.cosine_similarity(x[:, None], y, -1), torch.arange(5))
3_1 1: Right: guess = 0.693
3_1 1: is 4.0. so many answers: guess = 1.386
3_1 2: the first at .* should be: your_patches = lambda x, p: F.unfold(x, p, stride=p).mT
3_1 2: the shape should be: your_patches = lambda x, p: x.permute(0, 2, 3, 1).reshape(len(x), -1)
3_2 1: Right: guess = 1.946
3_2 1: is 15.0. so many: guess = 2.708
3_2 2: Case 1 of 4: your_nt_xent = lambda a, b, t: F.cross_entropy(a @ b.mT / t, torch.arange(len(a)))
3_2 2: Case 2 of 4: your_nt_xent = lambda a, b, t: nt_xent(a, b.flip(0), t)
3_3 1: Right: guess_loss, guess_kl = 4.159, 4.159
3_3 1: is 256.0. so many prototypes: guess_loss, guess_kl = 5.545, 5.545
3_3 1: The loss is right. KL is: guess_loss, guess_kl = 4.159, 0.0
3_3 2: Case 1 of 3: your_entropy = lambda s, q, t: -(q[:, None] * (s / t).log_softmax(-1)).sum(-1).mean()
3_3 2: Case 3 of 3: your_entropy = lambda s, q, t: cross_view_entropy(s, q, 1.0)
3_3 4: something stands still: your_cancel = lambda student, teacher, progress: student.zero_grad()
3_3 5: Case 2 of 2: your_center = lambda c, x, parts: update_center(c, x.chunk(parts)[-1], 0.9)
3_3 6: only directions decide: your_clip_loss = lambda x, y: F.cross_entropy(y @ x.mT, torch.arange(len(x)))
3_3 7: Leave it as it was: your_loss = lambda s, q, c: cross_view_entropy(s, center_and_sharpen(q, c, 0.004), 0.1)
3_3 7: stands in its way: your_loss = lambda s, q, c: cross_view_entropy(s, center_and_sharpen(q, c, 0.04), 0.3)
3_4 1: Right: guess = 0.1
3_4 1: Five times that is 2.50: guess = 0.5
3_4 2: Case 1 of 3: your_koleo = lambda x: -torch.cdist(x, x).amin(1).log().mean()
3_4 2: Case 2 of 3: your_koleo = lambda x: -(torch.cdist(x, x) + 99 * torch.eye(len(x))).amin(1).log().mean()
3_4 4: 0 registers. Broken: your_patches = lambda x, grid, r: x[:, r : r + 16].unflatten(1, grid)
3_4 5: a draw of its own: your_sometimes = lambda x, change, p: change(x) if torch.rand(()) < p else x
3_4 6: cosines +Broken. this was right: your_sinkhorn = lambda x, t, iterations=3: (x / t).softmax(-1)
3_4 7: are .2, 128., yours .14: your_targets = lambda encoder, x, mask, token: encoder(x).patches[~mask]
3_5 1: Right: guess = (0.0, 0.8)
3_5 1: Two numbers are asked for: guess = 0.8
3_5 1: A is right. B. 25 of the 25: guess = (0.0, 1.0)
3_5 2: Case 2 of 3: your_gram = lambda s, a: F.mse_loss(s @ s.mT, a @ a.mT)
3_5 2: Case 1 of 3: your_gram = lambda s, a: 25 * gram_loss(s, a)
3_5 3: Case 2 of 5: your_belief = lambda q, at, c, y, *_: ((c @ q).flatten() / 0.2).softmax(0) @ y.flatten(0, 2)
3_5 5: nobody is turned: your_rotate = lambda x, by: x
3_5 6: head does not know: your_step = lambda model, x: model.eval()["head"](model["encoder"](x).cls)
3_5 7: most of a patch's pixels: your_enlarged = lambda found, size: torch.zeros(size, dtype=torch.int64)
3_6 1: Right: guess = 6
3_6 1: 5 seeds agree by luck in 6: guess = 5
3_6 2: Case 1 of 2: your_summary = lambda x: torch.stack([x.mean(1), x.std(1)], 1)
3_6 2: Case 2 of 2: your_summary = lambda x: torch.stack([x.mean(1), x.std(1, correction=0)], 1)
3_6 3: Case 2 of 4: your_chance = lambda x: 0.5 ** (len(x) - 1)
3_6 5: Honest, but of a run at random: your_entry = lambda validation, test: test.mean()
3_6 6: 10 comes before seed 2: your_gains = lambda a, b: torch.tensor([a[s] - b[s] for s in sorted({*a} & {*b})])
"""
REPLIED = [line.split(": ", 2) for line in REPLIES.strip().splitlines()]


def lesson_and_number(of):
    chapter, number = of.split()
    return next(path for path in LESSONS if path.stem.startswith(chapter)), number


@pytest.mark.parametrize(("of", "said", "answer"), REPLIED)
def test_a_check_says_what_is_wrong(of, said, answer):
    assert re.search(said, reply(*lesson_and_number(of), answer))


@pytest.mark.parametrize("of", sorted({of for of, _, answer in REPLIED if "lambda" in answer}))
def test_a_check_accepts_the_solution(of):
    lesson, number = lesson_and_number(of)
    solved = [cell["source"] for cell in cells(CHAPTERS / "solutions" / lesson.name) if cell["cell_type"] == "code"]
    known = {name: node for source in solved for node in ast.parse(source).body for name in named(node)}
    stub = next(answer.split(" =")[0] for found, _, answer in REPLIED if found == of and "lambda" in answer)
    said = reply(lesson, number, ast.unparse(known[stub]))
    assert re.search("Right|right|Mended", said)
    assert "Broken" not in said
