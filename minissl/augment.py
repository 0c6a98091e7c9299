"""Operations on images, for a whole batch at once, on the device the images are on: what views are made of.

Each image has its own draw of every operation. Nothing here loops over images, leaves the device or makes a GPU wait,
and no image is changed in place. They equal torchvision's given the same parameters; the blur has no cut-off.

Shapes: B images of H x W pixels, S x S pixels after a resize. Images are float32 in [0, 1] until `normalize`.
Randomness comes from torch's generator, the order of the jitter from Python's, so two seeds make a draw come back.
"""

import math
import random

import torch
from torch import Tensor

from minissl.parallel import rand

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every method of the course uses them
GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision and Pillow use it


def to_float(images: Tensor) -> Tensor:
    """uint8, or float in [0, 1] already, to float in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalize(images: Tensor) -> Tensor:
    """What an encoder eats: uint8 (B, 3, H, W), or float in [0, 1], to float32 with ImageNet's mean and deviation."""
    images = to_float(images)
    # Channel by channel, with numbers: a small tensor made here would make a GPU wait for its copy.
    return torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)


def denormalize(images: Tensor) -> Tensor:
    """Back from what an encoder eats to something to look at: (B, 3, H, W) float to [0, 1]."""
    return torch.stack([images[:, c] * STD[c] + MEAN[c] for c in range(3)], dim=1).clamp(0, 1)


def uniform(n: int, low: float, high: float, like: Tensor) -> Tensor:
    """(n,) float32 numbers in [low, high) on the device of `like`."""
    return rand(n, device=like.device) * (high - low) + low


def along_both_axes(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What is linear along each axis is two matrix products: (B, S, H), (B, 3, H, W), (B, T, W) to (B, 3, S, T)."""
    # Autocast would multiply pixels as bfloat16 numbers, which are rounded to 1 part in 256.
    with torch.autocast(images.device.type, enabled=False):
        wide = images.flatten(1, 2) @ columns.mT  # (B, 3 H, T): the three channels share one product
        return rows[:, None] @ wide.unflatten(1, (3, -1))


def _where(p: float, changed: Tensor, images: Tensor) -> Tensor:
    """Take the changed image with probability p, each image for itself."""
    chosen = rand(len(images), device=images.device) < p
    return torch.where(chosen.view(-1, 1, 1, 1), changed, images)


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
    near, far = (1 - x).clamp_min(0), (2 - x).clamp_min(0)
    # Keys' two cubics, for x in [0, 1] and [1, 2], as one sum: each part is 0 beyond its knot, so nothing is chosen.
    weights = (near * near * (1 - 2 * near) + far * far * (far - 1) / 2) * inside
    return weights / weights.sum(-1, keepdim=True)


def crop_resize(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: int) -> Tensor:
    """Cut a box, (B,) each, in pixels, out of every image (B, 3, H, W); resize it to (B, 3, size, size), in [0, 1]."""
    rows = resize_weights(top, height, images.shape[-2], size)  # (B, S, H)
    columns = resize_weights(left, width, images.shape[-1], size)  # (B, S, W)
    return along_both_axes(images, rows, columns).clamp(0, 1)


def draw_crops(n: int, height: int, width: int, scale: tuple[float, float], like: Tensor) -> tuple[Tensor, ...]:
    """Random boxes: area a share in `scale` of the image, aspect 3/4 to 4/3. Returns top, left, height, width, (n,).

    Whole pixels, as torchvision draws them. A box that does not fit is drawn again, up to ten times; then the image's
    middle is taken, as torchvision does.
    """
    area = height * width * (rand(10, n, device=like.device, rows=1) * (scale[1] - scale[0]) + scale[0])
    ratio = torch.exp((rand(10, n, device=like.device, rows=1) * 2 - 1) * math.log(4 / 3))
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


def random_resized_crop(images: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
    """uint8 or float (B, 3, H, W) to float (B, 3, size, size) in [0, 1]: a box of `draw_crops` each."""
    images = to_float(images)
    return crop_resize(images, *draw_crops(len(images), *images.shape[-2:], scale, images), size)


def flip(images: Tensor, p: float = 0.5) -> Tensor:
    """Left to right, each image with probability p."""
    return _where(p, images.flip(-1), images)


def grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) to its luma (B, 1, H, W)."""
    return sum(weight * images[:, c : c + 1] for c, weight in enumerate(GREY))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards black; factor (B, 1, 1, 1), 1 leaves the image."""
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards the image's mean grey; factor (B, 1, 1, 1), 1 leaves the image."""
    mean = grey(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Towards grey, pixel by pixel; factor (B, 1, 1, 1), 1 leaves the image."""
    return torch.lerp(grey(images), images, factor).clamp_(0, 1)


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
    k = (n + (hue + 6 * turn)).remainder(6)
    return value - spread * torch.minimum(k, 4 - k).clamp_(0, 1)


def color_jitter(
    images: Tensor, brightness: float, contrast: float, saturation: float, hue: float, p: float = 0.8
) -> Tensor:
    """Brightness, contrast, saturation and hue by random amounts, in a random order, each image with probability p.

    The amounts are each image's own, factors from [max(0, 1 - a), 1 + a) and turns from [-hue, hue); the order is
    shared, so that the batch stays a batch (24 orders would be 24 groups).
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
    """Without colour, three equal channels, each image with probability p."""
    return _where(p, grey(images), images)


def blur_weights(sigma: Tensor, size: int) -> Tensor:
    """How much of every pixel each pixel gets: (B, size, size), each row sums to 1; sigma (B,) in pixels.

    What would fall over an edge is folded back, as if the image were reflected there, its border pixel repeated.
    """
    pixel = torch.arange(size, device=sigma.device)
    straight = (pixel[:, None] - pixel).abs()
    over_start = pixel[:, None] + pixel + 1
    over_end = 2 * size - over_start
    by_distance = torch.exp(-0.5 * (torch.arange(2 * size, device=sigma.device) / sigma[:, None]) ** 2)  # (B, 2 size)
    weights = by_distance[:, straight] + by_distance[:, over_start] + by_distance[:, over_end]
    return weights / weights.sum(-1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur (B, 3, H, W) with a deviation of its own for each image, sigma (B,) in pixels, edges reflected."""
    height, width = images.shape[-2:]
    rows = blur_weights(sigma, height)
    return along_both_axes(images, rows, rows if height == width else blur_weights(sigma, width))


def random_blur(images: Tensor, p: float, low: float = 0.1, high: float = 2.0) -> Tensor:
    """Blur with sigma from [low, high) pixels, each image with probability p."""
    if p == 0:
        return images
    return _where(p, gaussian_blur(images, uniform(len(images), low, high, images)), images)


def solarize(images: Tensor, p: float, threshold: float = 0.5) -> Tensor:
    """Invert what is at least as bright as the threshold, each image with probability p."""
    if p == 0:
        return images
    return _where(p, torch.where(images >= threshold, 1 - images, images), images)
