"""Evaluation of patches in clips: label propagation, patch by patch, and DAVIS's J and F with scipy's dilation."""

import math

import numpy as np
import torch
from torch import Tensor

from minissl import evaluation
from minissl.evaluation.video_metrics import contour_accuracy, mask_boundary, region_similarity
from tests.parity.ledger import RandomInputs, Sides, comparison

Recipe = tuple[int, int, float, str]  # radius, topk, temperature, window


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def propagate_by_loop(current: Tensor, context: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """Average the labels of the most similar patches of the context frames within the window, patch by patch."""
    radius, topk, temperature, window = recipe
    (frames, h, w, _), out = labels.shape, torch.zeros_like(labels[0])
    for y in range(h):
        for x in range(w):
            neighbors = []
            for t in range(frames):
                for i in range(h):
                    for j in range(w):
                        a, b = abs(y - i), abs(x - j)
                        if (a * a + b * b <= radius * radius) if window == "circle" else max(a, b) <= radius:
                            neighbors.append((float(current[y, x] @ context[t, i, j]), labels[t, i, j]))
            best = sorted(neighbors, key=lambda pair: -pair[0])[:topk]
            weights = [math.exp(cosine / temperature) for cosine, _ in best]
            out[y, x] = sum(weight * label for weight, (_, label) in zip(weights, best)) / sum(weights)
    return out


def random_recipe(rng: RandomInputs) -> Recipe:
    return rng.integer(0, 4), rng.integer(1, 6), rng.number(0.1, 1), rng.choice("circle", "square")


@comparison("label propagation to one frame", "explicit loop", evaluation.propagate_frame, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    h, w, k, d, m = rng.integer(1, 6), rng.integer(2, 10), rng.integer(1, 3), rng.integer(3, 6), rng.integer(2, 3)
    current, context, recipe = unit(rng.normal(h, w, d)), unit(rng.normal(k, h, w, d)), random_recipe(rng)
    labels = rng.uniform(k, h, w, m)
    labels = labels / labels.sum(dim=-1, keepdim=True)
    return Sides(
        lambda: evaluation.propagate_frame(current, context, labels, *recipe),
        lambda: propagate_by_loop(current, context, labels, recipe),
    )


@comparison("label propagation through a clip", "explicit loop", evaluation.propagate_labels,
            evaluation.propagate_stream, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    h, w, p = rng.integer(2, 4), rng.integer(2, 5), rng.choice(1, 3)
    frames, context = rng.integer(2, 4), rng.integer(0, 2)
    recipe, features = random_recipe(rng), rng.normal(1, h, w, 4) + rng.normal(frames, h, w, 4, scale=0.3)
    mask = rng.integers(h * p, w * p, below=3)
    mask[0, 0] = 2

    def expected() -> Tensor:
        x, first = unit(features), mask[p // 2 :: p, p // 2 :: p]
        first_frame = [(x[0], torch.stack([first == n for n in mask.unique()], dim=-1).to(x))]
        previous, predictions = [], [mask]
        for current in x[1:]:
            used = first_frame + previous[max(len(previous) - context, 0) :]
            used_features, used_labels = (torch.stack(part) for part in zip(*used))
            labels = propagate_by_loop(current, used_features, used_labels, recipe)
            previous.append((current, labels))
            low, high = labels.amin(dim=(0, 1)), labels.amax(dim=(0, 1))
            best = ((labels - low) / (high - low).clamp_min(1e-12)).argmax(dim=-1)
            predictions.append(mask.unique()[best].repeat_interleave(p, 0).repeat_interleave(p, 1))
        return torch.stack(predictions)

    return Sides(lambda: evaluation.propagate_labels(features, mask, context, *recipe), expected)


def boundary_by_loop(mask: np.ndarray) -> np.ndarray:
    """Mark pixels that differ from the next one to the right, below, or diagonally; nothing lies beyond the border."""
    h, w = mask.shape
    out = np.zeros_like(mask)
    for i in range(h):
        for j in range(w):
            neighbors = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            out[i, j] = any(mask[min(a, h - 1), min(b, w - 1)] != mask[i, j] for a, b in neighbors)
    return out


def j_and_f_by_loop(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Compute region similarity and contour accuracy of two masks."""
    from scipy.ndimage import binary_dilation

    h, w = a.shape
    radius = math.ceil(0.008 * math.sqrt(h * h + w * w))
    i, j = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    boundary_a, boundary_b = boundary_by_loop(a), boundary_by_loop(b)
    near_a, near_b = (binary_dilation(z, i**2 + j**2 <= radius**2) for z in (boundary_a, boundary_b))
    union, intersection = (a | b).sum(), (a & b).sum()
    if not boundary_a.any() or not boundary_b.any():
        return intersection / union if union else 1.0, float(boundary_a.any() == boundary_b.any())
    precision = (boundary_a & near_b).sum() / boundary_a.sum()
    recall = (boundary_b & near_a).sum() / boundary_b.sum()
    return intersection / union, 2 * precision * recall / max(precision + recall, 1e-12)


@comparison("J and F of objects", "scipy", evaluation.j_and_f, region_similarity, contour_accuracy, mask_boundary,
            fp64=1e-10)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    """Discs that move; the prediction is shifted by some pixels."""
    frames, h, w, shift = rng.integer(3, 5), rng.integer(20, 40), rng.integer(20, 140), rng.integer(0, 4)
    y, x = np.mgrid[:h, :w]
    truth, predicted = np.zeros((2, frames, h, w), dtype=np.int64)
    for number in (1, 2):
        radius, top, left = rng.integer(4, 8), rng.integer(4, h - 4), rng.integer(4, w - 4)
        for t in range(frames):
            truth[t][(y - top) ** 2 + (x - left - t) ** 2 < radius**2] = number
            predicted[t][(y - top) ** 2 + (x - left - t - shift) ** 2 < radius**2] = number
    truth[:, :3, :5] = 255
    truth[:, -1, -1] = 1
    numbers = [n for n in np.unique(truth[0]) if n not in (0, 255)]

    def actual() -> list[float]:
        metrics = evaluation.j_and_f(torch.from_numpy(predicted), torch.from_numpy(truth))
        return [metrics[name] for name in ("J", "F", "J&F")]

    def expected() -> list[float]:
        by_object = []
        for n in numbers:
            masks = [((a == n) & (b != 255), b == n) for a, b in zip(predicted[1:-1], truth[1:-1])]
            by_object.append(np.mean([j_and_f_by_loop(*pair) for pair in masks], axis=0))
        j, f = np.mean(by_object, axis=0)
        return [float(j), float(f), float(j + f) / 2]

    return Sides(actual, expected)


@comparison("temporal coherence of colors", "explicit loop", evaluation.temporal_coherence, fp64=1e-10, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    t, c, h, w, p = rng.integer(2, 5), rng.integer(1, 3), rng.integer(2, 5), rng.integer(2, 5), rng.choice(1, 3)
    colors = rng.normal(1, c, h, w) + rng.normal(t, c, h, w, scale=0.3)
    masks = rng.integers(t, h * p, w * p, below=2)
    masks[:2, p // 2, p // 2] = 1

    def expected() -> float:
        at_centers = masks[:, p // 2 :: p, p // 2 :: p]
        steps = []
        for k in range(t - 1):
            for i in range(h):
                for j in range(w):
                    if at_centers[k, i, j] == at_centers[k + 1, i, j]:
                        steps.append(float(((colors[k + 1, :, i, j] - colors[k, :, i, j]) ** 2).sum()))
        flat = colors.permute(0, 2, 3, 1).flatten(0, 2).double()
        pairs = [float(((a - b) ** 2).sum()) for a in flat for b in flat]
        return 1 - (sum(steps) / len(steps)) / (sum(pairs) / len(pairs))

    return Sides(lambda: evaluation.temporal_coherence(colors, masks), expected)


@comparison("clip segmented by its first frame", "sklearn", evaluation.segment_clip, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """By 20 nearest neighbors; void pixels are no training data."""
    from sklearn.neighbors import KNeighborsClassifier

    h, w, p, frames, d = rng.integer(2, 5), rng.integer(2, 5), rng.choice(1, 3), rng.integer(2, 4), rng.integer(3, 6)
    features, mask = rng.normal(frames, h, w, d), rng.integers(h * p, w * p, below=3)
    centers = slice(p // 2, None, p)
    mask[p // 2, p // 2], mask[p // 2, p + p // 2], mask[p + p // 2, p // 2] = 0, 1, 255

    def expected() -> Tensor:
        labels, x = mask[centers, centers].flatten().numpy(), unit(features).flatten(1, 2).numpy()
        known = labels != 255
        weights = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
        classifier = KNeighborsClassifier(min(20, known.sum()), weights=weights, metric="cosine")
        predictions = classifier.fit(x[0][known], labels[known]).predict(x[1:].reshape(-1, d)).reshape(-1, h, w)
        return torch.cat([mask[None], torch.from_numpy(predictions.repeat(p, 1).repeat(p, 2))])

    return Sides(lambda: evaluation.segment_clip(features, mask), expected)
