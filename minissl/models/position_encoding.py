"""Position encodings of patches: learned embeddings of one grid, and rotary embeddings (RoPE) that hold for any grid.

Learned embeddings as in DINO and DINOv2 (Caron et al., 2021, arXiv:2104.14294; Oquab et al., 2023, arXiv:2304.07193).
RoPE is from Su et al., RoFormer, 2021 (arXiv:2104.09864), in the form of DINOv3 (Siméoni et al., 2025,
arXiv:2508.10104): queries and keys are rotated by angles that depend on their patch's coordinates, so that attention
logits depend on the relative position of two patches, as a fraction of the image.

Shapes: a grid (h, w) of N = hw patches, width D, d = D / heads channels per head, d a multiple of 4.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROPE_BASE = 100.0  # periods run from 1 to this; the image is 2 wide


class RopeAugmentation(NamedTuple):
    """Ranges of the random shift and scale of coordinates while training, so that no scale is special."""

    shift: float = 0.0  # each axis is shifted by up to this
    jitter: float = 1.0  # each axis is scaled by its own factor, from 1 / jitter to jitter
    rescale: float = 1.0  # both axes are scaled by one factor, from 1 / rescale to rescale; 2 in the released models


class RopeAngles(NamedTuple):
    """Sine and cosine of the rotation angles of N patches, each (N, d)."""

    sin: Tensor
    cos: Tensor


def resample_pos_embed(positions: Tensor, h: int, w: int, antialias: bool) -> Tensor:
    """Interpolate learned position embeddings bicubically to another grid.

    Args:
        positions: (1, 1 + side * side, D), that of the class token first, which is kept.
        h: rows of the new grid.
        w: columns of the new grid.
        antialias: interpolate to the size with antialiasing, as DINOv2's models with registers; without, as DINO.

    Returns:
        (1, 1 + hw, D).
    """
    side = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    if antialias:
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)  # (1, D, h, w)
    else:  # DINO passes the scale, not the size, to the interpolation, and adds 0.1 so that it rounds down
        scale = ((h + 0.1) / side, (w + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")  # (1, D, h, w)
    return torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)


def patch_coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return (row, column) coordinates (N, 2) of patch centers; each axis runs from -1 to 1, whatever its length."""
    axes = [(torch.arange(n, device=device) + 0.5) * 2 / n - 1 for n in grid]
    return torch.cartesian_prod(*axes)


def augment_coordinates(coordinates: Tensor, augmentation: RopeAugmentation) -> Tensor:
    """Shift and scale coordinates (N, 2) at random; all patches get the same shift and scale."""

    def random_factors(n: int, largest: float) -> Tensor:
        return torch.exp((2 * torch.rand(n, device=coordinates.device) - 1) * math.log(largest))

    if augmentation.shift:
        coordinates = coordinates + (2 * torch.rand(2, device=coordinates.device) - 1) * augmentation.shift
    if augmentation.jitter != 1:
        coordinates = coordinates * random_factors(2, augmentation.jitter)
    return coordinates * random_factors(1, augmentation.rescale) if augmentation.rescale != 1 else coordinates


def rope_angles(coordinates: Tensor, head_dim: int, base: float = ROPE_BASE) -> RopeAngles:
    """Compute rotation angles 2 pi x / period for coordinates (N, 2), with d / 4 periods along either axis.

    Args:
        coordinates: of the patches, see `patch_coordinates`.
        head_dim: d.
        base: largest period; periods are geometric, base ** (4 i / d).

    Returns:
        Sine and cosine, each (N, d): angles of the rows, of the columns, and both again.
    """
    periods = base ** (torch.arange(head_dim // 4, device=coordinates.device) * 4 / head_dim)  # (d / 4,)
    angles = 2 * math.pi * coordinates[:, :, None] / periods  # (N, 2, d / 4)
    angles = angles.flatten(1).repeat(1, 2)  # (N, d)
    return RopeAngles(angles.sin(), angles.cos())


def apply_rope(x: Tensor, rope: RopeAngles) -> Tensor:
    """Rotate queries or keys (B, heads, T, d) of the last N tokens; the first T - N have no position and are kept."""
    n = len(rope.sin)
    first, patches = x[..., : x.shape[-2] - n, :], x[..., x.shape[-2] - n :, :]
    left, right = patches.chunk(2, dim=-1)
    rotated = patches * rope.cos + torch.cat([-right, left], dim=-1) * rope.sin
    return torch.cat([first, rotated.to(x.dtype)], dim=-2)
