"""Views: other looks at the same images, drawn for a whole batch at once, on the device the images are on.

Each image has its own draw of every augmentation; nothing here loops over images or leaves the device. Recipes:
Chen et al., SimCLR, 2020 (arXiv:2002.05709); Caron et al., DINO, 2021 (arXiv:2104.14294), section 3.

Shapes: B images, H x W pixels stored, S x S pixels of a view. Stored images are uint8; views are float32 in [0, 1]
until `normalize`. Randomness comes from torch's generator, the order of the jitter from Python's, so two seeds make a
view come back.
"""

import functools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every method of the course uses them
GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision and Pillow use it


def normalize(images: Tensor) -> Tensor:
    """What an encoder eats: uint8 (B, 3, H, W), or float in [0, 1], to float32 with ImageNet's mean and deviation."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    # Channel by channel, with numbers: a small tensor made here would make a GPU wait for its copy.
    return torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)


def uniform(n: int, low: float, high: float, like: Tensor) -> Tensor:
    """(n,) float32 numbers in [low, high) on the device of `like`."""
    return torch.rand(n, device=like.device) * (high - low) + low


def resize_weights(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """The rows of a resize: (B, target, source), each row sums to 1.

    Bicubic (Keys, 1981, a = -0.5) with antialiasing, as Pillow does it: where the crop shrinks, the kernel widens.

    Args:
        start, length: the crop in pixels of the source, (B,) each.
        source, target: pixels before and after.
    """
    step = (length / target)[:, None, None]  # source pixels per target pixel
    center = start[:, None, None] + (torch.arange(target, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    x = ((pixel - center) / step.clamp_min(1)).abs()  # (B, target, source)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * inside
    return weights / weights.sum(-1, keepdim=True)


def draw_crops(n: int, height: int, width: int, scale: tuple[float, float], like: Tensor) -> tuple[Tensor, ...]:
    """Random boxes: area a share in `scale` of the image, aspect 3/4 to 4/3. Returns top, left, height, width, (n,).

    Whole pixels, as torchvision draws them. A box that does not fit is drawn again, up to ten times; then the image's
    middle is taken, as torchvision does.
    """
    tries = (10, n)
    area = height * width * (torch.rand(tries, device=like.device) * (scale[1] - scale[0]) + scale[0])
    ratio = torch.exp((torch.rand(tries, device=like.device) * 2 - 1) * math.log(4 / 3))
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    first = fits.float().argmax(0, keepdim=True)  # the first try that fits, or try 0
    fits = fits.gather(0, first)[0]
    side = min(max(width / height, 3 / 4), 4 / 3)
    fallback = (min(height, round(width / side)), min(width, round(height * side)))
    h = torch.where(fits, h.gather(0, first)[0], float(fallback[0]))
    w = torch.where(fits, w.gather(0, first)[0], float(fallback[1]))
    top = torch.where(fits, (uniform(n, 0, 1, like) * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(fits, (uniform(n, 0, 1, like) * (width - w + 1)).floor(), ((width - w) / 2).floor())
    return top, left, h, w


def full_precision(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Autocast would multiply pixels as bfloat16 numbers, which are rounded to 1 part in 256."""

    @functools.wraps(operation)
    def exact(images: Tensor, *args: Tensor | int) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return operation(images, *args)

    return exact


@full_precision
def crop_resize(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: int) -> Tensor:
    """Cut a box (B,) each out of every image (B, 3, H, W) float and resize it to (B, 3, size, size), in [0, 1].

    Resizing is linear along each axis, so a crop and a resize are two matrix products.
    """
    rows = resize_weights(top, height, images.shape[-2], size)  # (B, S, H)
    columns = resize_weights(left, width, images.shape[-1], size)  # (B, S, W)
    return (rows[:, None] @ images @ columns[:, None].mT).clamp(0, 1)


