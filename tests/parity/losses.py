"""Losses and their targets, compared with lightly, open_clip and loops that follow the papers' formulas."""

import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.methods.clip import clip_loss, duplicate_caption_mask
from minissl.methods.dino import center_and_sharpen, dino_loss, update_center
from minissl.methods.dinov2 import ibot_patch_loss
from minissl.methods.dinov3 import gram_loss
from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from minissl.methods.simclr import nt_xent
from tests.parity.ledger import RandomInputs, Sides, comparison

TEACHER_TEMPS = (0.0625, 0.125, 0.1875)  # exact in float32, in which lightly keeps them


def lightly(module: str) -> ModuleType:
    """Import a module of lightly without the deprecation warnings of its own imports."""
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"lightly.{module}")


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def log_prob(logits: list[Tensor], index: int) -> Tensor:
    """Return the logarithm of one softmax probability over a list of logits."""
    largest = max(logit.item() for logit in logits)
    return logits[index] - largest - sum((logit - largest).exp() for logit in logits).log()


def cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return -sum q log p for a target (K,) and logits (K,)."""
    scaled = list(logits / temperature)
    return -sum(q * log_prob(scaled, k) for k, q in enumerate(target))


@comparison("NT-Xent", "lightly", nt_xent, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, p, t = rng.integer(2, 24), rng.integer(3, 40), rng.number(0.07, 1.0)
    views = [rng.leaf(b, p, scale=3) for _ in range(2)]
    reference = lightly("loss").NTXentLoss(temperature=t)
    return Sides(lambda: nt_xent(*views, t), lambda: reference(*views), views)


@comparison("NT-Xent", "explicit loop", nt_xent, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, p, t = rng.integer(2, 6), rng.integer(3, 9), rng.number(0.07, 1.0)
    views = [rng.leaf(b, p, scale=3) for _ in range(2)]

    def expected() -> Tensor:
        z, total = [unit(row) for view in views for row in view], 0.0
        for i in range(2 * b):
            candidates = [j for j in range(2 * b) if j != i]
            total = total - log_prob([z[i] @ z[j] / t for j in candidates], candidates.index((i + b) % (2 * b)))
        return total / (2 * b)

    return Sides(lambda: nt_xent(*views, t), expected, views)


@comparison("CLIP loss", "open_clip", clip_loss, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from open_clip.loss import ClipLoss

    b, e = rng.integer(2, 40), rng.integer(3, 40)
    image, text, scale = rng.leaf(b, e, scale=3), rng.leaf(b, e, scale=2), rng.uniform(low=1, high=30)
    scale.requires_grad_()

    def expected() -> Tensor:
        return ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)

    return Sides(lambda: clip_loss(image, text, scale), expected, [image, text, scale])


@comparison("CLIP loss, duplicate captions masked", "explicit loop", clip_loss, duplicate_caption_mask, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, e, scale = rng.integer(3, 7), rng.integer(3, 9), rng.number(1, 20)
    image, text = rng.leaf(b, e), rng.leaf(b, e)
    captions = [(rng.choice("a cat", "a dog"), rng.choice("red", "blue")) for _ in range(b - 1)] + [("a bird",)]

    def expected() -> Tensor:
        total = 0.0
        for queries, keys in ((image, text), (text, image)):
            for i in range(b):
                candidates = [j for j in range(b) if j == i or captions[j] != captions[i]]
                logits = [scale * (unit(queries[i]) @ unit(keys[j])) for j in candidates]
                total = total - log_prob(logits, candidates.index(i)) / (2 * b)
        return total

    return Sides(lambda: clip_loss(image, text, scale, duplicate_caption_mask(captions)), expected, [image, text])


@comparison("DINO loss with centering", "lightly", dino_loss, center_and_sharpen, update_center, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """Two steps; the second uses the center that the first has updated."""
    b, k, v = rng.integer(2, 9), rng.integer(4, 40), rng.integer(2, 7)
    t, teacher_temp, momentum = rng.number(0.1, 0.5), rng.choice(*TEACHER_TEMPS), rng.number(0.5, 0.99)
    student, teacher = rng.leaf(v, b, k), rng.normal(2, 2, b, k)
    options = {"warmup_teacher_temp": teacher_temp, "teacher_temp": teacher_temp, "warmup_teacher_temp_epochs": 1}
    reference = lightly("loss").DINOLoss(k, student_temp=t, center_momentum=momentum, **options).to(rng.dtype)

    def actual() -> list[Tensor]:
        center, losses = torch.zeros(1, k, dtype=rng.dtype), []
        for logits in teacher:
            losses.append(dino_loss(student, center_and_sharpen(logits, center, teacher_temp), t))
            center = update_center(center, logits, momentum)
        return losses

    def expected() -> list[Tensor]:
        return [reference(list(logits), list(student), epoch=0) for logits in teacher]

    return Sides(actual, expected, [student])


@comparison("DINO loss with a weight for local crops", "explicit loop", dino_loss, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, k, g = rng.integer(1, 3), rng.integer(3, 8), rng.integer(1, 3)
    v, t, weight = rng.integer(g + 1, 5), rng.number(0.1, 1.0), rng.number(0.2, 1.0)
    student, target = rng.leaf(v, b, k), rng.normal(g, b, k).softmax(-1)

    def expected() -> Tensor:
        pairs = [(i, j) for i in range(g) for j in range(v) if i != j]
        terms = [
            cross_entropy(target[i, n], student[j, n], t) * (1 if j < g else weight) for i, j in pairs for n in range(b)
        ]
        return sum(terms) / b / len(pairs)

    return Sides(lambda: dino_loss(student, target, t, weight), expected, [student])


@comparison("iBOT patch loss", "lightly", ibot_patch_loss, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, n, k = rng.integer(2, 8), rng.integer(2, 16), rng.integer(3, 40)
    t, teacher_temp, mask = rng.number(0.1, 0.5), rng.choice(*TEACHER_TEMPS), rng.mask(b, n, fraction=0.4)
    mask[0], mask[1, 0] = False, True
    m = int(mask.sum())
    student, teacher = rng.leaf(m, k), rng.normal(m, k)
    reference = lightly("loss").IBOTPatchLoss(k, teacher_temp=teacher_temp, student_temp=t).to(rng.dtype)

    def actual() -> Tensor:
        return ibot_patch_loss(student, (teacher / teacher_temp).softmax(-1), mask, t)

    return Sides(actual, lambda: reference(teacher, student, mask[:, None]), [student])


@comparison("iBOT patch loss", "explicit loop", ibot_patch_loss, fp64=1e-6, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """minissl, like lightly, weights the crops in float32 in any precision."""
    b, n, k, t = rng.integer(2, 4), rng.integer(2, 6), rng.integer(3, 7), rng.number(0.1, 1.0)
    mask = rng.mask(b, n)
    mask[0], mask[1, 0] = False, True
    student, target = (rng.leaf(int(mask.sum()), k), rng.normal(int(mask.sum()), k).softmax(-1))

    def expected() -> Tensor:
        total, row = 0.0, 0
        for crop in mask.tolist():
            for masked in crop:
                if masked:
                    total = total + cross_entropy(target[row], student[row], t) / sum(crop) / b
                    row += 1
        return total

    return Sides(lambda: ibot_patch_loss(student, target, mask, t), expected, [student])


@comparison("KoLeo loss", "lightly", koleo_loss, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    x = rng.leaf(rng.integer(4, 40), rng.integer(4, 40), scale=2)
    reference = lightly("loss").KoLeoLoss()
    return Sides(lambda: koleo_loss(x), lambda: reference(x), [x])


@comparison("KoLeo loss", "explicit loop", koleo_loss, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    x = rng.leaf(rng.integer(4, 9), rng.integer(8, 12), scale=2)

    def expected() -> Tensor:
        rows, total = [unit(row) for row in x], 0.0
        for i, row in enumerate(rows):
            distances = [(row - other + 1e-8).square().sum().sqrt() for j, other in enumerate(rows) if j != i]
            total = total - (min(distances, key=Tensor.item) + 1e-8).log() / len(rows)
        return total

    return Sides(lambda: koleo_loss(x), expected, [x])


@comparison("Sinkhorn-Knopp", "lightly", sinkhorn_knopp, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    logits = rng.normal(rng.integer(2, 30), rng.integer(3, 30))
    t, iterations = rng.number(0.07, 0.5), rng.integer(1, 5)
    reference = lightly("loss.swav_loss").sinkhorn
    return Sides(lambda: sinkhorn_knopp(logits, t, iterations), lambda: reference(logits, iterations, t))


@comparison("Sinkhorn-Knopp", "explicit loop", sinkhorn_knopp, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    n, k, t, iterations = rng.integer(2, 7), rng.integer(3, 7), rng.number(0.07, 0.5), rng.integer(1, 5)
    logits = rng.normal(n, k)

    def expected() -> Tensor:
        q = [[(x / t).exp() for x in row] for row in logits.double()]
        for _ in range(iterations):
            columns = [sum(row[j] for row in q) for j in range(k)]
            q = [[x / column for x, column in zip(row, columns)] for row in q]
            q = [[x / sum(row) for x in row] for row in q]
        return torch.tensor(q)

    return Sides(lambda: sinkhorn_knopp(logits, t, iterations), expected)


@comparison("Gram loss, three ways to treat negative similarities", "explicit loop", gram_loss, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """The anchor is a linear function of the student, so that a gradient through it would show; there must be none."""
    b, n, normalize = rng.integer(1, 3), rng.integer(3, 6), rng.choice(True, False)
    student = rng.leaf(b, n, rng.integer(3, 9))
    mix, modes = rng.normal(student.shape[-1], rng.integer(3, 9)), ("keep", "drop", "drop anchor's")

    def expected() -> list[Tensor]:
        totals = dict.fromkeys(modes, 0.0)
        for xs, ys in zip(student, (student @ mix).detach()):
            if normalize:
                xs, ys = [unit(x) for x in xs], [unit(y) for y in ys]
            for i in range(n):
                for j in range(n):
                    a, c = xs[i] @ xs[j], ys[i] @ ys[j]
                    for mode in modes:
                        similarity = a * (a > 0) if mode == "drop" else a
                        target = c if mode == "keep" else c * (c > 0)
                        totals[mode] = totals[mode] + (similarity - target) ** 2 / (b * n * n)
        return list(totals.values())

    return Sides(lambda: [gram_loss(student, student @ mix, mode, normalize) for mode in modes], expected, [student])
