"""Image operations and random augmentations of a whole batch, on the device of the images.

Each image gets its own random parameters. No operation loops over images, synchronizes with a GPU or changes its input.
Given the same parameters, the results equal torchvision's, except that the Gaussian blur has no finite kernel.

Random numbers come from torch's generator; the order of the color jitter comes from Python's. With several processes,
each draws for the whole batch and keeps its own rows, so that results do not depend on the number of processes.

Shapes: B images (B, 3, H, W), S x S pixels after a resize. Images are float32 in [0, 1] until `normalize`.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minissl.distributed import local_rows, world_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # weights of R, G, B; ITU-R 601, as in torchvision and Pillow
NEGLIGIBLE_SIGMA = 0.3  # pixels; the weight of each neighbor is then below 1/255 of the pixel's own
MAX_CROP_ATTEMPTS = 10  # as in torchvision


def rand(*shape: int, device: torch.device, batch_dim: int = 0) -> Tensor:
    """Sample uniform float32 numbers in [0, 1), the same for any number of processes.

    Args:
        shape: of the result.
        device: of the result.
        batch_dim: dimension of the batch. All processes draw the numbers of the whole batch, and each keeps its rows.
    """
    whole = [n * world_size() if dim == batch_dim else n for dim, n in enumerate(shape)]
    return local_rows(torch.rand(whole, device=device), batch_dim)


def uniform(n: int, low: float, high: float, like: Tensor) -> Tensor:
    """Sample (n,) float32 numbers in [low, high) on the device of `like`."""
    return rand(n, device=like.device) * (high - low) + low


def to_float(images: Tensor | Image.Image) -> Tensor:
    """Convert images to a batch of float32 images in [0, 1].

    Args:
        images: uint8, or float in [0, 1]: a batch (B, 3, H, W), one image (3, H, W), or one PIL image.

    Returns:
        (B, 3, H, W); B is 1 for one image.
    """
    if isinstance(images, Image.Image):
        images = torch.from_numpy(np.array(images.convert("RGB"))).permute(2, 0, 1)
    images = images[None] if images.ndim == 3 else images
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalize(images: Tensor | Image.Image) -> Tensor:
    """Normalize images with ImageNet's mean and standard deviation per channel.

    Args:
        images: as for `to_float`.

    Returns:
        (B, 3, H, W) float32, the input of every encoder.
    """
    images = to_float(images)
    # By scalars for each channel: a tensor of three numbers would be copied from the CPU, and a GPU would wait for it.
    return torch.stack([(images[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], dim=1)


def denormalize(images: Tensor) -> Tensor:
    """Invert `normalize`: map (B, 3, H, W) to float32 in [0, 1]."""
    return torch.stack([images[:, c] * IMAGENET_STD[c] + IMAGENET_MEAN[c] for c in range(3)], dim=1).clamp(0, 1)


def separable_resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a linear operation that is separable, as a resize or a Gaussian blur, by two matrix products.

    Args:
        images: (B, 3, H, W).
        rows: (B, S, H), weights of the input rows for each output row.
        columns: (B, T, W), weights of the input columns for each output column.

    Returns:
        (B, 3, S, T).
    """
    # bfloat16, which autocast would use, rounds pixels to 1 part in 256.
    with torch.autocast(images.device.type, enabled=False):
        resampled = images.flatten(1, 2) @ columns.mT  # (B, 3 H, T): one product for the three channels
        return rows[:, None] @ resampled.unflatten(1, (3, -1))


def _apply_with_prob(p: float, changed: Tensor, images: Tensor) -> Tensor:
    """Return the changed image with probability p, else the original, independently for each image."""
    chosen = rand(len(images), device=images.device) < p
    return torch.where(chosen.view(-1, 1, 1, 1), changed, images)


