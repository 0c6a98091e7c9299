"""Exercises: each check rejects the common wrong answers and accepts the solution."""

import ast
import contextlib
import io
import re

import pytest

from tests.test_chapters import CHAPTER_LESSONS, CHAPTERS, code_sources, read_cells, split_at_exercises


def exercise_sources(lesson, number):
    """Return the code of one exercise, cell by cell."""
    sources, inside = [], False
    for cell in split_at_exercises(lesson)[1]:
        title = re.search(r"^\*\*(\d)\. ", cell["source"], re.MULTILINE) if cell["cell_type"] == "markdown" else None
        inside = title[1] == str(number) if title else inside
        sources += [cell["source"]] if inside and cell["cell_type"] == "code" else []
    return sources


def bound_names(node):
    """Return the names that a statement binds."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def run_exercise(lesson, number, answer):
    """Return what an exercise prints when its stub is replaced by `answer`."""
    space, given = {}, ast.parse(answer).body
    code = [re.sub("(?m)^%.*", "", source) for source in code_sources(read_cells(lesson))]
    nodes = [node for source in ["import torch.nn.functional as F", *code] for node in ast.parse(source).body]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "imports", "exec"), space)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for source in exercise_sources(lesson, number):
            body = []
            for node in ast.parse(source).body:
                body += next(
                    ([new] for new in given if bound_names(new) and bound_names(new) == bound_names(node)), [node]
                )
            exec(compile(ast.Module(body, []), "exercise", "exec"), space)
    return printed.getvalue()


# Chapter and exercise: a pattern of the check's reply: the answer. "Right" for the right ones, then common mistakes.
REPLIES = r"""
1_ 2: Case 1 of 30: your_vote = lambda x, y, q, k: int(y[(x @ q).topk(k).indices].bincount().argmax())
1_ 2: Case 1[1-9] of 30: your_vote = lambda x, y, q, k: int(y[torch.cosine_similarity(x, q[None]).argmax()])
2_ 1: Right: guess = 2.079
2_ 1: Right: guess = math.log(8)
2_ 1: is 20.1: guess = 3.0
2_ 2: Case 2 of 3: your_loss = lambda x, y, s: F.cross_entropy(s * x @ y.T, torch.arange(len(x)))
2_ 2: Case 3 of 3: your_loss = lambda x, y, s: F.cross_entropy(F.cosine_similarity(x[:, None], y, -1), torch.arange(5))
3_1 1: Right: guess = 0.693
3_1 1: is 4.0: guess = 1.386
3_1 2: Case 1 of 2: your_patches = lambda x, p: F.unfold(x, p, stride=p).mT
3_1 2: Case 1 of 2.*shape: your_patches = lambda x, p: x.permute(0, 2, 3, 1).reshape(len(x), -1)
3_2 1: Right: guess = 1.946
3_2 1: is 15.0: guess = 2.708
3_2 2: Case 1 of 4: your_nt_xent = lambda a, b, t: F.cross_entropy(a @ b.mT / t, torch.arange(len(a)))
3_2 2: Case 2 of 4: your_nt_xent = lambda a, b, t: nt_xent(a, b.flip(0), t)
3_3 1: Right: guess_loss, guess_kl = 4.159, 4.159
3_3 1: is 256.0: guess_loss, guess_kl = 5.545, 5.545
3_3 1: The loss is right: guess_loss, guess_kl = 4.159, 0.0
3_3 2: Case 1 of 3: your_entropy = lambda s, q, t: -(q[:, None] * (s / t).log_softmax(-1)).sum(-1).mean()
3_3 2: Case 3 of 3: your_entropy = lambda s, q, t: dino_loss(s, q, 1.0)
3_3 4: Broken: your_cancel = lambda student, teacher, progress: student.zero_grad()
3_3 5: Case 2 of 2: your_center = lambda c, x, parts: update_center(c, x.chunk(parts)[-1], 0.9)
3_3 6: Broken: your_clip_loss = lambda x, y: F.cross_entropy(y @ x.mT, torch.arange(len(x)))
3_3 7: Broken: your_loss = lambda s, q, c: dino_loss(s, center_and_sharpen(q, c, 0.004), 0.1)
3_3 7: Broken: your_loss = lambda s, q, c: dino_loss(s, center_and_sharpen(q, c, 0.04), 0.3)
3_4 1: Right: guess = 0.1
3_4 1: is 2.50: guess = 0.5
3_4 2: Case 1 of 3: your_koleo = lambda x: -torch.cdist(x, x).amin(1).log().mean()
3_4 2: Case 2 of 3: your_koleo = lambda x: -(torch.cdist(x, x) + 99 * torch.eye(len(x))).amin(1).log().mean()
3_4 4: Broken: your_patches = lambda x, grid, r: x[:, r : r + 16].unflatten(1, grid)
3_4 5: Broken: your_sometimes = lambda x, change, p: change(x) if torch.rand(()) < p else x
3_4 6: cosines +Broken: your_sinkhorn = lambda x, t, iterations=3: (x / t).softmax(-1)
3_4 7: Broken.* .2, 128.: your_targets = lambda encoder, x, mask, token: encoder(x).patches[~mask]
3_5 1: Right: guess = (0.0, 0.8)
3_5 1: Two numbers: guess = 0.8
3_5 1: A is right: guess = (0.0, 1.0)
3_5 2: Case 2 of 3: your_gram = lambda s, a: F.mse_loss(s @ s.mT, a @ a.mT)
3_5 2: Case 1 of 3: your_gram = lambda s, a: 25 * gram_loss(s, a)
3_5 3: Case 2 of 5: your_belief = lambda q, at, c, y, *_: ((c @ q).flatten() / 0.2).softmax(0) @ y.flatten(0, 2)
3_5 5: Broken: your_rotate = lambda x, by: x
3_5 6: Broken: your_step = lambda model, x: model.eval()["head"](model["encoder"](x).cls)
3_5 7: Broken: your_enlarged = lambda found, size: torch.zeros(size, dtype=torch.int64)
3_6 1: Right: guess = 6
3_6 1: 5 seeds: guess = 5
3_6 2: Case 1 of 2: your_summary = lambda x: torch.stack([x.mean(1), x.std(1)], 1)
3_6 2: Case 2 of 2: your_summary = lambda x: torch.stack([x.mean(1), x.std(1, correction=0)], 1)
3_6 3: Case 2 of 4: your_chance = lambda x: 0.5 ** (len(x) - 1)
3_6 5: of a run at random: your_entry = lambda validation, test: test.mean()
3_6 6: comes before seed 2: your_gains = lambda a, b: torch.tensor([a[s] - b[s] for s in sorted({*a} & {*b})])
"""
REPLY_CASES = [line.split(": ", 2) for line in REPLIES.strip().splitlines()]


def lesson_and_number(exercise):
    chapter, number = exercise.split()
    return next(path for path in CHAPTER_LESSONS if path.stem.startswith(chapter)), number


@pytest.mark.parametrize(("exercise", "pattern", "answer"), REPLY_CASES)
def test_a_check_replies_to_an_answer(exercise, pattern, answer):
    assert re.search(pattern, run_exercise(*lesson_and_number(exercise), answer))


@pytest.mark.parametrize("exercise", sorted({exercise for exercise, _, answer in REPLY_CASES if "lambda" in answer}))
def test_a_check_accepts_the_solution(exercise):
    lesson, number = lesson_and_number(exercise)
    solved = code_sources(read_cells(CHAPTERS / "solutions" / lesson.name))
    solutions = {name: node for source in solved for node in ast.parse(source).body for name in bound_names(node)}
    stub = next(answer.split(" =")[0] for other, _, answer in REPLY_CASES if other == exercise and "lambda" in answer)
    printed = run_exercise(lesson, number, ast.unparse(solutions[stub]))
    assert re.search("Correct|Right|right|Mended", printed)
    assert "Broken" not in printed
