"""What views are made of beside torchvision's operations, Pillow's resize and scipy's blur."""

import random

import numpy as np
import torch
from torch import Tensor

from minissl import augment
from tests.parity.ledger import Draw, Sides, compared


def pictures(draw: Draw) -> Tensor:
    return draw.uniform(draw.whole(1, 3), 3, draw.whole(8, 24), draw.whole(8, 24))


@compared("a box cut out and resized", "pillow", augment.crop_resize, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Pillow's float pictures, channel by channel."""
    from PIL import Image

    images, size = pictures(draw), draw.whole(4, 30)
    boxes = []
    for _ in images:
        height, width = draw.whole(4, images.shape[2]), draw.whole(4, images.shape[3])
        boxes.append((draw.whole(0, images.shape[2] - height), draw.whole(0, images.shape[3] - width), height, width))
    columns = [torch.tensor(column, dtype=draw.dtype) for column in zip(*boxes)]

    def resized(channel: Tensor, top: int, left: int, height: int, width: int) -> np.ndarray:
        box = channel[top : top + height, left : left + width].contiguous().numpy()
        return np.array(Image.fromarray(box).resize((size, size), Image.Resampling.BICUBIC))

    def theirs() -> Tensor:
        return torch.tensor(np.array([[resized(x, *box) for x in image] for image, box in zip(images, boxes)])).clamp(
            0, 1
        )

    return Sides(lambda: augment.crop_resize(images, *columns, size), theirs)


@compared("the boxes that are drawn", "a loop", augment.draw_crops, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """The loop reads the same random numbers in their order."""
    n, high, wide = draw.whole(2, 5), draw.whole(8, 20), draw.whole(8, 20)
    scale, images = (draw.real(0.05, 0.3), draw.real(0.4, 1.0)), draw.uniform(n, 3, high, wide)

    def ours() -> Tensor:
        torch.manual_seed(draw.seed)
        return torch.stack(augment.draw_crops(n, high, wide, scale, images))

    def theirs() -> Tensor:
        torch.manual_seed(draw.seed)
        areas, ratios = torch.rand(10, n), torch.rand(10, n)
        tops, lefts = torch.rand(n), torch.rand(n)
        boxes = []
        for i in range(n):
            area = [high * wide * (a * (scale[1] - scale[0]) + scale[0]) for a in areas[:, i].tolist()]
            ratio = [(4 / 3) ** (2 * r - 1) for r in ratios[:, i].tolist()]
            tries = [(round((a / r) ** 0.5), round((a * r) ** 0.5)) for a, r in zip(area, ratio)]
            h, w = next((h, w) for h, w in tries if 1 <= h <= high and 1 <= w <= wide)
            boxes.append((int(tops[i] * (high - h + 1)), int(lefts[i] * (wide - w + 1)), h, w))
        return torch.tensor(boxes).T

    return Sides(ours, theirs)


def adjusted(draw: Draw, *kinds: str) -> Sides:
    """Each kind by an amount of its own."""
    from torchvision.transforms.v2 import functional as tv

    images, amounts = pictures(draw), [draw.real(-0.5, 0.5) if kind == "hue" else draw.real(0, 2) for kind in kinds]

    def ours() -> list[Tensor]:
        whole = [torch.full((len(images), 1, 1, 1), amount, dtype=draw.dtype) for amount in amounts]
        return [getattr(augment, f"adjust_{kind}")(images, amount) for kind, amount in zip(kinds, whole)]

    return Sides(ours, lambda: [getattr(tv, f"adjust_{kind}")(images, amount) for kind, amount in zip(kinds, amounts)])


@compared("brightness, contrast, saturation", "torchvision", augment.adjust_brightness, augment.adjust_contrast,
          augment.adjust_saturation, fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    return adjusted(draw, "brightness", "contrast", "saturation")


@compared("hue", "torchvision", augment.adjust_hue, fp64=1e-5, fp32=1e-5)
def _(draw: Draw) -> Sides:
    return adjusted(draw, "hue")


@compared("grey, mirrored, solarised, normalised", "torchvision", augment.grey, augment.flip, augment.solarize,
          augment.normalize, augment.random_grey, fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    from torchvision.transforms.v2 import functional as tv

    images, threshold = pictures(draw), draw.real(0.2, 0.8)

    def ours() -> list[Tensor]:
        solar = augment.solarize(images, 1.0, threshold)
        greys = [augment.grey(images), augment.random_grey(images, 1.0).expand_as(images)]
        return [*greys, augment.flip(images, 1.0), solar, augment.normalize(images)]

    def theirs() -> list[Tensor]:
        greys = [tv.rgb_to_grayscale(images), tv.rgb_to_grayscale(images, 3)]
        normal = tv.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return [*greys, tv.horizontal_flip(images), tv.solarize(images, threshold), normal]

    return Sides(ours, theirs)


@compared("a blur, reflected at the edges", "scipy", augment.gaussian_blur, fp32=1e-5)
def _(draw: Draw) -> Sides:
    from scipy.ndimage import gaussian_filter

    images = pictures(draw)
    sigma = draw.uniform(len(images), low=0.3, high=1.2)

    def theirs() -> Tensor:
        each = [
            gaussian_filter(x.double().numpy(), (0, float(s), float(s)), mode="reflect", truncate=8)
            for x, s in zip(images, sigma)
        ]
        return torch.from_numpy(np.stack(each))

    return Sides(lambda: augment.gaussian_blur(images, sigma), theirs)


@compared("a jitter of all four in any order", "torchvision", augment.color_jitter, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Torchvision's operations, by the order and the amounts that the same seeds give."""
    from torchvision.transforms.v2 import functional as tv

    images, reach = pictures(draw), [draw.real(0.1, 0.8) for _ in range(3)] + [draw.real(0.05, 0.4)]
    kinds = ("brightness", "contrast", "saturation", "hue")

    def seeded() -> None:
        torch.manual_seed(draw.seed)
        random.seed(draw.seed)

    def ours() -> Tensor:
        seeded()
        return augment.color_jitter(images, *reach, p=1.0)

    def theirs() -> Tensor:
        seeded()
        found = list(images)
        for k in random.sample(range(4), 4):
            low, high = (-reach[3], reach[3]) if k == 3 else (max(0.0, 1 - reach[k]), 1 + reach[k])
            amounts = (torch.rand(len(images)) * (high - low) + low).tolist()
            found = [getattr(tv, f"adjust_{kinds[k]}")(x, amount) for x, amount in zip(found, amounts)]
        return torch.stack(found)

    return Sides(ours, theirs)
