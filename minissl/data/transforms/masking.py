"""Masks of patches for masked image modeling: uniformly random, or blocks.

Random masks are those of He et al., MAE, 2021 (arXiv:2111.06377). Block masks are those of Bao et al., BEiT, 2021
(arXiv:2106.08254), algorithm 1, as DINOv2 (Oquab et al., 2023, arXiv:2304.07193) uses them. Block masks are sampled on
the CPU from Python's random numbers, so that the number of masked patches is known without waiting for a GPU.

Shapes: n masks of a grid (h, w) of N = hw patches, M masked patches in all.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minissl.data.transforms.functional import rand
from minissl.distributed import rank, world_size

MAX_FAILED_BLOCKS = 10  # in a row; then a mask stays as it is
MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3  # of a block's height to its width


def random_masking(n: int, patches: int, ratio: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sample n masks that each mask all but int(N (1 - ratio)) patches, uniformly at random.

    Args:
        n: number of masks.
        patches: N.
        ratio: fraction of the patches to mask, 0 to 1.
        like: a tensor on the device of the result.

    Returns:
        Indices of the visible patches (n, int(N (1 - ratio))) int64, and masks (n, N) bool, True where masked.
    """
    order = rand(n, patches, device=like.device).argsort(dim=1)
    visible = order[:, : int(patches * (1 - ratio))]
    return visible, torch.ones_like(order, dtype=torch.bool).scatter(1, visible, False)


def block_masks(
    n: int,
    grid: tuple[int, int],
    ratio: float | tuple[float, float],
    generator: torch.Generator | random.Random | None = None,
) -> Tensor:
    """Sample masks of random rectangular blocks, which mask about the given fraction of the patches.

    A mask may have up to three masked patches less than `ratio` asks for.

    Args:
        n: number of masks.
        grid: (h, w) patches.
        ratio: fraction of the patches to mask, 0 to 1. For (low, high), the fractions of the n masks are spread evenly.
        generator: source of the random numbers; None is torch's default generator.

    Returns:
        bool (n, h, w), True where masked.
    """
    if not isinstance(generator, random.Random):
        generator = random.Random(int(torch.randint(2**62, (), generator=generator)))
    return torch.tensor(_sample_blocks(n, grid, ratio, generator))


def sample_block_masks(
    n: int,
    grid: tuple[int, int],
    masked_fraction: float,
    ratio: float | tuple[float, float],
    rng: random.Random,
    views: int = 1,
) -> tuple[Tensor, Tensor]:
    """Sample block masks for a random subset of the crops; the other crops stay unmasked.

    With several processes, int(n masked_fraction) counts over the crops of all processes.

    Args:
        n: number of crops of this process.
        grid: (h, w) patches.
        masked_fraction: fraction of the crops that are masked; their number is exactly int(n masked_fraction).
        ratio: as for `block_masks`.
        rng: source of the random numbers, in the same state in all processes.
        views: crops of each image, stored view by view.

    Returns:
        Masks (n, h, w) bool, and the indices (M,) int64 of the masked patches among all n h w, in order.
    """
    masks = np.zeros((n * world_size(), *grid), dtype=bool)
    count = int(len(masks) * masked_fraction)
    masks[rng.sample(range(len(masks)), count)] = _sample_blocks(count, grid, ratio, rng)
    masks = masks.reshape(views, world_size(), -1, *grid)[:, rank()].reshape(n, *grid)  # this process's images
    return torch.tensor(masks), torch.tensor(np.flatnonzero(masks))


def _sample_blocks(n: int, grid: tuple[int, int], ratio: float | Sequence[float], rng: random.Random) -> np.ndarray:
    low, high = ratio if isinstance(ratio, Sequence) else (ratio, ratio)
    masks = np.zeros((n, *grid), dtype=bool)
    for i, mask in enumerate(masks):
        _add_blocks(mask, int(mask.size * (low + (high - low) * (i + rng.random()) / n)), rng)
    return masks


def _add_blocks(mask: np.ndarray, target: int, rng: random.Random) -> None:
    """Add random blocks to a mask, in place, until `target` patches are masked or no further block fits."""
    (h, w), failed = mask.shape, 0
    while failed < MAX_FAILED_BLOCKS and (left := target - mask.sum()) > 0:
        most = min(left, h // 2 * w)
        area, aspect = rng.uniform(MIN_BLOCK_PATCHES, most), MIN_ASPECT ** rng.uniform(-1, 1)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failed += 1
        if height < h and width < w:
            top, begin = rng.randint(0, h - height), rng.randint(0, w - width)
            block = mask[top : top + height, begin : begin + width]
            if 0 < block.size - block.sum() <= most:
                block[:], failed = True, 0
