"""Compare the class token's attention with object masks.

Caron et al., DINO, 2021 (arXiv:2104.14294), section 4.2 and figure 4: the patches that hold 60 % of a head's attention,
against the ground-truth mask. Zhang et al., Top-down Neural Attention by Excitation Backprop, 2016 (arXiv:1608.00507):
the pointing game.

Shapes: B images, an attention map (h, w) per head, masks of H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.evaluation.features import shifted_copies
from minissl.models.outputs import Encoder


@torch.no_grad()
def dense_attention(encoder: Encoder, images: Tensor, image_size: int, stride: int = 2, layer: int = -1) -> Tensor:
    """Average the attention maps of shifted copies of the images, for a resolution higher than the patch grid.

    A small encoder has few patches, and a larger input would show objects at a size it was not trained on. At a border
    the mean is over the copies that cover it, so uniform attention stays uniform.

    Args:
        encoder: in evaluation mode, on the device of the images.
        images: (B, 3, H, W), uint8 or float in [0, 1].
        image_size: side in pixels of the encoder's input, as in its training.
        stride: pixels between two copies, 1 to the patch size.
        layer: index of the transformer block: 0 is the first, -1 the last.

    Returns:
        (B, heads, image_size, image_size) float; each map sums to 1.
    """
    ((_, _, unshifted),) = shifted_copies(images[:1], image_size, 0, [0])
    maps = encoder.attention(unshifted, layer)
    patch_size, num_heads = image_size // maps.shape[-1], maps.shape[1]
    padding = 2 * (patch_size // 2)  # pixels by which the padded image is wider
    side = image_size + padding
    total, counts = maps.new_zeros(len(images), num_heads, side, side), maps.new_zeros(1, 1, side, side)
    offsets = range(patch_size // 2 % stride, patch_size, stride)  # one of the copies is unshifted
    for row, column, copy in shifted_copies(images, image_size, patch_size, offsets):
        maps = encoder.attention(copy, layer).repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
        rows, columns = slice(row, row + image_size), slice(column, column + image_size)
        total[:, :, rows, columns] += maps
        counts[:, :, rows, columns] += 1  # fewer copies reach the border
    inside = slice(padding // 2, padding // 2 + image_size)
    mean = (total / counts.clamp_min(1))[:, :, inside, inside]
    return mean / mean.sum((-2, -1), keepdim=True)


def attention_mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """Return the smallest set of patches that holds the fraction `mass` of attention (..., h, w): bool (..., h, w)."""
    flat = attention.flatten(-2)
    values, order = flat.sort(dim=-1)  # ascending, as in the authors' script
    keep = (values / values.sum(-1, keepdim=True)).cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(keep).scatter(-1, order, keep).unflatten(-1, attention.shape[-2:])


def attention_iou(attention: Tensor, masks: Tensor, mass: float = 0.6) -> Tensor:
    """Compute the intersection over union of each head's thresholded attention and the object.

    Args:
        attention: (B, heads, h, w), at least 0.
        masks: (B, H, W), above 0 on the object.
        mass: fraction of the attention that is kept, by `attention_mass_mask`.

    Returns:
        (B, heads) IoU in pixels of the mask, 0 to 1.
    """
    truth = (masks > 0)[:, None].to(attention.device)  # (B, 1, H, W)
    kept = F.interpolate(attention_mass_mask(attention, mass).float(), size=masks.shape[-2:], mode="nearest") > 0.5
    intersection, union = (kept & truth).sum((-2, -1)), (kept | truth).sum((-2, -1))
    return intersection / union.clamp_min(1)


def attention_fraction(attention: Tensor, masks: Tensor) -> Tensor:
    """Compute the fraction of each head's attention that is on the object.

    For uniform attention it is the fraction of the image that the object covers.

    Args:
        attention: (B, heads, h, w), at least 0.
        masks: (B, H, W), above 0 on the object; averaged over each patch to (B, h, w).

    Returns:
        (B, heads), 0 to 1.
    """
    h, w = attention.shape[-2:]
    coverage = F.adaptive_avg_pool2d((masks > 0).float()[:, None].to(attention.device), (h, w))  # (B, 1, h, w)
    return (attention * coverage).sum((-2, -1)) / attention.sum((-2, -1))


def pointing_game(attention: Tensor, masks: Tensor) -> Tensor:
    """Return whether the center of the patch with the most attention is on the object, for each head.

    The chance level is the fraction of the image that the object covers. Of several equal maxima the first counts, row
    by row. The original has a tolerance around the object; here there is none.

    Args:
        attention: (B, heads, h, w).
        masks: (B, H, W), above 0 on the object.

    Returns:
        (B, heads) bool.
    """
    (h, w), (height, width) = attention.shape[-2:], masks.shape[-2:]
    index = attention.flatten(-2).argmax(dim=-1)  # (B, heads)
    row, column = (index // w * 2 + 1) * height // (2 * h), (index % w * 2 + 1) * width // (2 * w)
    return (masks > 0).to(attention.device).flatten(1).gather(1, row * width + column)
