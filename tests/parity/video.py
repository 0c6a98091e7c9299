"""What patches are worth in a clip: tracking, patch by patch, and DAVIS's measures with scipy's dilation."""

import math

import numpy as np
import torch
from torch import Tensor

from minissl import evaluate
from minissl.evaluate.video import contour, outline, region
from tests.parity.ledger import Draw, Sides, compared


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def handed_on(now: Tensor, context: Tensor, labels: Tensor, recipe: tuple[int, int, float, str]) -> Tensor:
    """What each patch of a frame shows, by the most similar patches near it in the frames before."""
    radius, topk, temperature, window = recipe
    (frames, h, w, _), out = labels.shape, torch.zeros_like(labels[0])
    for y in range(h):
        for x in range(w):
            seen = []
            for t in range(frames):
                for i in range(h):
                    for j in range(w):
                        a, b = abs(y - i), abs(x - j)
                        if (a * a + b * b <= radius * radius) if window == "circle" else max(a, b) <= radius:
                            seen.append((float(now[y, x] @ context[t, i, j]), labels[t, i, j]))
            best = sorted(seen, key=lambda pair: -pair[0])[:topk]
            powers = [math.exp(cosine / temperature) for cosine, _ in best]
            out[y, x] = sum(power * label for power, (_, label) in zip(powers, best)) / sum(powers)
    return out


def recipe(draw: Draw) -> tuple[int, int, float, str]:
    return draw.whole(0, 4), draw.whole(1, 6), draw.real(0.1, 1), draw.one_of("circle", "square")


@compared("labels handed on to a frame", "a loop", evaluate.propagate, fp32=1e-5)
def _(draw: Draw) -> Sides:
    h, w, k, d, m = draw.whole(1, 6), draw.whole(2, 10), draw.whole(1, 3), draw.whole(3, 6), draw.whole(2, 3)
    current, context, how = unit(draw.normal(h, w, d)), unit(draw.normal(k, h, w, d)), recipe(draw)
    labels = draw.uniform(k, h, w, m)
    labels = labels / labels.sum(dim=-1, keepdim=True)
    return Sides(
        lambda: evaluate.propagate(current, context, labels, *how), lambda: handed_on(current, context, labels, how)
    )


