"""Where a patch is: vectors that are learned for one grid, and rotations that hold for any.

Learned positions as in DINO and DINOv2 (Caron et al., 2021, arXiv:2104.14294; Oquab et al., 2023, arXiv:2304.07193).
Rotary ones are from Su et al., RoFormer, 2021 (arXiv:2104.09864), in the form of DINOv3 (Siméoni et al., 2025,
arXiv:2508.10104): queries and keys are turned by angles of their patch, so that what two patches say to each other
depends on how far apart they are, as a share of the image.

Shapes: a grid (h, w) of N = hw patches, width D, heads of d = D / heads numbers, d a multiple of 4.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 100.0  # periods run from 1 to this, of an image that is 2 wide


class Stretch(NamedTuple):
    """How far the coordinates of a whole batch are moved and scaled while training, so that no scale is special."""

    shift: float = 0.0  # each axis is moved by up to this
    jitter: float = 1.0  # each axis is scaled by its own factor, from 1 / this to this
    rescale: float = 1.0  # both axes by one factor; 2 in the released models


class Turn(NamedTuple):
    """Angles of N patches, each (N, d)."""

    sin: Tensor
    cos: Tensor


def resample(positions: Tensor, h: int, w: int, antialias: bool) -> Tensor:
    """Learned positions (1, 1 + side * side, D), the class token's first, for another grid: (1, 1 + hw, D)."""
    side = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    if antialias:  # DINOv2's models with registers were trained so
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)  # (1, D, h, w)
    else:  # DINO hands the scale, not the size, to the interpolation, and adds 0.1 so that it rounds down.
        scale = ((h + 0.1) / side, (w + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")  # (1, D, h, w)
    return torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)


def coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """The middles of the patches, (N, 2), rows first, each axis from -1 to 1 whatever its length."""
    axes = [(torch.arange(n, device=device) + 0.5) * 2 / n - 1 for n in grid]
    return torch.cartesian_prod(*axes)


def stretch(points: Tensor, by: Stretch) -> Tensor:
    """Coordinates (N, 2), moved and scaled by one draw for all of them."""

    def factor(n: int, most: float) -> Tensor:
        return torch.exp((2 * torch.rand(n, device=points.device) - 1) * math.log(most))

    if by.shift:
        points = points + (2 * torch.rand(2, device=points.device) - 1) * by.shift
    if by.jitter != 1:
        points = points * factor(2, by.jitter)
    return points * factor(1, by.rescale) if by.rescale != 1 else points


def turn(points: Tensor, d: int, base: float = BASE) -> Turn:
    """The angles of patches at some coordinates (N, 2): 2 pi x / period, of d / 4 periods along either axis."""
    periods = base ** (torch.arange(d // 4, device=points.device) * 4 / d)  # (d / 4,)
    angles = 2 * math.pi * points[:, :, None] / periods  # (N, 2, d / 4)
    angles = angles.flatten(1).repeat(1, 2)  # (N, d): rows, columns, and both again
    return Turn(angles.sin(), angles.cos())


def rotate(x: Tensor, by: Turn) -> Tensor:
    """Queries or keys (B, heads, T, d), turned; the first T - N, which are nowhere in the image, stay as they are."""
    n = len(by.sin)
    first, patches = x[..., : x.shape[-2] - n, :], x[..., x.shape[-2] - n :, :]
    left, right = patches.chunk(2, dim=-1)
    turned = patches * by.cos + torch.cat([-right, left], dim=-1) * by.sin
    return torch.cat([first, turned.to(x.dtype)], dim=-2)
