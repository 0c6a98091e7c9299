"""Which patches a network does not see: some at random, or rectangles.

At random as in He et al., MAE, 2021 (arXiv:2111.06377). Rectangles as in Bao et al., BEiT, 2021 (arXiv:2106.08254),
algorithm 1, as DINOv2 (Oquab et al., 2023, arXiv:2304.07193) uses it; these are drawn on the CPU by Python's numbers,
so that how many patches are hidden is known without asking a GPU.

Shapes: n masks of a grid (h, w).
"""

import math
import random

import numpy as np
import torch
from torch import Tensor

from minissl.parallel import rand, rank, world

ATTEMPTS, LEAST, FLATTEST = 10, 4, 0.3  # at a rectangle; its patches; its height to its width


def hide(n: int, patches: int, ratio: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches of n images stay, (n, int(N (1 - ratio))) places, and the mask (n, N), True where one is hidden."""
    order = rand(n, patches, device=like.device).argsort(dim=1)
    kept = order[:, : int(patches * (1 - ratio))]
    return kept, torch.ones_like(order, dtype=torch.bool).scatter(1, kept, False)


def block_masks(
    n: int,
    grid: tuple[int, int],
    ratio: float | tuple[float, float],
    generator: torch.Generator | random.Random | None = None,
) -> Tensor:
    """Masks of rectangles, until about the share asked for is hidden; up to three patches may lack.

    Args:
        n: masks.
        grid: (h, w) patches.
        ratio: the share of the patches to hide, 0 to 1; of (low, high) the masks get shares evenly from low to high.
        generator: of the chances; torch's own if None.

    Returns:
        bool (n, h, w), True where hidden.
    """
    if not isinstance(generator, random.Random):
        generator = random.Random(int(torch.randint(2**62, (), generator=generator)))
    return torch.tensor(_blocks(n, grid, ratio, generator))


def hide_in_some(
    n: int,
    grid: tuple[int, int],
    share: float,
    ratio: float | tuple[float, float],
    chance: random.Random,
    views: int = 1,
) -> tuple[Tensor, Tensor]:
    """Masks (n, h, w) of which exactly int(n share) hide anything, and where they are True, in order, (M,) int64.

    With several processes that is true of the masks of all, of `views` crops of each image, stored view by view.
    """
    masks = np.zeros((n * world(), *grid), dtype=bool)
    count = int(len(masks) * share)
    masks[chance.sample(range(len(masks)), count)] = _blocks(count, grid, ratio, chance)
    masks = masks.reshape(views, world(), -1, *grid)[:, rank()].reshape(n, *grid)  # ours
    return torch.tensor(masks), torch.tensor(np.flatnonzero(masks))


def _blocks(n: int, grid: tuple[int, int], ratio: float | tuple[float, float], chance: random.Random) -> np.ndarray:
    low, high = ratio if isinstance(ratio, (tuple, list)) else (ratio, ratio)
    masks = np.zeros((n, *grid), dtype=bool)
    for i, mask in enumerate(masks):
        _hide(mask, int(mask.size * (low + (high - low) * (i + chance.random()) / n)), chance)
    return masks


def _hide(mask: np.ndarray, target: int, chance: random.Random) -> None:
    """Hide rectangles in a mask until `target` patches are hidden, or ATTEMPTS in a row do not fit."""
    (h, w), failed = mask.shape, 0
    while failed < ATTEMPTS and (left := target - mask.sum()) > 0:
        most = min(left, h // 2 * w)
        area, aspect = chance.uniform(LEAST, most), FLATTEST ** chance.uniform(-1, 1)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failed += 1
        if height < h and width < w:
            top, begin = chance.randint(0, h - height), chance.randint(0, w - width)
            block = mask[top : top + height, begin : begin + width]
            if 0 < block.size - block.sum() <= most:
                block[:], failed = True, 0
