"""Operations that make augmented views, compared with torchvision's operations, Pillow's resize and scipy's blur."""

import random

import numpy as np
import torch
from torch import Tensor

from minissl.data.transforms import functional
from tests.parity.ledger import RandomInputs, Sides, comparison


def random_images(rng: RandomInputs) -> Tensor:
    return rng.uniform(rng.integer(1, 3), 3, rng.integer(8, 24), rng.integer(8, 24))


@comparison("crop and resize", "pillow", functional.crop_resize, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """Pillow resizes float images, channel by channel."""
    from PIL import Image

    images, size = random_images(rng), rng.integer(4, 30)
    boxes = []
    for _ in images:
        height, width = rng.integer(4, images.shape[2]), rng.integer(4, images.shape[3])
        boxes.append((rng.integer(0, images.shape[2] - height), rng.integer(0, images.shape[3] - width), height, width))
    columns = [torch.tensor(column, dtype=rng.dtype) for column in zip(*boxes)]

    def resize(channel: Tensor, top: int, left: int, height: int, width: int) -> np.ndarray:
        box = channel[top : top + height, left : left + width].contiguous().numpy()
        return np.array(Image.fromarray(box).resize((size, size), Image.Resampling.BICUBIC))

    def expected() -> Tensor:
        resized = [[resize(channel, *box) for channel in image] for image, box in zip(images, boxes)]
        return torch.tensor(np.array(resized)).clamp(0, 1)

    return Sides(lambda: functional.crop_resize(images, *columns, size), expected)


@comparison("random crop boxes", "explicit loop", functional.sample_crop_boxes, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """The loop reads the same random numbers in the same order."""
    n, high, wide = rng.integer(2, 5), rng.integer(8, 20), rng.integer(8, 20)
    scale, images = (rng.number(0.05, 0.3), rng.number(0.4, 1.0)), rng.uniform(n, 3, high, wide)

    def actual() -> Tensor:
        torch.manual_seed(rng.seed)
        return torch.stack(functional.sample_crop_boxes(n, high, wide, scale, images))

    def expected() -> Tensor:
        torch.manual_seed(rng.seed)
        areas, ratios = torch.rand(10, n), torch.rand(10, n)
        tops, lefts = torch.rand(n), torch.rand(n)
        boxes = []
        for i in range(n):
            area = [high * wide * (a * (scale[1] - scale[0]) + scale[0]) for a in areas[:, i].tolist()]
            ratio = [(4 / 3) ** (2 * r - 1) for r in ratios[:, i].tolist()]
            attempts = [(round((a / r) ** 0.5), round((a * r) ** 0.5)) for a, r in zip(area, ratio)]
            h, w = next((h, w) for h, w in attempts if 1 <= h <= high and 1 <= w <= wide)
            boxes.append((int(tops[i] * (high - h + 1)), int(lefts[i] * (wide - w + 1)), h, w))
        return torch.tensor(boxes).T

    return Sides(actual, expected)


def adjustment_sides(rng: RandomInputs, *names: str) -> Sides:
    """Compare `adjust_NAME` for each name, each with its own random factor."""
    from torchvision.transforms.v2 import functional as tv

    images = random_images(rng)
    factors = [rng.number(-0.5, 0.5) if name == "hue" else rng.number(0, 2) for name in names]

    def actual() -> list[Tensor]:
        by_image = [torch.full((len(images), 1, 1, 1), factor, dtype=rng.dtype) for factor in factors]
        return [getattr(functional, f"adjust_{name}")(images, factor) for name, factor in zip(names, by_image)]

    def expected() -> list[Tensor]:
        return [getattr(tv, f"adjust_{name}")(images, factor) for name, factor in zip(names, factors)]

    return Sides(actual, expected)


@comparison("brightness, contrast, saturation", "torchvision", functional.adjust_brightness, functional.adjust_contrast,
            functional.adjust_saturation, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    return adjustment_sides(rng, "brightness", "contrast", "saturation")


@comparison("hue", "torchvision", functional.adjust_hue, fp64=1e-5, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    return adjustment_sides(rng, "hue")


@comparison("grayscale, flip, solarize, normalize", "torchvision", functional.rgb_to_grayscale,
            functional.random_horizontal_flip, functional.random_solarize, functional.normalize,
            functional.random_grayscale, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    from torchvision.transforms.v2 import functional as tv

    images, threshold = random_images(rng), rng.number(0.2, 0.8)

    def actual() -> list[Tensor]:
        solarized = functional.random_solarize(images, 1.0, threshold)
        gray = [functional.rgb_to_grayscale(images), functional.random_grayscale(images, 1.0).expand_as(images)]
        return [*gray, functional.random_horizontal_flip(images, 1.0), solarized, functional.normalize(images)]

    def expected() -> list[Tensor]:
        gray = [tv.rgb_to_grayscale(images), tv.rgb_to_grayscale(images, 3)]
        normalized = tv.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return [*gray, tv.horizontal_flip(images), tv.solarize(images, threshold), normalized]

    return Sides(actual, expected)


@comparison("Gaussian blur, reflected at the edges", "scipy", functional.gaussian_blur, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    from scipy.ndimage import gaussian_filter

    images = random_images(rng)
    sigma = rng.uniform(len(images), low=0.3, high=1.2)

    def expected() -> Tensor:
        blurred = [
            gaussian_filter(x.double().numpy(), (0, float(s), float(s)), mode="reflect", truncate=8)
            for x, s in zip(images, sigma)
        ]
        return torch.from_numpy(np.stack(blurred))

    return Sides(lambda: functional.gaussian_blur(images, sigma), expected)


@comparison("color jitter in random order", "torchvision", functional.color_jitter, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """torchvision's operations, in the order and with the factors that the same seeds give."""
    from torchvision.transforms.v2 import functional as tv

    images = random_images(rng)
    strengths = [rng.number(0.1, 0.8) for _ in range(3)] + [rng.number(0.05, 0.4)]
    names = ("brightness", "contrast", "saturation", "hue")

    def seed_generators() -> None:
        torch.manual_seed(rng.seed)
        random.seed(rng.seed)

    def actual() -> Tensor:
        seed_generators()
        return functional.color_jitter(images, *strengths, p=1.0)

    def expected() -> Tensor:
        seed_generators()
        jittered = list(images)
        for k in random.sample(range(4), 4):
            low, high = (-strengths[3], strengths[3]) if k == 3 else (max(0.0, 1 - strengths[k]), 1 + strengths[k])
            factors = (torch.rand(len(images)) * (high - low) + low).tolist()
            jittered = [getattr(tv, f"adjust_{names[k]}")(x, factor) for x, factor in zip(jittered, factors)]
        return torch.stack(jittered)

    return Sides(actual, expected)
