"""Where the class token looks, head by head.

Caron et al., DINO, 2021 (arXiv:2104.14294), figures 1, 3 and 4. Shapes: B images, an attention map (h, w) per head.
"""

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from minissl.evaluate.attention import attention_share, fine_attention, mass_mask
from minissl.visualize.grid import enlarge, picture_grid


def attention_figure(
    encoder: nn.Module, images: Tensor, size: int, mass: float = 0.6, masks: Tensor | None = None
) -> Figure:
    """For each image: itself, every head's attention, and the image where `mass` of the attention is.

    Args:
        encoder: with `attention(images) -> (B, heads, h, w)`.
        images: (B, 3, H, W) uint8.
        size: pixels a side the encoder sees them at, as in its training.
        mass: share of the attention that is kept in the last column.
        masks: (B, H, W), not 0 where the object is: the last column is of the one head that looks at objects most;
            without them it is of the heads' mean.
    """
    pictures = enlarge(images, 2 * size)
    maps = fine_attention(encoder, images, size)  # (B, heads, size, size)
    columns = [("image", pictures)]
    columns += [(f"head {i + 1}", maps[:, i]) for i in range(maps.shape[1])]
    if masks is None:
        shown, name = maps.mean(dim=1), "the mean"  # (B, size, size)
        columns += [("mean", shown)]
    else:
        best = int(attention_share(maps, masks).mean(dim=0).argmax())
        shown, name = maps[:, best], f"head {best + 1}"
    seen = F.interpolate(mass_mask(shown, mass).float()[:, None], scale_factor=2, mode="nearest")
    columns += [(f"{mass:.0%} of {name}", pictures * (0.2 + 0.8 * seen))]
    return picture_grid(columns, "Attention of the class token, last block")
