"""Does the class token look at the object?

Caron et al., DINO, 2021 (arXiv:2104.14294), section 4.2 and figure 4: the patches that hold 60 % of a head's attention,
against the true mask. Zhang et al., Top-down Neural Attention by Excitation Backprop, 2016 (arXiv:1608.00507): the
pointing game. Shapes: B images, an attention map (h, w) per head, masks of H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.evaluate.features import moved


@torch.no_grad()
def fine_attention(encoder: nn.Module, images: Tensor, size: int, stride: int = 2, layer: int | None = None) -> Tensor:
    """Attention finer than the patches: the mean over copies of the images moved by parts of a patch.

    A small encoder has few patches, and more of them would show it objects at a size it was not trained on. At a border
    it is the mean of those copies that reach it, so attention that is even stays even.

    Args:
        encoder: with `attention(images) -> (B, heads, h, w)`.
        images: (B, 3, H, W) uint8.
        size: pixels a side the encoder sees, as in its training.
        stride: pixels between two copies.
        layer: of an encoder that has several to show, `attention(images, layer)`; if None it is not asked for.

    Returns:
        (B, heads, size, size); each map sums to 1.
    """
    asked = {} if layer is None else {"layer": layer}
    ((_, _, still),) = moved(images[:1], size, 0, [0])
    patch = size // encoder.attention(still, **asked).shape[-1]
    rest, total, copies = 2 * (patch // 2), 0, 0  # pixels by which the padded image is wider
    starts = range(patch // 2 % stride, patch, stride)  # one of the copies is not moved
    for down, right, copy in moved(images, size, patch, starts):
        maps = encoder.attention(copy, **asked).repeat_interleave(patch, -2).repeat_interleave(patch, -1)
        place = (right, rest - right, down, rest - down)
        total = total + F.pad(maps, place)  # (B, heads, size + rest, size + rest)
        copies = copies + F.pad(torch.ones_like(maps[:1, :1]), place)  # those at the border are reached by fewer
    inside = slice(rest // 2, rest // 2 + size)
    total = (total / copies.clamp_min(1))[:, :, inside, inside]
    return total / total.sum((-2, -1), keepdim=True)


def mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The smallest set of patches that holds `mass` of the attention: (..., h, w) to bool (..., h, w)."""
    flat = attention.flatten(-2)
    values, order = flat.sort(dim=-1)  # ascending, as in the authors' script
    keep = (values / values.sum(-1, keepdim=True)).cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(keep).scatter(-1, order, keep).unflatten(-1, attention.shape[-2:])


def attention_iou(attention: Tensor, masks: Tensor, mass: float = 0.6) -> Tensor:
    """Overlap of each head's thresholded attention with the object.

    Args:
        attention: (B, heads, h, w).
        masks: (B, H, W), not 0 where the object is.
        mass: share of the attention that is kept.

    Returns:
        (B, heads) intersection over union, in pixels of the mask, 0 to 1.
    """
    truth = (masks > 0)[:, None].to(attention.device)  # (B, 1, H, W)
    found = F.interpolate(mass_mask(attention, mass).float(), size=masks.shape[-2:], mode="nearest") > 0.5
    both, either = (found & truth).sum((-2, -1)), (found | truth).sum((-2, -1))
    return both / either.clamp_min(1)


def attention_share(attention: Tensor, masks: Tensor) -> Tensor:
    """How much of each head's attention is on the object, (B, heads); by chance, the object's share of the image.

    Args:
        attention: (B, heads, h, w).
        masks: (B, H, W), not 0 where the object is; averaged down to (h, w).
    """
    there = (masks > 0).float()[:, None].to(attention.device)
    share = F.adaptive_avg_pool2d(there, attention.shape[-2:])  # (B, 1, h, w)
    return (attention * share).sum((-2, -1)) / attention.sum((-2, -1))


def pointing(attention: Tensor, masks: Tensor) -> Tensor:
    """The pointing game: is the pixel with most attention on the object? By chance, as often as a pixel is.

    A patch points at its middle; of several with as much attention, the first one does, row by row. There is no margin
    around the object in which a miss would still count.

    Args:
        attention: (B, heads, h, w).
        masks: (B, H, W), not 0 where the object is.

    Returns:
        (B, heads) bool.
    """
    (h, w), (height, width) = attention.shape[-2:], masks.shape[-2:]
    place = attention.flatten(-2).argmax(dim=-1)  # (B, heads)
    row, column = ((place // w * 2 + 1) * height // (2 * h), (place % w * 2 + 1) * width // (2 * w))
    return (masks > 0).to(attention.device).flatten(1).gather(1, row * width + column)
