"""Data curation without labels: deduplication, retrieval and balanced sampling of a pool of images.

Oquab et al., DINOv2, 2023 (arXiv:2304.07193), section 3: near-duplicates are removed, and images similar to those of a
small curated set are retrieved. Vo et al., Automatic Data Curation for Self-Supervised Learning, 2024
(arXiv:2405.15613): clusters are sampled evenly, so that rare content is as frequent as common content. Every function
takes one feature per image, of any network.

Shapes: N images of the pool with features of D dimensions; S images of the curated set.
"""

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

CHUNK = 2048  # images compared with all others at a time


def thumbnail_descriptors(images: Tensor, side: int = 8) -> Tensor:
    """Compute descriptors that are similar for near-duplicates, flipped ones included, without an encoder.

    A descriptor is a small thumbnail, minus the mean of each color channel, normalized to length 1. Features of an
    encoder that is invariant to crops find more duplicates. They need a higher threshold: below it, chains of
    duplicates connect images that only share a class.

    Args:
        images: (N, 3, H, W) uint8.
        side: pixels per side of a thumbnail.

    Returns:
        (N, 2 * 3 * side * side) float32: the sum of a thumbnail and its mirror image, and their absolute difference.
    """
    small = F.interpolate(images.float() / 255, (side, side), mode="bicubic", antialias=True)
    small = F.normalize((small - small.mean(dim=(2, 3), keepdim=True)).flatten(1), dim=-1).view_as(small)
    mirrored = small.flip(-1)
    return torch.cat([(small + mirrored).flatten(1), (small - mirrored).abs().flatten(1)], dim=-1)


def nearest_neighbors(features: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosine similarities and indices, both (N, k), of the k nearest of `others` (S, D) to each of (N, D)."""
    features, others = F.normalize(features, dim=-1), F.normalize(others, dim=-1)
    similarities, indices = zip(*((part @ others.mT).topk(k) for part in features.split(CHUNK)))
    return torch.cat(similarities), torch.cat(indices)


def find_near_duplicates(features: Tensor, threshold: float, k: int = 16) -> Tensor:
    """Return for each image the first of its connected component of near-duplicates; itself if it has none.

    Args:
        features: (N, D), which distinguish a duplicate from another image of the same class.
        threshold: cosine similarity from which on two images are duplicates; 0.6 in the paper, for features trained for
            copy detection.
        k: neighbors that are compared; 64 in the paper.

    Returns:
        (N,) int64. Deduplication keeps the images with `find_near_duplicates(...) == arange(N)`.
    """
    similarities, neighbors = nearest_neighbors(features, features, min(k, len(features)))
    first = torch.arange(len(features), device=features.device)
    indices, ranks = (similarities >= threshold).nonzero(as_tuple=True)
    ends = neighbors[indices, ranks]
    while True:  # each image takes the smallest index of its neighbors, until none changes
        new = first.scatter_reduce(0, indices, first[ends], "amin").scatter_reduce(0, ends, first[indices], "amin")
        new = torch.minimum(new, new[new])
        if bool((new == first).all()):
            return first
        first = new


def cluster(features: Tensor, k: int, seed: int = 0) -> Tensor:
    """Assign normalized features (N, D) to k clusters (N,) int64, by k-means."""
    kmeans = KMeans(k, n_init=1, random_state=seed)
    return torch.from_numpy(kmeans.fit_predict(F.normalize(features, dim=-1).cpu().numpy())).long()


def balanced_sample(groups: Tensor, n: int, seed: int = 0) -> Tensor:
    """Sample n images evenly from all groups, without replacement; small groups are taken whole.

    Args:
        groups: (N,) int64, as `cluster` returns them.
        n: number of images, at most N.
        seed: of the random order.

    Returns:
        Indices (n,) int64.
    """
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(order)  # within the group
    for group in groups.unique():
        indices = order[groups[order] == group]
        rank[indices] = torch.arange(len(indices))
    return order[rank[order].argsort(stable=True)[:n]]  # the first of every group, then the second of every group


def retrieve_similar(features: Tensor, curated: Tensor, n: int) -> Tensor:
    """Retrieve n images of a pool: the nearest neighbor of each curated image, then the second of each, and so on.

    Args:
        features: (N, D) of the pool.
        curated: (S, D) of the curated set.
        n: number of images, at most N.

    Returns:
        Indices (n,) int64 of the pool.
    """
    for k in (-(-2 * n // len(curated)), len(features)):  # several may share a neighbor: try twice as many as needed
        _, neighbors = nearest_neighbors(curated, features, min(k, len(features)))
        indices = neighbors.mT.flatten()  # all nearest neighbors, then all second ones
        rank = torch.full((len(features),), len(indices), device=indices.device)
        rank = rank.scatter_reduce(0, indices, torch.arange(len(indices), device=indices.device), "amin")
        if int((rank < len(indices)).sum()) >= n:
            break
    return rank.argsort(stable=True)[:n]
