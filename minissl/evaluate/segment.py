"""What does a patch show? Segmentation and correspondences from frozen patches.

Oquab et al., DINOv2, 2023 (arXiv:2304.07193), section 7.4: a linear layer on patches, measured by the mean intersection
over union. Shapes: N known and M asked images, a grid (h, w) of vectors of D numbers, masks of H x W pixels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.evaluate.classify import knn, linear_probe

IGNORED = -1  # in a mask: of this pixel nothing is asked


def at_patches(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """What a mask (N, H, W) shows at the middle of each patch, (N, h, w)."""
    (height, width), (h, w) = masks.shape[-2:], grid
    rows, columns = ((2 * torch.arange(n) + 1) * size // (2 * n) for n, size in ((h, height), (w, width)))
    return masks[:, rows[:, None], columns]


def segment(known: Tensor, masks: Tensor, asked: Tensor, way: str = "linear", most: int = 20_000) -> Tensor:
    """A class for every patch of the asked images.

    Args:
        known: (N, h, w, D) of images whose masks are known.
        masks: (N, H, W) int64 classes, IGNORED where nothing is asked.
        asked: (M, h, w, D).
        way: "linear", a classifier on the patches, or "knn", their 20 nearest neighbours.
        most: known patches that are used; of more, so many, evenly spaced.

    Returns:
        (M, h, w) int64.
    """
    truth = at_patches(masks, known.shape[1:3]).flatten().to(known.device)
    rows = (truth != IGNORED).nonzero()[:, 0]
    rows = rows[torch.arange(min(most, len(rows))) * len(rows) // min(most, len(rows))]  # evenly spaced
    x, labels = known.flatten(0, 2)[rows], truth[rows]
    strength = min(1.0, 200 / len(x))  # patches are many and much alike: the penalty grows with their number
    ask = {"linear": partial(linear_probe, strength=strength), "knn": knn}[way]
    return ask(x, labels, asked.flatten(0, 2)).unflatten(0, asked.shape[:3])


def mean_iou(found: Tensor, masks: Tensor) -> float:
    """Intersection over union of each class that is in the masks, over all images together; the mean of them.

    Args:
        found: (M, h, w) classes; each stands for its part of the image.
        masks: (M, H, W) int64, IGNORED where nothing is asked.
    """
    found = F.interpolate(found[:, None].double(), masks.shape[-2:], mode="nearest")[:, 0].long()
    found, masks = found[masks != IGNORED], masks[masks != IGNORED]
    n = int(torch.maximum(found.max(), masks.max())) + 1
    both = torch.bincount(masks * n + found, minlength=n * n).view(n, n)  # how often (truth, found)
    hit, true, said = both.diag(), both.sum(dim=1), both.sum(dim=0)
    return float((hit / (true + said - hit))[true > 0].mean())


def mutual(a: Tensor, b: Tensor) -> Tensor:
    """Patches that are each other's nearest: (M, 2) int64, their numbers in `a` (N, D) and `b` (N, D), best first."""
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT  # (N, N)
    there, back = cosines.argmax(dim=1), cosines.argmax(dim=0)
    own = torch.arange(len(a), device=a.device)
    order = cosines[own, there].argsort(descending=True)
    return torch.stack([own, there], dim=1)[order[back[there[order]] == order]]


def correspondence(a: Tensor, b: Tensor, parts_a: Tensor, parts_b: Tensor) -> float:
    """Of two images of one kind of thing: how often a patch's nearest patch in the other shows the same part.

    Args:
        a, b: (P, h, w, D), P pairs.
        parts_a, parts_b: (P, H, W), the part's number, 0 where the thing is not.

    Returns:
        The share, 0 to 1, of the patches of `a` on parts that are in `b` too.
    """
    grid = a.shape[1:3]
    a, b = (F.normalize(x.flatten(1, 2), dim=-1) for x in (a, b))  # (P, N, D)
    parts_a, parts_b = (at_patches(parts, grid).flatten(1).to(a.device) for parts in (parts_a, parts_b))  # (P, N)
    found = parts_b.gather(1, (a @ b.mT).argmax(dim=-1))  # (P, N)
    there = (parts_a[:, :, None] == parts_b[:, None, :]).any(dim=-1) & (parts_a > 0)
    return float((found == parts_a)[there].float().mean())


def name_patches(patches: Tensor, texts: Tensor) -> Tensor:
    """Which of some texts (T, E) is each patch (B, h, w, E) nearest to? Its number, (B, h, w)."""
    return (F.normalize(patches, dim=-1) @ F.normalize(texts, dim=-1).mT).argmax(dim=-1)
