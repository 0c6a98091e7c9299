"""Where the class token looks: head by head, block by block, beside the truth, and from the first step to the last.

Caron et al., DINO, 2021 (arXiv:2104.14294), figures 1, 3 and 4. Shapes: n images, an attention map (h, w) per head.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from minissl.augment import grey
from minissl.evaluate.attention import attention_iou, attention_share, fine_attention, mass_mask
from minissl.visualize.grid import enlarge, picture_grid

# Okabe and Ito's: told apart with any colour vision, and by their lightness alone.
HIT, MISSED, WRONG = ("blue", (0.0, 0.45, 0.70)), ("yellow", (0.94, 0.89, 0.26)), ("orange", (0.84, 0.37, 0.0))


def attention_figure(
    encoder: nn.Module, images: Tensor, size: int, mass: float = 0.6, masks: Tensor | None = None
) -> Figure:
    """For each image: itself, every head's attention, and the image where `mass` of the attention is.

    Args:
        encoder: with `attention(images) -> (B, heads, h, w)`.
        images: (n, 3, H, W) uint8.
        size: pixels a side the encoder sees them at, as in its training.
        mass: share of the attention that is kept in the last column.
        masks: (n, H, W), not 0 where the object is: the last column is of the one head that looks at objects most;
            without them it is of the heads' mean.
    """
    pictures = enlarge(images, 2 * size)
    maps = fine_attention(encoder, images, size)  # (n, heads, size, size)
    columns = [("image", pictures)]
    columns += [(f"head {i + 1}", maps[:, i]) for i in range(maps.shape[1])]
    if masks is None:
        shown, name = maps.mean(dim=1), "the mean"  # (n, size, size)
        columns += [("mean", shown)]
    else:
        best = int(attention_share(maps, masks).mean(dim=0).argmax())
        shown, name = maps[:, best], f"head {best + 1}"
    seen = F.interpolate(mass_mask(shown, mass).float()[:, None], scale_factor=2, mode="nearest")
    columns += [(f"{mass:.0%} of {name}", pictures * (0.2 + 0.8 * seen))]
    return picture_grid(columns, "Attention of the class token, last block")


def layers_figure(encoder: nn.Module, images: Tensor, size: int, layers: Sequence[int]) -> Figure:
    """For each image: itself, and the mean over heads of what each of some blocks looks at.

    Args:
        encoder: with `attention(images, layer) -> (B, heads, h, w)`.
        images: (n, 3, H, W) uint8.
        size: pixels a side the encoder sees them at, as in its training.
        layers: which blocks; 0 is the first.

    Raises:
        InputError: for a block there is none of.
    """
    columns = [("image", enlarge(images, 2 * size))]
    columns += [(f"block {i}", fine_attention(encoder, images, size, layer=i).mean(dim=1)) for i in layers]
    return picture_grid(columns, "Attention of the class token, mean of the heads", limits=(0, None))


def masks_figure(images: Tensor, maps: Tensor, masks: Tensor, mass: float = 0.6) -> Figure:
    """For each image: itself, the true mask, and where `mass` of the attention is, coloured by whether it is right.

    Args:
        images: (n, 3, H, W) uint8.
        maps: (n, h, w), one map each, of any size.
        masks: (n, H, W), not 0 where the object is.
        mass: share of the attention that is kept.
    """
    truth = (masks > 0).cpu()
    found = F.interpolate(mass_mask(maps, mass).float()[:, None], masks.shape[-2:], mode="nearest")[:, 0].cpu() > 0.5
    pictures = enlarge(images, masks.shape[-1]).cpu()
    shown = 0.35 + 0.5 * grey(pictures).expand(-1, 3, -1, -1)
    parts = ((HIT, found & truth), (MISSED, truth & ~found), (WRONG, found & ~truth))
    for (_, color), where in parts:
        shown = torch.where(where[:, None], 0.25 * shown + 0.75 * torch.tensor(color)[:, None, None], shown)
    said = f"{HIT[0]}: hit\n{MISSED[0]}: missed\n{WRONG[0]}: wrong"
    columns = [("image", pictures), ("true mask", truth.float()), (said, shown)]
    figure = picture_grid(columns, f"{mass:.0%} of the attention, and the object", "gray", (0, 1))
    overlaps = attention_iou(maps[:, None], masks, mass)[:, 0].tolist()
    for axis, overlap in zip(figure.axes[2::3], overlaps):
        axis.text(1.04, 0.5, f"IoU\n{overlap:.2f}", transform=axis.transAxes, va="center", fontsize=9)
    return figure


def film_figure(
    images: Tensor, films: Tensor, names: Sequence[str], title: str = "Attention while it is learnt"
) -> Figure:
    """A row for each image: itself, then what was looked at, moment by moment, or block by block.

    Black is no attention and the brightest is the most of that map, so attention that is even is a bright square.

    Args:
        images: (n, 3, H, W) uint8.
        films: (T, n, h, w), uint8 or float, one map a moment and image.
        names: of the T moments, as in "step 64".
        title: over the figure.
    """
    columns = [("image", images), *((name, maps) for name, maps in zip(names, films))]
    return picture_grid(columns, title, limits=(0, None))


def frame_figure(images: Tensor, maps: Tensor, title: str = "") -> Figure:
    """Images in a square of rows, four by four for sixteen, each as bright as it is looked at: a moment of a film.

    Args:
        images: (n, 3, H, W) uint8.
        maps: (n, h, w), uint8 or float.
        title: over the figure.
    """
    light = maps.float() / maps.float().amax((-2, -1), keepdim=True).clamp_min(1e-12)
    light = F.interpolate(light[:, None], images.shape[-2:], mode="bilinear", align_corners=False)  # (n, 1, H, W)
    pictures = images.float() / 255 * (0.2 + 0.8 * light)
    side = math.ceil(math.sqrt(len(images)))
    return picture_grid([("", pictures[column::side]) for column in range(side)], title)
