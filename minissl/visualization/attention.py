"""Draw the class token's attention: of each head, of each block, beside the mask, and during training.

Caron et al., DINO, 2021 (arXiv:2104.14294), figures 1, 3 and 4.

Shapes: n images of H x W pixels, an attention map (h, w) per head, T steps.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from minissl.data.transforms.functional import rgb_to_grayscale, to_float
from minissl.evaluation.attention import attention_fraction, attention_iou, attention_mass_mask, dense_attention
from minissl.models.outputs import Encoder
from minissl.visualization.grid import enlarge, image_grid

# Okabe and Ito's colors, distinct with any color vision and by their lightness alone: name, RGB.
HIT, MISSED, WRONG = ("blue", (0.0, 0.45, 0.70)), ("yellow", (0.94, 0.89, 0.26)), ("orange", (0.84, 0.37, 0.0))
UNIT = "attention (1 = uniform)"


def attention_figure(
    encoder: Encoder, images: Tensor, image_size: int, mass: float = 0.6, masks: Tensor | None = None
) -> Figure:
    """Draw each image, the attention of every head, and the part of the image that holds `mass` of the attention.

    Args:
        encoder: in evaluation mode, on the device of the images.
        images: (n, 3, H, W), uint8 or float in [0, 1].
        image_size: side in pixels of the encoder's input, as in its training.
        mass: fraction of the attention that the last column keeps.
        masks: (n, H, W), nonzero on the object. The last column then shows the head with the largest fraction of
            attention on objects. Without masks it shows the mean over heads.
    """
    inputs = enlarge(images, 2 * image_size)
    maps = dense_attention(encoder, images, image_size)  # (n, heads, image_size, image_size)
    columns: list[tuple[str, Tensor]] = [("image", inputs)]
    columns += [(f"head {i + 1}", _relative_to_uniform(maps[:, i])) for i in range(maps.shape[1])]
    if masks is None:
        thresholded, name = maps.mean(dim=1), "mean"  # (n, image_size, image_size)
        columns += [("mean", _relative_to_uniform(thresholded))]
    else:
        best = int(attention_fraction(maps, masks).mean(dim=0).argmax())
        thresholded, name = maps[:, best], f"head {best + 1}"
    kept = F.interpolate(attention_mass_mask(thresholded, mass).float()[:, None], scale_factor=2, mode="nearest")
    columns += [(f"{mass:.0%} of {name}", inputs * (0.2 + 0.8 * kept))]
    return image_grid(columns, "Attention of the class token in the last block", limits=(0, None), map_label=UNIT)


def _relative_to_uniform(maps: Tensor) -> Tensor:
    """Scale attention maps (..., h, w) that sum to 1, so that uniform attention is 1 everywhere."""
    return maps * (maps.shape[-2] * maps.shape[-1])


def attention_layers_figure(encoder: Encoder, images: Tensor, image_size: int, layers: Sequence[int]) -> Figure:
    """Draw each image, and the attention of some blocks, averaged over heads.

    Args:
        encoder: in evaluation mode, on the device of the images.
        images: (n, 3, H, W), uint8 or float in [0, 1].
        image_size: side in pixels of the encoder's input, as in its training.
        layers: blocks; 0 is the first.

    Raises:
        InputError: for a block that the encoder does not have.
    """
    columns: list[tuple[str, Tensor]] = [("image", enlarge(images, 2 * image_size))]
    for layer in layers:
        maps = dense_attention(encoder, images, image_size, layer=layer).mean(dim=1)  # (n, image_size, image_size)
        columns.append((f"block {layer}", _relative_to_uniform(maps)))
    title = "Attention of the class token, mean over heads"
    return image_grid(columns, title, limits=(0, None), map_label=UNIT)


def attention_masks_figure(images: Tensor, maps: Tensor, masks: Tensor, mass: float = 0.6) -> Figure:
    """Draw each image, its mask, and where `mass` of the attention is, in a color for hits, misses and false alarms.

    Args:
        images: (n, 3, H, W), uint8 or float in [0, 1].
        maps: (n, h, w) attention, one map per image, of any size.
        masks: (n, H, W), nonzero on the object.
        mass: fraction of the attention that is kept.
    """
    truth = (masks > 0).cpu()
    kept = F.interpolate(attention_mass_mask(maps, mass).float()[:, None], masks.shape[-2:], mode="nearest")[:, 0]
    kept = kept.cpu() > 0.5  # (n, H, W)
    inputs = enlarge(images, masks.shape[-1]).cpu()
    overlay = 0.35 + 0.5 * rgb_to_grayscale(inputs).expand(-1, 3, -1, -1)
    for (_, color), where in ((HIT, kept & truth), (MISSED, truth & ~kept), (WRONG, kept & ~truth)):
        overlay = torch.where(where[:, None], 0.25 * overlay + 0.75 * torch.tensor(color)[:, None, None], overlay)
    columns: list[tuple[str, Tensor]] = [("image", inputs), ("mask", truth.float()), ("attention", overlay)]
    figure = image_grid(columns, f"{mass:.0%} of the attention, and the object", "gray", (0, 1))
    overlaps = attention_iou(maps[:, None], masks, mass)[:, 0].tolist()
    for axis, overlap in zip(figure.axes[2::3], overlaps):
        axis.text(1.04, 0.5, f"IoU\n{overlap:.2f}", transform=axis.transAxes, va="center", fontsize=9)
    names = ("object, attended", "object, not attended", "background, attended")
    handles = [Patch(color=color, label=name) for (_, color), name in zip((HIT, MISSED, WRONG), names)]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False)
    return figure


def attention_history_figure(
    images: Tensor, histories: Tensor, names: Sequence[str], title: str = "Attention of the class token during training"
) -> Figure:
    """Draw a row for each image: the image, then its attention maps, of each step or of each block.

    Each map is divided by its maximum, so uniform attention is a bright square.

    Args:
        images: (n, 3, H, W), uint8 or float in [0, 1].
        histories: (T, n, h, w), uint8 or float, one map per step and image.
        names: T, such as "step 64".
        title: of the figure.
    """
    relative = _relative_to_maximum(histories)
    columns: list[tuple[str, Tensor]] = [("image", images), *zip(names, relative)]
    return image_grid(columns, title, limits=(0, 1), map_label="attention / maximum of the map")


def _relative_to_maximum(maps: Tensor) -> Tensor:
    """Divide each map (..., h, w) by its maximum. Returns float in [0, 1]."""
    return maps.float() / maps.float().amax((-2, -1), keepdim=True).clamp_min(1e-12)


def attention_frame_figure(images: Tensor, maps: Tensor, title: str = "Attention of the class token") -> Figure:
    """Draw images in a square grid, each as bright as its attention: one step of a history.

    Args:
        images: (n, 3, H, W), uint8 or float in [0, 1]; 16 are drawn four by four.
        maps: (n, h, w), uint8 or float.
        title: of the figure.
    """
    brightness = _relative_to_maximum(maps)[:, None]
    brightness = F.interpolate(brightness, images.shape[-2:], mode="bilinear", align_corners=False)  # (n, 1, H, W)
    shaded = to_float(images) * (0.2 + 0.8 * brightness)
    side = math.ceil(math.sqrt(len(images)))
    figure = image_grid([("", shaded[column::side]) for column in range(side)], title)
    figure.supxlabel("brightness: attention / maximum of the map", fontsize=8)
    return figure
