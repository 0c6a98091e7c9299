"""Views: other looks at the same images, by the recipe of a paper.

Each image has its own draw of every operation of `augment`, on the device the images are on. Recipes: Chen et al.,
SimCLR, 2020 (arXiv:2002.05709), appendix A; Caron et al., DINO, 2021 (arXiv:2104.14294), section 3; Oquab et al.,
DINOv2, 2023 (arXiv:2304.07193).

Shapes: B images (B, 3, H, W) uint8, which stay as they are; views are float32 of S x S pixels, normalised, stored view
by view: row = view * B + image. The papers blur crops of 224 pixels with a deviation of up to 2; smaller crops are
blurred less, in proportion.
"""

import torch
from torch import Tensor

from minissl.augment import (
    color_jitter,
    flip,
    normalize,
    random_blur,
    random_grey,
    random_resized_crop,
    solarize,
    to_float,
)

Jitter = tuple[float, float, float, float]  # how far brightness, contrast, saturation and hue may go


def distort(crops: Tensor, jitter: Jitter, blur: float, solar: float, blur_reach: float) -> Tensor:
    """What all recipes do to crops in [0, 1]: flip, jitter, grey, blur, solarise, normalise.

    Args:
        jitter: reach of the jitter, which 8 of 10 crops get; 2 of 10 become grey.
        blur, solar: how likely a crop is blurred, solarised.
        blur_reach: the largest deviation of the blur in pixels.
    """
    crops = random_grey(color_jitter(flip(crops), *jitter))
    return normalize(solarize(random_blur(crops, blur, high=blur_reach), solar))


def simclr(
    images: Tensor, size: int, scale: tuple[float, float] = (0.08, 1.0), strength: float = 1.0, blur: float = 0.5
) -> Tensor:
    """SimCLR's two views, both drawn alike.

    The authors' code gives pixels in [0, 1] to the network; these are normalised, as our encoders expect.

    Args:
        images: (B, 3, H, W) uint8.
        size: pixels a side of a view.
        scale: the share of the image's area a view is cut from.
        strength: s, of the colour jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s).
        blur: how likely a view is blurred.

    Returns:
        (2B, 3, size, size).
    """
    jitter = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    views = [distort(random_resized_crop(images, size, scale), jitter, blur, 0.0, 2.0 * size / 224) for _ in range(2)]
    return torch.cat(views)


def simclr_cifar(images: Tensor, size: int = 32) -> Tensor:
    """SimCLR's two views for small pictures (appendix B.9, CIFAR-10): half the jitter, no blur; (2B, 3, size, size)."""
    return simclr(images, size, strength=0.5, blur=0.0)


def multi_crop(
    images: Tensor,
    size: int,
    local_size: int,
    local_crops: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
) -> tuple[Tensor, Tensor]:
    """DINO's views: two large crops, which the teacher sees, and several small ones. The second may be solarised.

    DINOv2 and DINOv3 describe the same; but their published code hands 1 - p to a function that wants p, so that their
    models were trained with a blur of (0.0, 0.9, 0.5), which the authors have left as it is.

    Args:
        images: (B, 3, H, W) uint8.
        size, local_size: pixels a side of the two kinds of crop.
        local_crops: how many small ones, L.
        global_scale, local_scale: the share of the image's area they are cut from.
        blur: how likely the first, the second and a small crop are blurred.

    Returns:
        (2B, 3, size, size) and (L B, 3, local_size, local_size).
    """
    jitter, reach = (0.4, 0.4, 0.2, 0.1), 2.0 * size / 224
    images = to_float(images)
    first = distort(random_resized_crop(images, size, global_scale), jitter, blur[0], 0.0, reach)
    second = distort(random_resized_crop(images, size, global_scale), jitter, blur[1], 0.2, reach)
    local = images[:0, :, :1, :1].expand(-1, -1, local_size, local_size)
    if local_crops:
        crops = random_resized_crop(images.repeat(local_crops, 1, 1, 1), local_size, local_scale)
        local = distort(crops, jitter, blur[2], 0.0, reach)
    return torch.cat([first, second]), local
