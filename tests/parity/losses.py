"""Losses, and what makes their targets, beside lightly, open_clip and loops that follow the papers' formulas."""

import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.balance import koleo, sinkhorn_knopp
from minissl.methods.clip import clip_loss, equally_true
from minissl.methods.dino import center_and_sharpen, cross_view_entropy, update_center
from minissl.methods.dinov2 import masked_patch_entropy
from minissl.methods.dinov3 import gram_loss
from minissl.methods.simclr import nt_xent
from tests.parity.ledger import Draw, Sides, compared

SHARP = (0.0625, 0.125, 0.1875)  # temperatures of a teacher, as exact in the float32 that lightly keeps them in


def lightly(module: str) -> ModuleType:
    """A part of lightly; the deprecations of what it imports are not ours to hear."""
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"lightly.{module}")


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def log_share(scores: list[Tensor], own: int) -> Tensor:
    """The logarithm of one score's share of the softmax over a list of them."""
    most = max(s.item() for s in scores)
    return scores[own] - most - sum((s - most).exp() for s in scores).log()


def entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """-sum q log p of two vectors (K,)."""
    scores = list(logits / temperature)
    return -sum(q * log_share(scores, k) for k, q in enumerate(target))


@compared("NT-Xent", "lightly", nt_xent, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, p, t = draw.whole(2, 24), draw.whole(3, 40), draw.real(0.07, 1.0)
    views = [draw.free(b, p, scale=3) for _ in range(2)]
    theirs = lightly("loss").NTXentLoss(temperature=t)
    return Sides(lambda: nt_xent(*views, t), lambda: theirs(*views), views)


@compared("NT-Xent", "a loop", nt_xent, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, p, t = draw.whole(2, 6), draw.whole(3, 9), draw.real(0.07, 1.0)
    views = [draw.free(b, p, scale=3) for _ in range(2)]

    def theirs() -> Tensor:
        z, total = [unit(row) for view in views for row in view], 0.0
        for i in range(2 * b):
            others = [j for j in range(2 * b) if j != i]
            total = total - log_share([z[i] @ z[j] / t for j in others], others.index((i + b) % (2 * b)))
        return total / (2 * b)

    return Sides(lambda: nt_xent(*views, t), theirs, views)


@compared("CLIP's loss", "open_clip", clip_loss, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    from open_clip.loss import ClipLoss

    b, e = draw.whole(2, 40), draw.whole(3, 40)
    image, text, scale = draw.free(b, e, scale=3), draw.free(b, e, scale=2), draw.uniform(low=1, high=30)
    scale.requires_grad_()

    def theirs() -> Tensor:
        return ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)

    return Sides(lambda: clip_loss(image, text, scale), theirs, [image, text, scale])


@compared("CLIP's loss, equal captions left out", "a loop", clip_loss, equally_true, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, e, scale = draw.whole(3, 7), draw.whole(3, 9), draw.real(1, 20)
    image, text = draw.free(b, e), draw.free(b, e)
    captions = [(draw.one_of("a cat", "a dog"), draw.one_of("red", "blue")) for _ in range(b - 1)] + [("a bird",)]

    def theirs() -> Tensor:
        total = 0.0
        for ours, others in ((image, text), (text, image)):
            for i in range(b):
                asked = [j for j in range(b) if j == i or captions[j] != captions[i]]
                scores = [scale * (unit(ours[i]) @ unit(others[j])) for j in asked]
                total = total - log_share(scores, asked.index(i)) / (2 * b)
        return total

    return Sides(lambda: clip_loss(image, text, scale, equally_true(captions)), theirs, [image, text])


@compared("DINO's loss, centred", "lightly", cross_view_entropy, center_and_sharpen, update_center, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Two steps: the second is of the centre that the first one moved."""
    b, k, v = draw.whole(2, 9), draw.whole(4, 40), draw.whole(2, 7)
    t, sharp, momentum = draw.real(0.1, 0.5), draw.one_of(*SHARP), draw.real(0.5, 0.99)
    student, teacher = draw.free(v, b, k), draw.normal(2, 2, b, k)
    options = {"warmup_teacher_temp": sharp, "teacher_temp": sharp, "warmup_teacher_temp_epochs": 1}
    theirs = lightly("loss").DINOLoss(k, student_temp=t, center_momentum=momentum, **options).to(draw.dtype)

    def ours() -> list[Tensor]:
        center, losses = torch.zeros(1, k, dtype=draw.dtype), []
        for logits in teacher:
            losses.append(cross_view_entropy(student, center_and_sharpen(logits, center, sharp), t))
            center = update_center(center, logits, momentum)
        return losses

    return Sides(ours, lambda: [theirs(list(logits), list(student), epoch=0) for logits in teacher], [student])


@compared("DINO's loss, small crops by weight", "a loop", cross_view_entropy, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, k, g = draw.whole(1, 3), draw.whole(3, 8), draw.whole(1, 3)
    v, t, weight = draw.whole(g + 1, 5), draw.real(0.1, 1.0), draw.real(0.2, 1.0)
    student, target = draw.free(v, b, k), draw.normal(g, b, k).softmax(-1)

    def theirs() -> Tensor:
        pairs = [(i, j) for i in range(g) for j in range(v) if i != j]
        terms = [entropy(target[i, n], student[j, n], t) * (1 if j < g else weight) for i, j in pairs for n in range(b)]
        return sum(terms) / b / len(pairs)

    return Sides(lambda: cross_view_entropy(student, target, t, weight), theirs, [student])


@compared("iBOT's loss of hidden patches", "lightly", masked_patch_entropy, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, n, k = draw.whole(2, 8), draw.whole(2, 16), draw.whole(3, 40)
    t, sharp, mask = draw.real(0.1, 0.5), draw.one_of(*SHARP), draw.mask(b, n, share=0.4)
    mask[0], mask[1, 0] = False, True
    m = int(mask.sum())
    student, teacher = draw.free(m, k), draw.normal(m, k)
    theirs = lightly("loss").IBOTPatchLoss(k, teacher_temp=sharp, student_temp=t).to(draw.dtype)

    def ours() -> Tensor:
        return masked_patch_entropy(student, (teacher / sharp).softmax(-1), mask, t)

    return Sides(ours, lambda: theirs(teacher, student, mask[:, None]), [student])


@compared("iBOT's loss of hidden patches", "a loop", masked_patch_entropy, fp64=1e-6, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Ours, as lightly's, weighs the crops in float32 in any precision."""
    b, n, k, t = draw.whole(2, 4), draw.whole(2, 6), draw.whole(3, 7), draw.real(0.1, 1.0)
    mask = draw.mask(b, n)
    mask[0], mask[1, 0] = False, True
    student, target = (draw.free(int(mask.sum()), k), draw.normal(int(mask.sum()), k).softmax(-1))

    def theirs() -> Tensor:
        total, row = 0.0, 0
        for crop in mask.tolist():
            for hidden in crop:
                if hidden:
                    total = total + entropy(target[row], student[row], t) / sum(crop) / b
                    row += 1
        return total

    return Sides(lambda: masked_patch_entropy(student, target, mask, t), theirs, [student])


@compared("KoLeo", "lightly", koleo, fp32=1e-5)
def _(draw: Draw) -> Sides:
    x = draw.free(draw.whole(4, 40), draw.whole(4, 40), scale=2)
    theirs = lightly("loss").KoLeoLoss()
    return Sides(lambda: koleo(x), lambda: theirs(x), [x])


@compared("KoLeo", "a loop", koleo, fp32=1e-5)
def _(draw: Draw) -> Sides:
    x = draw.free(draw.whole(4, 9), draw.whole(8, 12), scale=2)

    def theirs() -> Tensor:
        rows, total = [unit(row) for row in x], 0.0
        for i, row in enumerate(rows):
            away = [(row - other + 1e-8).square().sum().sqrt() for j, other in enumerate(rows) if j != i]
            total = total - (min(away, key=Tensor.item) + 1e-8).log() / len(rows)
        return total

    return Sides(lambda: koleo(x), theirs, [x])


@compared("Sinkhorn-Knopp", "lightly", sinkhorn_knopp, fp32=1e-5)
def _(draw: Draw) -> Sides:
    logits = draw.normal(draw.whole(2, 30), draw.whole(3, 30))
    t, rounds = draw.real(0.07, 0.5), draw.whole(1, 5)
    theirs = lightly("loss.swav_loss").sinkhorn
    return Sides(lambda: sinkhorn_knopp(logits, t, rounds), lambda: theirs(logits, rounds, t))


@compared("Sinkhorn-Knopp", "a loop", sinkhorn_knopp, fp32=1e-5)
def _(draw: Draw) -> Sides:
    n, k, t, rounds = draw.whole(2, 7), draw.whole(3, 7), draw.real(0.07, 0.5), draw.whole(1, 5)
    logits = draw.normal(n, k)

    def theirs() -> Tensor:
        q = [[(x / t).exp() for x in row] for row in logits.double()]
        for _ in range(rounds):
            columns = [sum(row[j] for row in q) for j in range(k)]
            q = [[x / column for x, column in zip(row, columns)] for row in q]
            q = [[x / sum(row) for x in row] for row in q]
        return torch.tensor(q)

    return Sides(lambda: sinkhorn_knopp(logits, t, rounds), theirs)


@compared("Gram loss, its three ways with negatives", "a loop", gram_loss, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """The anchor is the student, mixed, so that a gradient through it would be seen; there is none."""
    b, n, normalize = draw.whole(1, 3), draw.whole(3, 6), draw.one_of(True, False)
    student = draw.free(b, n, draw.whole(3, 9))
    mix, ways = draw.normal(student.shape[-1], draw.whole(3, 9)), ("keep", "drop", "drop anchor's")

    def theirs() -> list[Tensor]:
        totals = dict.fromkeys(ways, 0.0)
        for xs, ys in zip(student, (student @ mix).detach()):
            if normalize:
                xs, ys = [unit(x) for x in xs], [unit(y) for y in ys]
            for i in range(n):
                for j in range(n):
                    a, c = xs[i] @ xs[j], ys[i] @ ys[j]
                    for way in ways:
                        ours = a * (a > 0) if way == "drop" else a
                        held = c if way == "keep" else c * (c > 0)
                        totals[way] = totals[way] + (ours - held) ** 2 / (b * n * n)
        return list(totals.values())

    return Sides(lambda: [gram_loss(student, student @ mix, way, normalize) for way in ways], theirs, [student])
