"""Where the class token looks, head by head.

Caron et al., DINO, 2021 (arXiv:2104.14294), figures 1, 3 and 4. Shapes: B images, an attention map (h, w) per head.
"""

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from minissl.evaluate.attention import fine_attention, mass_mask
from minissl.visualize.grid import enlarge, picture_grid


def attention_figure(encoder: nn.Module, images: Tensor, size: int, mass: float = 0.6) -> Figure:
    """For each image: itself, every head's attention, the heads' mean, and the image where `mass` of the mean is.

    Args:
        encoder: with `attention(images) -> (B, heads, h, w)`.
        images: (B, 3, H, W) uint8.
        size: pixels a side the encoder sees them at, as in its training.
        mass: share of the attention that is kept in the last column.
    """
    pictures = enlarge(images, 2 * size)
    maps = fine_attention(encoder, images, size)  # (B, heads, size, size)
    mean = maps.mean(dim=1)  # (B, size, size)
    seen = F.interpolate(mass_mask(mean, mass).float()[:, None], scale_factor=2, mode="nearest")
    columns = [("image", pictures)]
    columns += [(f"head {i + 1}", maps[:, i]) for i in range(maps.shape[1])]
    columns += [("mean", mean), (f"{mass:.0%} of it", pictures * (0.2 + 0.8 * seen))]
    return picture_grid(columns, "Attention of the class token, last block")