def random_resized_crop(images: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
    """uint8 or float (B, 3, H, W) to float (B, 3, size, size) in [0, 1]."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return crop_resize(images, *draw_crops(len(images), *images.shape[-2:], scale, images), size)


def flip(images: Tensor, p: float = 0.5) -> Tensor:
    """Left to right, each with probability p."""
    return _where(p, images.flip(-1), images)


def _where(p: float, changed: Tensor, images: Tensor) -> Tensor:
    """Take the changed image with probability p, each image for itself."""
    chosen = torch.rand(len(images), device=images.device) < p
    return torch.where(chosen.view(-1, 1, 1, 1), changed, images)


def grey(images: Tensor) -> Tensor:
    """(B, 1, H, W), the luma."""
    return sum(weight * images[:, c : c + 1] for c, weight in enumerate(GREY))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards black; factor (B, 1, 1, 1), 1 leaves the image."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards the image's mean grey."""
    mean = grey(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Towards grey, pixel by pixel."""
    return torch.lerp(grey(images), images, factor).clamp(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by (B, 1, 1, 1) of a full circle, in HSV: value and saturation stay.

    A channel of an HSV colour is v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6, n = 5, 3, 1 for R, G, B.
    """
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = value - low
    r, g, b = images.split(1, dim=1)
    safe = spread.clamp_min(1e-8)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    n = (5 - 2 * torch.arange(3, device=images.device)).view(1, 3, 1, 1)
    k = (n + hue + 6 * turn).remainder(6)
    return value - spread * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(
    images: Tensor, brightness: float, contrast: float, saturation: float, hue: float, p: float = 0.8
) -> Tensor:
    """Brightness, contrast, saturation and hue by random amounts, in one random order for the batch.

    The amounts are each image's own, factors from [1 - a, 1 + a] and turns from [-hue, hue]; the order is shared, so
    that the batch stays a batch (24 orders would be 24 groups).
    """
    n = len(images)

    def amount(reach: float) -> Tensor:
        return uniform(n, max(0.0, 1 - reach), 1 + reach, images).view(-1, 1, 1, 1)

    changes = [
        lambda x: adjust_brightness(x, amount(brightness)),
        lambda x: adjust_contrast(x, amount(contrast)),
        lambda x: adjust_saturation(x, amount(saturation)),
        lambda x: adjust_hue(x, uniform(n, -hue, hue, images).view(-1, 1, 1, 1)),
    ]
    changed = images
    for change in random.sample(changes, 4):  # Python's draw: a tensor's would make a GPU wait
        changed = change(changed)
    return _where(p, changed, images)


def random_grey(images: Tensor, p: float = 0.2) -> Tensor:
    return _where(p, grey(images).expand_as(images), images)


@full_precision
def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur with a deviation of its own for each image, sigma (B,) in pixels; two matrix products, edges reflected."""
    for axis in (-2, -1):
        pixel = torch.arange(images.shape[axis], device=images.device, dtype=torch.float32)
        size = images.shape[axis]
        distance = pixel[:, None] - torch.cat([-1 - pixel.flip(0), pixel, 2 * size - 1 - pixel.flip(0)])  # (S, 3S)
        weights = torch.exp(-0.5 * (distance / sigma.view(-1, 1, 1)) ** 2)  # (B, S, 3S)
        before, here, after = weights.split(size, dim=-1)
        weights = before.flip(-1) + here + after.flip(-1)  # what falls over the edge is folded back
        weights = weights / weights.sum(-1, keepdim=True)
        images = weights[:, None] @ images if axis == -2 else images @ weights[:, None].mT
    return images


def random_blur(images: Tensor, p: float, low: float = 0.1, high: float = 2.0) -> Tensor:
    """Blur with sigma from [low, high) pixels, each image with probability p."""
    if p == 0:
        return images
    return _where(p, gaussian_blur(images, uniform(len(images), low, high, images)), images)


def solarize(images: Tensor, p: float, threshold: float = 0.5) -> Tensor:
    """Invert what is brighter than the threshold, each image with probability p."""
    if p == 0:
        return images
    return _where(p, torch.where(images >= threshold, 1 - images, images), images)


def distort(images: Tensor, blur: float, solar: float, blur_reach: float = 2.0) -> Tensor:
    """DINO's colour changes to a crop in [0, 1]: flip, jitter, grey, blur, solarise; then normalise."""
    images = random_grey(color_jitter(flip(images), 0.4, 0.4, 0.2, 0.1))
    return normalize(solarize(random_blur(images, blur, high=blur_reach), solar))


def multi_crop(
    images: Tensor,
    size: int,
    local_size: int,
    local_crops: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """DINO's views: two large crops, which the teacher sees, and several small ones.

    Args:
        images: (B, 3, H, W) uint8.
        size, local_size: pixels a side of the two kinds of crop.
        local_crops: how many small ones, L.
        global_scale, local_scale: the share of the image's area they are cut from.

    Returns:
        (2B, 3, size, size) and (L B, 3, local_size, local_size), normalised, crop by crop: row = crop * B + image.
    """
    reach = 2.0 * size / 224  # the paper blurs 224-pixel crops with up to 2 pixels; smaller crops, smaller blur
    images = images.float() / 255
    first = distort(random_resized_crop(images, size, global_scale), 1.0, 0.0, reach)
    second = distort(random_resized_crop(images, size, global_scale), 0.1, 0.2, reach)
    local = images[:0, :, :1, :1].expand(-1, -1, local_size, local_size)
    if local_crops:
        crops = random_resized_crop(images.repeat(local_crops, 1, 1, 1), local_size, local_scale)
        local = distort(crops, 0.5, 0.0, reach)
    return torch.cat([first, second]), local