@compared("objects tracked through a clip", "a loop", evaluate.track, evaluate.follow, fp32=1e-5)
def _(draw: Draw) -> Sides:
    h, w, p, frames, context = draw.whole(2, 4), draw.whole(2, 5), draw.one_of(1, 3), draw.whole(2, 4), draw.whole(0, 2)
    how, features = recipe(draw), draw.normal(1, h, w, 4) + draw.normal(frames, h, w, 4, scale=0.3)
    mask = draw.numbers(h * p, w * p, below=3)
    mask[0, 0] = 2

    def theirs() -> Tensor:
        x, first = unit(features), mask[p // 2 :: p, p // 2 :: p]
        known = [(x[0], torch.stack([first == n for n in mask.unique()], dim=-1).to(x))]
        past, found = [], [mask]
        for now in x[1:]:
            asked = known + past[max(len(past) - context, 0) :]
            labels = handed_on(now, torch.stack([v for v, _ in asked]), torch.stack([l for _, l in asked]), how)  # noqa: E741
            past.append((now, labels))
            low, high = labels.amin(dim=(0, 1)), labels.amax(dim=(0, 1))
            best = ((labels - low) / (high - low).clamp_min(1e-12)).argmax(dim=-1)
            found.append(mask.unique()[best].repeat_interleave(p, 0).repeat_interleave(p, 1))
        return torch.stack(found)

    return Sides(lambda: evaluate.track(features, mask, context, *how), theirs)


def edge(mask: np.ndarray) -> np.ndarray:
    """Where the next pixel to the right, below, or both is another; there is none beyond the border."""
    h, w = mask.shape
    out = np.zeros_like(mask)
    for i in range(h):
        for j in range(w):
            others = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            out[i, j] = any(mask[min(a, h - 1), min(b, w - 1)] != mask[i, j] for a, b in others)
    return out


def measures(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The region's and the outline's, of two masks."""
    from scipy.ndimage import binary_dilation

    h, w = a.shape
    reach = math.ceil(0.008 * math.sqrt(h * h + w * w))
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    ours, right = edge(a), edge(b)
    near_ours, near_right = (binary_dilation(z, i**2 + j**2 <= reach**2) for z in (ours, right))
    either, inside = (a | b).sum(), (a & b).sum()
    if not ours.any() or not right.any():
        return inside / either if either else 1.0, float(ours.any() == right.any())
    precision, recall = (ours & near_right).sum() / ours.sum(), (right & near_ours).sum() / right.sum()
    return inside / either, 2 * precision * recall / max(precision + recall, 1e-12)


@compared("regions and outlines of objects", "scipy", evaluate.j_and_f, region, contour, outline, fp64=1e-10)
def _(draw: Draw) -> Sides:
    """Balls that move, found a little beside."""
    frames, h, w, shift = draw.whole(3, 5), draw.whole(20, 40), draw.whole(20, 140), draw.whole(0, 4)
    y, x = np.mgrid[:h, :w]
    truth, found = np.zeros((2, frames, h, w), dtype=np.int64)
    for number in (1, 2):
        radius, top, left = draw.whole(4, 8), draw.whole(4, h - 4), draw.whole(4, w - 4)
        for t in range(frames):
            truth[t][(y - top) ** 2 + (x - left - t) ** 2 < radius**2] = number
            found[t][(y - top) ** 2 + (x - left - t - shift) ** 2 < radius**2] = number
    truth[:, :3, :5] = 255
    truth[:, -1, -1] = 1
    numbers = [n for n in np.unique(truth[0]) if n not in (0, 255)]

    def theirs() -> list[float]:
        each = []
        for n in numbers:
            masks = [((a == n) & (b != 255), b == n) for a, b in zip(found[1:-1], truth[1:-1])]
            each.append(np.mean([measures(*pair) for pair in masks], axis=0))
        j, f = np.mean(each, axis=0)
        return [float(j), float(f), float(j + f) / 2]

    def ours() -> list[float]:
        measured = evaluate.j_and_f(torch.from_numpy(found), torch.from_numpy(truth))
        return [measured[name] for name in ("J", "F", "J&F")]

    return Sides(ours, theirs)


@compared("colours that stay what they are", "a loop", evaluate.coherence, fp64=1e-10, fp32=1e-5)
def _(draw: Draw) -> Sides:
    t, c, h, w, p = draw.whole(2, 5), draw.whole(1, 3), draw.whole(2, 5), draw.whole(2, 5), draw.one_of(1, 3)
    colors, masks = draw.normal(1, c, h, w) + draw.normal(t, c, h, w, scale=0.3), draw.numbers(t, h * p, w * p, below=2)
    masks[:2, p // 2, p // 2] = 1

    def theirs() -> float:
        shown = masks[:, p // 2 :: p, p // 2 :: p]
        steps, pairs = [], []
        for k in range(t - 1):
            for i in range(h):
                for j in range(w):
                    if shown[k, i, j] == shown[k + 1, i, j]:
                        steps.append(float(((colors[k + 1, :, i, j] - colors[k, :, i, j]) ** 2).sum()))
        places = colors.permute(0, 2, 3, 1).flatten(0, 2).double()
        pairs = [float(((a - b) ** 2).sum()) for a in places for b in places]
        return 1 - (sum(steps) / len(steps)) / (sum(pairs) / len(pairs))

    return Sides(lambda: evaluate.coherence(colors, masks), theirs)


@compared("a clip told by its first frame", "sklearn", evaluate.segment_clip, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """By the 20 nearest neighbours; void is not learnt from."""
    from sklearn.neighbors import KNeighborsClassifier

    h, w, p, frames, d = draw.whole(2, 5), draw.whole(2, 5), draw.one_of(1, 3), draw.whole(2, 4), draw.whole(3, 6)
    features, mask, middle = draw.normal(frames, h, w, d), draw.numbers(h * p, w * p, below=3), slice(p // 2, None, p)
    mask[p // 2, p // 2], mask[p // 2, p + p // 2], mask[p + p // 2, p // 2] = 0, 1, 255

    def theirs() -> Tensor:
        truth, x = mask[middle, middle].flatten().numpy(), unit(features).flatten(1, 2).numpy()
        told = truth != 255
        vote = KNeighborsClassifier(min(20, told.sum()), weights=lambda a: np.exp((1 - a) / 0.07), metric="cosine")
        said = vote.fit(x[0][told], truth[told]).predict(x[1:].reshape(-1, d)).reshape(-1, h, w)
        return torch.cat([mask[None], torch.from_numpy(said.repeat(p, 1).repeat(p, 2))])

    return Sides(lambda: evaluate.segment_clip(features, mask), theirs)
