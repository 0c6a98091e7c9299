"""Views equal torchvision's operations given the same parameters, and are drawn as the papers say.

What differs from torchvision: Gaussian blur has no cut-off and repeats the border pixel, so only the interior is
compared; the crop's resize is compared with antialiasing on.
"""

import math
import random

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from minissl import views


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
    ours = views.crop_resize(images, *(torch.tensor(t, dtype=torch.float32) for t in (top, left, height, width)), size)
    for i in range(4):
        box = images[i, :, top[i] : top[i] + height[i], left[i] : left[i] + width[i]]
        theirs = tv.resize(box, [size, size], interpolation=tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "factor"),
    [
        (views.adjust_brightness, tv.adjust_brightness, 1.4),
        (views.adjust_brightness, tv.adjust_brightness, 0.6),
        (views.adjust_contrast, tv.adjust_contrast, 1.4),
        (views.adjust_contrast, tv.adjust_contrast, 0.6),
        (views.adjust_saturation, tv.adjust_saturation, 1.8),
        (views.adjust_saturation, tv.adjust_saturation, 0.2),
        (views.adjust_hue, tv.adjust_hue, 0.1),
        (views.adjust_hue, tv.adjust_hue, -0.37),
    ],
)
def test_colour_operations_equal_torchvision(images, ours, theirs, factor):
    torch.testing.assert_close(ours(images, column(*[factor] * 4)), theirs(images, factor), rtol=0, atol=1e-3)


def test_each_image_has_its_own_amount(images):
    together = views.adjust_hue(images, column(0.1, -0.2, 0.0, 0.4))
    for i, turn in enumerate((0.1, -0.2, 0.0, 0.4)):
        torch.testing.assert_close(together[i], tv.adjust_hue(images[i], turn), rtol=0, atol=1e-3)


def test_grey_flip_solarise_and_normalise_equal_torchvision(images):
    torch.testing.assert_close(views.grey(images), tv.rgb_to_grayscale(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(views.flip(images, p=1.0), tv.horizontal_flip(images))
    torch.testing.assert_close(views.solarize(images, p=1.0), tv.solarize(images, 0.5))
    expected = tv.normalize(images, list(views.MEAN), list(views.STD))
    torch.testing.assert_close(views.normalize(images), expected, rtol=1e-5, atol=1e-5)


def test_normalise_takes_stored_images():
    stored = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(views.normalize(stored), views.normalize(stored.float() / 255))


def test_blur_equals_torchvision_inside(images):
    ours = views.gaussian_blur(images, torch.tensor([0.5, 1.0, 1.5, 2.0]))
    for i, sigma in enumerate((0.5, 1.0, 1.5, 2.0)):
        theirs = tv.gaussian_blur(images[i], [25, 25], [sigma, sigma])
        torch.testing.assert_close(ours[i, :, 12:-12, 12:-12], theirs[:, 12:-12, 12:-12], rtol=0, atol=1e-3)


def test_blur_keeps_the_brightness_up_to_the_border(images):
    flat = torch.full_like(images, 0.3)
    torch.testing.assert_close(views.gaussian_blur(flat, torch.full((4,), 2.0)), flat)


def test_crops_cover_the_stated_areas_and_shapes():
    torch.manual_seed(0)
    n = 4000
    top, left, h, w = views.draw_crops(n, 100, 100, (0.4, 1.0), torch.empty(0))
    area, aspect = h * w / 1e4, w / h
    assert 0.38 < area.min() < 0.45
    assert area.max() <= 1
    assert aspect.min() > 0.72
    assert aspect.max() < 1.38
    assert aspect.log().mean().abs() < 0.02  # as often wide as tall
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 100).all()
    assert (left + w <= 100).all()
    small = views.draw_crops(n, 1000, 1000, (0.05, 0.25), torch.empty(0))
    shares = (small[2] * small[3] / 1e6).sort().values  # always fits, so the area is uniform
    uniform = torch.linspace(0.05, 0.25, n)
    assert (shares - uniform).abs().max() < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 %, on a range of 0.2


def test_flips_and_greys_come_as_often_as_stated(images):
    torch.manual_seed(0)
    many = images[:1].expand(3000, -1, -1, -1)[..., :8, :8]
    assert (views.flip(many) != many).flatten(1).any(1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    grey = views.random_grey(many, 0.2)
    assert (grey[:, 0] == grey[:, 1]).flatten(1).all(1).float().mean().item() == pytest.approx(0.2, abs=0.03)
    jittered = views.color_jitter(many, 0.4, 0.4, 0.2, 0.1)
    assert (jittered != many).flatten(1).any(1).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert len(jittered[:, 0, 0, 0].unique()) > 2000  # everyone its own


def test_multi_crop_is_stored_crop_by_crop():
    torch.manual_seed(0)
    dark_and_bright = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).to(torch.uint8)
    large, small = views.multi_crop(dark_and_bright, 16, 8, 3, (0.4, 1.0), (0.05, 0.4))
    assert large.shape == (4, 3, 16, 16)
    assert small.shape == (6, 3, 8, 8)
    assert large.dtype == torch.float32
    assert large[0].mean() < large[1].mean()  # crop 0: dark, bright
    for crop in small.unflatten(0, (3, 2)):
        assert crop[0].mean() < crop[1].mean()


def test_no_local_crops_is_an_empty_batch():
    large, small = views.multi_crop(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 16, 8, 0, (0.4, 1), (0.05, 0.4))
    assert large.shape == (4, 3, 16, 16)
    assert small.shape == (0, 3, 8, 8)


def test_a_seed_brings_the_views_back_and_leaves_the_images():
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    kept, drawn = images.clone(), []
    for _ in range(2):
        torch.manual_seed(7)
        random.seed(7)
        drawn.append(views.multi_crop(images, 16, 8, 2, (0.4, 1.0), (0.05, 0.4)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert torch.equal(images, kept)


def test_views_are_as_exact_under_autocast(images):
    """bf16 keeps 8 bits of a pixel; the crop, the blur and their callers must not be multiplied in it."""
    pixels = (images * 255).to(torch.uint8)
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found.append(views.multi_crop(pixels, 16, 8, 2, (0.4, 1.0), (0.05, 0.4)))
    for exact, cast in zip(*found):
        assert cast.dtype == torch.float32
        assert torch.equal(exact, cast)
