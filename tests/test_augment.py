"""Each operation equals torchvision's given the same parameters, and leaves the images it is given.

What differs from torchvision: Gaussian blur has no cut-off and repeats the border pixel, so only the interior is
compared; the crop's resize is compared with antialiasing on, and torchvision leaves its overshoot to be clamped.
"""

import itertools
import math
import random

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from minissl import augment


@pytest.fixture
def images():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 9, 9), size=(40, 48), mode="bicubic").clamp(0, 1)
    return (0.8 * smooth + 0.2 * torch.rand(4, 3, 40, 48)).clamp(0, 1)


def column(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_crop_and_resize_equal_torchvision(images, size):
    top, left, height, width = ([0, 3, 10, 5], [0, 8, 2, 30], [40, 20, 9, 32], [48, 16, 41, 10])
    box = (torch.tensor(t, dtype=torch.float32) for t in (top, left, height, width))
    ours = augment.crop_resize(images, *box, size)
    for i in range(4):
        part = images[i, :, top[i] : top[i] + height[i], left[i] : left[i] + width[i]]
        theirs = tv.resize(part, [size, size], interpolation=tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "factor"),
    [
        (augment.adjust_brightness, tv.adjust_brightness, 1.4),
        (augment.adjust_brightness, tv.adjust_brightness, 0.6),
        (augment.adjust_contrast, tv.adjust_contrast, 1.4),
        (augment.adjust_contrast, tv.adjust_contrast, 0.6),
        (augment.adjust_saturation, tv.adjust_saturation, 1.8),
        (augment.adjust_saturation, tv.adjust_saturation, 0.2),
        (augment.adjust_hue, tv.adjust_hue, 0.1),
        (augment.adjust_hue, tv.adjust_hue, -0.37),
    ],
)
def test_colour_operations_equal_torchvision(images, ours, theirs, factor):
    torch.testing.assert_close(ours(images, column(*[factor] * 4)), theirs(images, factor), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_image_has_its_own_amount(images, name):
    amounts = (0.1, -0.2, 0.0, 0.4) if name == "hue" else (0.3, 1.0, 1.7, 0.0)
    together = getattr(augment, f"adjust_{name}")(images, column(*amounts))
    for i, amount in enumerate(amounts):
        torch.testing.assert_close(together[i], getattr(tv, f"adjust_{name}")(images[i], amount), rtol=0, atol=1e-3)


def test_hue_knows_every_corner_of_the_cube_and_grey():
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3))).T[None, :, None]  # (1, 3, 1, 27)
    for turn in (-0.5, -0.2, 0.0, 0.15, 0.5):
        torch.testing.assert_close(
            augment.adjust_hue(corners, column(turn)), tv.adjust_hue(corners, turn), rtol=0, atol=1e-5
        )


def test_grey_flip_solarise_and_normalise_equal_torchvision(images):
    torch.testing.assert_close(augment.grey(images), tv.rgb_to_grayscale(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        augment.random_grey(images, p=1.0), tv.rgb_to_grayscale(images, num_output_channels=3), rtol=0, atol=1e-5
    )
    assert torch.equal(augment.flip(images, p=1.0), tv.horizontal_flip(images))
    assert torch.equal(augment.solarize(images, p=1.0), tv.solarize(images, 0.5))
    expected = tv.normalize(images, list(augment.MEAN), list(augment.STD))
    torch.testing.assert_close(augment.normalize(images), expected, rtol=1e-5, atol=1e-5)


def test_solarise_inverts_the_same_stored_pixels_as_torchvision():
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    ours = augment.solarize(augment.to_float(stored), p=1.0)
    torch.testing.assert_close(ours, tv.solarize(stored, 128).float() / 255)


def test_normalise_takes_stored_images_and_comes_back():
    stored = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(augment.normalize(stored), augment.normalize(stored.float() / 255))
    assert torch.equal((augment.denormalize(augment.normalize(stored)) * 255).round().to(torch.uint8), stored)


def test_blur_equals_torchvision_inside(images):
    ours = augment.gaussian_blur(images, torch.tensor([0.5, 1.0, 1.5, 2.0]))
    for i, sigma in enumerate((0.5, 1.0, 1.5, 2.0)):
        theirs = tv.gaussian_blur(images[i], [25, 25], [sigma, sigma])
        torch.testing.assert_close(ours[i, :, 12:-12, 12:-12], theirs[:, 12:-12, 12:-12], rtol=0, atol=1e-3)


def test_blur_keeps_the_brightness_up_to_the_border(images):
    flat = torch.full_like(images, 0.3)
    torch.testing.assert_close(augment.gaussian_blur(flat, torch.full((4,), 2.0)), flat)


def test_blur_repeats_the_border_as_the_plain_sum_says():
    line = torch.tensor([0.1, 0.9, 0.4, 0.7])
    weight = [math.exp(-0.5 * (d / 1.3) ** 2) for d in range(8)]
    whole = torch.cat([line.flip(0), line, line.flip(0)])  # pixel i of the line is pixel 4 + i of this
    expected = []
    for i in range(4):
        near = [(weight[abs(4 + i - j)], float(whole[j])) for j in range(12)]
        expected.append(sum(w * value for w, value in near) / sum(w for w, _ in near))
    found = augment.gaussian_blur(line.expand(1, 3, 4, 4), torch.tensor([1.3]))
    torch.testing.assert_close(found[0, 0, 2], torch.tensor(expected), rtol=0, atol=2e-4)  # the sum stops at 3 images


OPERATIONS = {
    "normalize": augment.normalize,
    "denormalize": augment.denormalize,
    "random_resized_crop": lambda x: augment.random_resized_crop(x, 16, (0.2, 1.0)),
    "flip": augment.flip,
    "color_jitter": lambda x: augment.color_jitter(x, 0.8, 0.8, 0.8, 0.2),
    "random_grey": augment.random_grey,
    "random_blur": lambda x: augment.random_blur(x, 0.5),
    "solarize": lambda x: augment.solarize(x, 0.5),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_leaves_its_images_and_comes_back_with_its_seed(images, operation):
    kept, drawn = images.clone(), []
    for _ in range(2):
        torch.manual_seed(3)
        random.seed(3)
        drawn.append(operation(images))
    assert torch.equal(images, kept)
    assert torch.equal(*drawn)
    assert drawn[0].dtype == torch.float32
    if operation is not augment.normalize:
        assert drawn[0].min() >= -1e-6
        assert drawn[0].max() <= 1 + 1e-6
