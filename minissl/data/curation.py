"""Fewer images, and better ones: from a pool as one finds it to a set as one would choose it.

Oquab et al., DINOv2, 2023 (arXiv:2304.07193), section 3: near-copies are removed, and images are retrieved that are
like those of a small chosen set; Vo et al., Automatic Data Curation for Self-Supervised Learning, 2024
(arXiv:2405.15613): what is rare gets as many places as what is common, by clusters. All that is needed of an image is a
vector, of any network; labels are not.

Shapes: N images of the pool, D numbers each; S images of the chosen set.
"""

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

BLOCK = 2048  # images compared with all at a time


def thumbnails(images: Tensor, side: int = 8) -> Tensor:
    """Vectors that a copy keeps, a mirrored one too: small thumbnails, less the mean of each colour, of length one.

    They need no encoder. One that sees through crops finds more copies, if its threshold is chosen with care: below it
    the chains of its copies run through pictures that only show the same kind of thing.

    Args:
        images: (N, 3, H, W) uint8.
        side: pixels a side that are left.

    Returns:
        (N, 2 * 3 * side * side): what a thumbnail and its mirror image have in common, and how much they differ.
    """
    small = F.interpolate(images.float() / 255, (side, side), mode="bicubic", antialias=True)
    small = F.normalize((small - small.mean(dim=(2, 3), keepdim=True)).flatten(1), dim=-1).view_as(small)
    mirrored = small.flip(-1)
    return torch.cat([(small + mirrored).flatten(1), (small - mirrored).abs().flatten(1)], dim=-1)


def nearest(features: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each of (N, D) the cosines with its k nearest among `others` (S, D), and their numbers, both (N, k)."""
    features, others = F.normalize(features, dim=-1), F.normalize(others, dim=-1)
    found = [(part @ others.mT).topk(k) for part in features.split(BLOCK)]
    return tuple(torch.cat(parts) for parts in zip(*found))


def copies(features: Tensor, threshold: float, k: int = 16) -> Tensor:
    """For each image the first of those it is a near-copy of, directly or by way of others; itself if of none.

    Args:
        features: (N, D), of a network that knows a copy from another picture of the same thing.
        threshold: cosine from which on two are copies; 0.6 in the paper, for features made for this.
        k: neighbours that are looked at; 64 in the paper.

    Returns:
        (N,) int64; an image is kept by it if it stands for itself: `copies(...) == arange(N)`.
    """
    cosines, neighbors = nearest(features, features, min(k, len(features)))
    first = torch.arange(len(features), device=features.device)
    rows, places = (cosines >= threshold).nonzero(as_tuple=True)
    ends = neighbors[rows, places]
    while True:  # every image takes the smallest number in its company, until none changes
        new = first.scatter_reduce(0, rows, first[ends], "amin").scatter_reduce(0, ends, first[rows], "amin")
        new = torch.minimum(new, new[new])
        if bool((new == first).all()):
            return first
        first = new


def clusters(features: Tensor, k: int, seed: int = 0) -> Tensor:
    """Numbers (N,) of k clusters of directions (N, D), by k-means."""
    means = KMeans(k, n_init=1, random_state=seed)
    return torch.from_numpy(means.fit_predict(F.normalize(features, dim=-1).cpu().numpy())).long()


def balanced(groups: Tensor, n: int, seed: int = 0) -> Tensor:
    """Rows (n,) of N images, drawn so that every group has as many as it can give: the smallest give all.

    Args:
        groups: (N,) int64, as `clusters` gives them.
        n: how many, at most N.
        seed: of the draw.
    """
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    turn = torch.empty_like(order)
    for group in groups.unique():  # each group lines up: its first ones come before all others' second ones
        rows = order[groups[order] == group]
        turn[rows] = torch.arange(len(rows))
    return order[turn[order].argsort(stable=True)[:n]]


def retrieved(features: Tensor, chosen: Tensor, n: int) -> Tensor:
    """Rows (n,) of the pool that are like the chosen set: every chosen image's nearest, then every one's second.

    Args:
        features: (N, D) of the pool.
        chosen: (S, D) of the chosen set.
        n: how many, at most N.
    """
    for k in (-(-2 * n // len(chosen)), len(features)):  # several may find the same, so twice as many as needed
        _, found = nearest(chosen, features, min(k, len(features)))
        rows = found.mT.flatten()  # all first ones, then all second ones
        places = torch.full((len(features),), len(rows), device=rows.device)
        places = places.scatter_reduce(0, rows, torch.arange(len(rows), device=rows.device), "amin")
        if int((places < len(rows)).sum()) >= n:
            break
    return places.argsort(stable=True)[:n]
