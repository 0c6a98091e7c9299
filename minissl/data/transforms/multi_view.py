"""Augmented views of images, by the recipes of SimCLR, DINO, DINOv2 and DINOv3.

Chen et al., SimCLR, 2020 (arXiv:2002.05709), appendix A; Caron et al., DINO, 2021 (arXiv:2104.14294), section 3; Oquab
et al., DINOv2, 2023 (arXiv:2304.07193); Siméoni et al., DINOv3, 2025 (arXiv:2508.10104). The papers blur crops of 224
pixels with a standard deviation of up to 2 pixels; here it is scaled with the crop size.

Shapes: B images (B, 3, H, W) uint8, or whatever `functional.to_float` takes. Views are normalized float32 of S x S
pixels, stored view by view: row = view * B + image.
"""

import torch
from PIL import Image
from torch import Tensor

from minissl.data.transforms.functional import (
    color_jitter,
    crop_resize,
    normalize,
    rand,
    random_gaussian_blur,
    random_grayscale,
    random_solarize,
    sample_crop_boxes,
    to_float,
)

Jitter = tuple[float, float, float, float]  # strengths of brightness, contrast, saturation and hue, see `color_jitter`


def random_resized_crops(images: Tensor | Image.Image, scale: tuple[float, float], *sizes: int) -> list[Tensor]:
    """Crop one random box from each image, flip it with probability 0.5, and resize it to one or more sizes.

    Args:
        images: (B, 3, H, W).
        scale: range of the box's area, as a fraction of the image's.
        sizes: sides S of the results in pixels.

    Returns:
        For each size the crops (B, 3, S, S), in [0, 1].
    """
    images = to_float(images)
    boxes = sample_crop_boxes(len(images), images.shape[-2], images.shape[-1], scale, images)
    crops = [crop_resize(images, *boxes, size) for size in sizes]
    flipped = rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return [torch.where(flipped, crop.flip(-1), crop) for crop in crops]


def augment_crops(crops: Tensor, jitter: Jitter, blur_prob: float, solarize_prob: float, max_sigma: float) -> Tensor:
    """Apply color jitter, grayscale, blur, solarization and normalization to crops, as all recipes do.

    Args:
        crops: (B, 3, S, S) in [0, 1].
        jitter: strengths of the color jitter, applied with probability 0.8; grayscale is applied with 0.2.
        blur_prob: probability of a Gaussian blur.
        solarize_prob: probability of solarization.
        max_sigma: largest standard deviation of the blur in pixels.
    """
    crops = random_grayscale(color_jitter(crops, *jitter))
    return normalize(random_solarize(random_gaussian_blur(crops, blur_prob, max_sigma=max_sigma), solarize_prob))


def simclr_views(
    images: Tensor | Image.Image,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    jitter_strength: float = 1.0,
    blur_prob: float = 0.5,
) -> Tensor:
    """Sample SimCLR's two views of each image, from the same distribution.

    The authors feed pixels in [0, 1] to the network; these views are normalized, as minissl's encoders expect.

    Args:
        images: (B, 3, H, W) uint8.
        size: side of a view in pixels.
        scale: range of a crop's area, as a fraction of the image's.
        jitter_strength: s of the color jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s).
        blur_prob: probability of a Gaussian blur.

    Returns:
        (2B, 3, size, size).
    """
    s = jitter_strength
    jitter, max_sigma = (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s), 2.0 * size / 224
    views = []
    for _ in range(2):
        (crops,) = random_resized_crops(images, scale, size)
        views.append(augment_crops(crops, jitter, blur_prob, 0.0, max_sigma))
    return torch.cat(views)


def simclr_cifar_views(images: Tensor | Image.Image, size: int = 32) -> Tensor:
    """Sample SimCLR's two views for CIFAR-10 (appendix B.9): half the jitter, no blur. Returns (2B, 3, size, size)."""
    return simclr_views(images, size, jitter_strength=0.5, blur_prob=0.0)


def multi_crop(
    images: Tensor | Image.Image,
    crop_size: int,
    local_crop_size: int,
    num_local_crops: int,
    global_crops_scale: tuple[float, float],
    local_crops_scale: tuple[float, float],
    blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5),
) -> tuple[Tensor, Tensor]:
    """Sample DINO's views: two global crops, which the teacher sees too, and several local crops.

    The second global crop is solarized with probability 0.2. DINOv2 and DINOv3 describe the same recipe, but their code
    passes 1 - p where p is expected. Their models were trained with blur probabilities (0.0, 0.9, 0.5), which the
    authors have kept.

    Args:
        images: (B, 3, H, W) uint8.
        crop_size: side of a global crop in pixels.
        local_crop_size: side of a local crop in pixels.
        num_local_crops: L.
        global_crops_scale: range of a global crop's area, as a fraction of the image's.
        local_crops_scale: range of a local crop's area.
        blur_probs: probability of a blur for the first global, the second global and each local crop.

    Returns:
        Global crops (2B, 3, crop_size, crop_size) and local crops (L B, 3, local_crop_size, local_crop_size).
    """
    scales = (global_crops_scale, local_crops_scale)
    return multi_crop_with_gram_crops(images, 0, crop_size, local_crop_size, num_local_crops, *scales, blur_probs)[:2]


def multi_crop_with_gram_crops(
    images: Tensor | Image.Image,
    gram_crop_size: int,
    crop_size: int,
    local_crop_size: int,
    num_local_crops: int,
    global_crops_scale: tuple[float, float],
    local_crops_scale: tuple[float, float],
    blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5),
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample DINOv3's views: those of `multi_crop`, and the global crops undistorted at another size (section 4.2).

    Args:
        images: (B, 3, H, W) uint8.
        gram_crop_size: side in pixels of the global crops that the Gram teacher sees; 0 for none.
        crop_size: as for `multi_crop`, like all further arguments.
        local_crop_size: side of a local crop in pixels.
        num_local_crops: L.
        global_crops_scale: range of a global crop's area.
        local_crops_scale: range of a local crop's area.
        blur_probs: probability of a blur.

    Returns:
        Global crops, local crops, and Gram crops (2B or 0, 3, gram_crop_size, gram_crop_size).
    """
    jitter, max_sigma = (0.4, 0.4, 0.2, 0.1), 2.0 * crop_size / 224
    images, sizes = to_float(images), [crop_size, gram_crop_size] if gram_crop_size else [crop_size]
    empty = images[:0, :, :1, :1]  # no image: torch.cat keeps the shape where there are no crops
    global_crops, gram_crops = [], [empty.expand(-1, -1, gram_crop_size, gram_crop_size)]
    for blur_prob, solarize_prob in ((blur_probs[0], 0.0), (blur_probs[1], 0.2)):
        crop, *undistorted = random_resized_crops(images, global_crops_scale, *sizes)
        global_crops.append(augment_crops(crop, jitter, blur_prob, solarize_prob, max_sigma))
        gram_crops += [normalize(crop) for crop in undistorted]
    local_crops = [empty.expand(-1, -1, local_crop_size, local_crop_size)]
    for _ in range(num_local_crops):
        (crop,) = random_resized_crops(images, local_crops_scale, local_crop_size)
        local_crops.append(augment_crops(crop, jitter, blur_probs[2], 0.0, max_sigma))
    return torch.cat(global_crops), torch.cat(local_crops), torch.cat(gram_crops)