def resize_weights(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Compute the weights of a bicubic resize along one axis, with antialiasing, as Pillow and torchvision do.

    The kernel is Keys' (1981) with a = -0.5; it is widened where the crop is downsampled.

    Args:
        start: (B,), first pixel of each crop.
        length: (B,), pixels of each crop.
        source: pixels of the image along the axis.
        target: pixels of the result.

    Returns:
        (B, target, source); each row sums to 1.
    """
    step = (length / target)[:, None, None]  # source pixels per target pixel
    center = start[:, None, None] + (torch.arange(target, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    x = ((pixel - center) / step.clamp_min(1)).abs()  # (B, target, source)
    near, far = (1 - x).clamp_min(0), (2 - x).clamp_min(0)
    # Keys' two cubics, for x in [0, 1] and [1, 2], as one sum without a branch: each part is 0 beyond its knot.
    weights = (near * near * (1 - 2 * near) + far * far * (far - 1) / 2) * inside
    return weights / weights.sum(-1, keepdim=True)


def crop_resize(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: int) -> Tensor:
    """Crop one box from each image (B, 3, H, W) and resize it to (B, 3, size, size), in [0, 1].

    The boxes are given in pixels; `top`, `left`, `height` and `width` are (B,).
    """
    rows = resize_weights(top, height, images.shape[-2], size)  # (B, S, H)
    columns = resize_weights(left, width, images.shape[-1], size)  # (B, S, W)
    return separable_resample(images, rows, columns).clamp(0, 1)


def sample_crop_boxes(
    n: int, height: int, width: int, scale: tuple[float, float], like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample random boxes as torchvision's RandomResizedCrop does, in whole pixels.

    A box that does not fit into the image is sampled again, up to ten times; then the central crop is used.

    Args:
        n: number of boxes.
        height: pixels of the images.
        width: pixels of the images.
        scale: range of the area, as a fraction of the image's. The aspect ratio is between 3/4 and 4/3.
        like: a tensor on the device of the result.

    Returns:
        top, left, height and width, each (n,) float32.
    """
    attempts = MAX_CROP_ATTEMPTS
    area = height * width * (rand(attempts, n, device=like.device, batch_dim=1) * (scale[1] - scale[0]) + scale[0])
    ratio = torch.exp((rand(attempts, n, device=like.device, batch_dim=1) * 2 - 1) * math.log(4 / 3))
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    first = fits.float().argmax(0, keepdim=True)  # the first attempt that fits, or attempt 0
    fits = fits.gather(0, first)[0]
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    fallback = (min(height, round(width / aspect)), min(width, round(height * aspect)))
    h = torch.where(fits, h.gather(0, first)[0], float(fallback[0]))
    w = torch.where(fits, w.gather(0, first)[0], float(fallback[1]))
    top = torch.where(fits, (uniform(n, 0, 1, like) * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(fits, (uniform(n, 0, 1, like) * (width - w + 1)).floor(), ((width - w) / 2).floor())
    return top, left, h, w


def random_resized_crop(images: Tensor | Image.Image, size: int, scale: tuple[float, float]) -> Tensor:
    """Crop a random box from each image and resize it to (B, 3, size, size), in [0, 1].

    Args:
        images: as for `to_float`.
        size: side of the result in pixels.
        scale: range of the crop's area, as a fraction of the image's.
    """
    images = to_float(images)
    boxes = sample_crop_boxes(len(images), images.shape[-2], images.shape[-1], scale, images)
    return crop_resize(images, *boxes, size)


def random_horizontal_flip(images: Tensor, p: float = 0.5) -> Tensor:
    """Flip each image (B, 3, H, W) left to right with probability p."""
    return _apply_with_prob(p, images.flip(-1), images)


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """Compute the luma (B, 1, H, W) of RGB images (B, 3, H, W)."""
    red, green, blue = (weight * images[:, c : c + 1] for c, weight in enumerate(LUMA))
    return red + green + blue


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor (B, 1, 1, 1); 1 leaves it unchanged, 0 gives black."""
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between the image's mean gray and the image by a factor (B, 1, 1, 1); 1 leaves it unchanged."""
    mean = rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between the grayscale image and the image by a factor (B, 1, 1, 1); 1 leaves it unchanged."""
    return torch.lerp(rgb_to_grayscale(images), images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV by (B, 1, 1, 1) of a full circle; value and saturation stay.

    A channel of an HSV color is v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6, n = 5, 3, 1 for R, G, B.
    """
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    r, g, b = images.split(1, dim=1)
    divisor = chroma.clamp_min(1e-8)
    sector_of_g, sector_of_b = 2 + (b - r) / divisor, 4 + (r - g) / divisor
    hue = torch.where(value == r, (g - b) / divisor, torch.where(value == g, sector_of_g, sector_of_b))
    n = (5 - 2 * torch.arange(3, device=images.device)).view(1, 3, 1, 1)
    k = (n + (hue + 6 * shift)).remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def color_jitter(
    images: Tensor, brightness: float, contrast: float, saturation: float, hue: float, p: float = 0.8
) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image by random amounts, with probability p.

    Each image has its own amounts. The order of the four operations is random and the same for the whole batch, because
    24 orders would split it into 24 groups.

    Args:
        images: (B, 3, H, W) in [0, 1].
        brightness: a; the factor is sampled from [max(0, 1 - a), 1 + a).
        contrast: as brightness.
        saturation: as brightness.
        hue: a; the shift is sampled from [-a, a), as a fraction of a full circle.
        p: probability that an image is changed.
    """
    n = len(images)

    def factor(reach: float) -> Tensor:
        return uniform(n, max(0.0, 1 - reach), 1 + reach, images).view(-1, 1, 1, 1)

    operations: list[Callable[[Tensor], Tensor]] = [
        lambda x: adjust_brightness(x, factor(brightness)),
        lambda x: adjust_contrast(x, factor(contrast)),
        lambda x: adjust_saturation(x, factor(saturation)),
        lambda x: adjust_hue(x, uniform(n, -hue, hue, images).view(-1, 1, 1, 1)),
    ]
    changed = images
    for operation in random.sample(operations, 4):  # from Python's generator: reading a tensor would make a GPU wait
        changed = operation(changed)
    return _apply_with_prob(p, changed, images)


def random_grayscale(images: Tensor, p: float = 0.2) -> Tensor:
    """Convert each image (B, 3, H, W) to three equal gray channels with probability p."""
    return _apply_with_prob(p, rgb_to_grayscale(images), images)


def blur_weights(sigma: Tensor, size: int) -> Tensor:
    """Compute the weights of a Gaussian blur along one axis, with the image reflected at its edges.

    Args:
        sigma: (B,), standard deviation in pixels.
        size: pixels along the axis.

    Returns:
        (B, size, size); each row sums to 1.
    """
    pixel = torch.arange(size, device=sigma.device)
    distance = (pixel[:, None] - pixel).abs()
    over_start = pixel[:, None] + pixel + 1  # distance to a pixel's reflection; the border pixel is repeated
    over_end = 2 * size - over_start
    kernel = torch.exp(-0.5 * (torch.arange(2 * size, device=sigma.device) / sigma[:, None]) ** 2)  # (B, 2 size)
    weights = kernel[:, distance] + kernel[:, over_start] + kernel[:, over_end]
    return weights / weights.sum(-1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (B, 3, H, W) with its own standard deviation, sigma (B,) in pixels; edges are reflected."""
    height, width = images.shape[-2:]
    rows = blur_weights(sigma, height)
    return separable_resample(images, rows, rows if height == width else blur_weights(sigma, width))


def random_gaussian_blur(images: Tensor, p: float, min_sigma: float = 0.1, max_sigma: float = 2.0) -> Tensor:
    """Blur each image with probability p, with sigma sampled from [min_sigma, max_sigma) pixels.

    Nothing is done if `max_sigma` is at most `NEGLIGIBLE_SIGMA`.
    """
    if p == 0 or max_sigma <= NEGLIGIBLE_SIGMA:
        return images
    return _apply_with_prob(p, gaussian_blur(images, uniform(len(images), min_sigma, max_sigma, images)), images)


def random_solarize(images: Tensor, p: float, threshold: float = 0.5) -> Tensor:
    """Invert the pixels that are at least as bright as the threshold, in each image with probability p."""
    if p == 0:
        return images
    return _apply_with_prob(p, torch.where(images >= threshold, 1 - images, images), images)
