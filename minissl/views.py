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
    crop_resize,
    draw_crops,
    normalize,
    random_blur,
    random_grey,
    solarize,
    to_float,
)
from minissl.parallel import rand

Jitter = tuple[float, float, float, float]  # how far brightness, contrast, saturation and hue may go


def cut(images: Tensor, scale: tuple[float, float], *sizes: int) -> list[Tensor]:
    """A random box of each image (B, 3, H, W), mirrored or not, at one or more sizes: crops (B, 3, S, S) in [0, 1]."""
    images = to_float(images)
    box = draw_crops(len(images), *images.shape[-2:], scale, images)
    crops = [crop_resize(images, *box, size) for size in sizes]
    mirrored = rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return [torch.where(mirrored, crop.flip(-1), crop) for crop in crops]


def distort(crops: Tensor, jitter: Jitter, blur: float, solar: float, blur_reach: float) -> Tensor:
    """What all recipes do to crops in [0, 1]: jitter, grey, blur, solarise, normalise.

    Args:
        jitter: reach of the jitter, which 8 of 10 crops get; 2 of 10 become grey.
        blur, solar: how likely a crop is blurred, solarised.
        blur_reach: the largest deviation of the blur in pixels.
    """
    crops = random_grey(color_jitter(crops, *jitter))
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
    return torch.cat([distort(*cut(images, scale, size), jitter, blur, 0.0, 2.0 * size / 224) for _ in range(2)])


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
    return anchored_crop(images, 0, size, local_size, local_crops, global_scale, local_scale, blur)[:2]


def anchored_crop(
    images: Tensor,
    anchor_size: int,
    size: int,
    local_size: int,
    local_crops: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
) -> tuple[Tensor, Tensor, Tensor]:
    """DINOv3's views: those of `multi_crop`, and its large crops once more, larger and undistorted (section 4.2).

    Args:
        images: (B, 3, H, W) uint8.
        anchor_size: pixels a side of the large crops as the Gram anchor sees them; 0 for none.

    Returns:
        What `multi_crop` gives for the other arguments, and (2B or 0, 3, anchor_size, anchor_size).
    """
    jitter, reach = (0.4, 0.4, 0.2, 0.1), 2.0 * size / 224
    images, sizes = to_float(images), [size, anchor_size] if anchor_size else [size]
    large, clean = [], [images[:0, :, :1, :1].expand(-1, -1, anchor_size, anchor_size)]
    for blurred, solar in ((blur[0], 0.0), (blur[1], 0.2)):
        crop, *same = cut(images, global_scale, *sizes)
        large.append(distort(crop, jitter, blurred, solar, reach))
        clean += [normalize(crop) for crop in same]
    local = [images[:0, :, :1, :1].expand(-1, -1, local_size, local_size)]
    for _ in range(local_crops):
        local.append(distort(*cut(images, local_scale, local_size), jitter, blur[2], 0.0, reach))
    return torch.cat(large), torch.cat(local), torch.cat(clean)
