"""Each image operation equals torchvision's for given parameters, and does not change its input.

Known differences from torchvision: the Gaussian blur has no finite kernel and repeats the border pixel, so only the
interior is compared; the crop's resize is compared with antialiasing, whose overshoot torchvision does not clamp.
"""

import itertools
import math
import random

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from minissl.data.transforms import functional


@pytest.fixture
def images():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 9, 9), size=(40, 48), mode="bicubic").clamp(0, 1)
    return (0.8 * smooth + 0.2 * torch.rand(4, 3, 40, 48)).clamp(0, 1)


def per_image(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_crop_resize_equals_torchvision(images, size):
    top, left, height, width = ([0, 3, 10, 5], [0, 8, 2, 30], [40, 20, 9, 32], [48, 16, 41, 10])
    boxes = (torch.tensor(values, dtype=torch.float32) for values in (top, left, height, width))
    crops = functional.crop_resize(images, *boxes, size)
    for i in range(4):
        region = images[i, :, top[i] : top[i] + height[i], left[i] : left[i] + width[i]]
        expected = tv.resize(region, [size, size], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(crops[i], expected.clamp(0, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("operation", "reference", "amount"),
    [
        (functional.adjust_brightness, tv.adjust_brightness, 1.4),
        (functional.adjust_brightness, tv.adjust_brightness, 0.6),
        (functional.adjust_contrast, tv.adjust_contrast, 1.4),
        (functional.adjust_contrast, tv.adjust_contrast, 0.6),
        (functional.adjust_saturation, tv.adjust_saturation, 1.8),
        (functional.adjust_saturation, tv.adjust_saturation, 0.2),
        (functional.adjust_hue, tv.adjust_hue, 0.1),
        (functional.adjust_hue, tv.adjust_hue, -0.37),
    ],
)
def test_color_operations_equal_torchvision(images, operation, reference, amount):
    adjusted = operation(images, per_image(*[amount] * 4))
    torch.testing.assert_close(adjusted, reference(images, amount), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_image_has_its_own_amount(images, name):
    amounts = (0.1, -0.2, 0.0, 0.4) if name == "hue" else (0.3, 1.0, 1.7, 0.0)
    adjusted = getattr(functional, f"adjust_{name}")(images, per_image(*amounts))
    for i, amount in enumerate(amounts):
        torch.testing.assert_close(adjusted[i], getattr(tv, f"adjust_{name}")(images[i], amount), rtol=0, atol=1e-3)


def test_hue_equals_torchvision_at_the_corners_of_the_color_cube_and_for_gray():
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3))).T[None, :, None]  # (1, 3, 1, 27)
    for shift in (-0.5, -0.2, 0.0, 0.15, 0.5):
        adjusted = functional.adjust_hue(corners, per_image(shift))
        torch.testing.assert_close(adjusted, tv.adjust_hue(corners, shift), rtol=0, atol=1e-5)


def test_grayscale_flip_solarize_and_normalize_equal_torchvision(images):
    gray = functional.random_grayscale(images, p=1.0)
    torch.testing.assert_close(functional.rgb_to_grayscale(images), tv.rgb_to_grayscale(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(gray, tv.rgb_to_grayscale(images, num_output_channels=3), rtol=0, atol=1e-5)
    assert torch.equal(functional.random_horizontal_flip(images, p=1.0), tv.horizontal_flip(images))
    assert torch.equal(functional.random_solarize(images, p=1.0), tv.solarize(images, 0.5))
    expected = tv.normalize(images, list(functional.IMAGENET_MEAN), list(functional.IMAGENET_STD))
    torch.testing.assert_close(functional.normalize(images), expected, rtol=1e-5, atol=1e-5)


def test_solarize_inverts_the_same_uint8_pixels_as_torchvision():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    solarized = functional.random_solarize(functional.to_float(images), p=1.0)
    torch.testing.assert_close(solarized, tv.solarize(images, 128).float() / 255)


def test_denormalize_inverts_normalize_of_uint8_and_float_images():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(functional.normalize(images), functional.normalize(images.float() / 255))
    restored = functional.denormalize(functional.normalize(images))
    assert torch.equal((restored * 255).round().to(torch.uint8), images)


def test_one_image_and_a_pil_image_give_a_batch_of_one():
    images = torch.randint(0, 256, (1, 3, 12, 10), dtype=torch.uint8)
    for operation in (
        functional.to_float,
        functional.normalize,
        lambda x: functional.random_resized_crop(x, 8, (0.5, 1.0)),
    ):
        results = []
        for form in (images, images[0], images[0].float() / 255, tv.to_pil_image(images[0])):
            torch.manual_seed(0)
            results.append(operation(form))
        assert all(torch.equal(result, results[0]) for result in results)
    gray = tv.to_pil_image(images[0]).convert("L")
    assert functional.to_float(gray).shape == (1, 3, 12, 10)


def test_blur_equals_torchvision_in_the_interior(images):
    blurred = functional.gaussian_blur(images, torch.tensor([0.5, 1.0, 1.5, 2.0]))
    for i, sigma in enumerate((0.5, 1.0, 1.5, 2.0)):
        expected = tv.gaussian_blur(images[i], [25, 25], [sigma, sigma])
        torch.testing.assert_close(blurred[i, :, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], rtol=0, atol=1e-3)


def test_a_blur_that_shows_in_no_pixel_is_left_out(images):
    sigma = functional.NEGLIGIBLE_SIGMA
    assert functional.blur_weights(torch.tensor([sigma]), 9)[0, 4, 3] < 1 / 255
    assert functional.random_gaussian_blur(images, 1.0, max_sigma=sigma) is images
    assert functional.random_gaussian_blur(images, 1.0, sigma, 2 * sigma) is not images


def test_blur_keeps_a_constant_image_up_to_the_border(images):
    constant = torch.full_like(images, 0.3)
    torch.testing.assert_close(functional.gaussian_blur(constant, torch.full((4,), 2.0)), constant)


def test_blur_reflects_the_border():
    line = torch.tensor([0.1, 0.9, 0.4, 0.7])
    weight = [math.exp(-0.5 * (d / 1.3) ** 2) for d in range(8)]
    reflected = torch.cat([line.flip(0), line, line.flip(0)])  # pixel i of the line is pixel 4 + i here
    expected = []
    for i in range(4):
        terms = [(weight[abs(4 + i - j)], float(reflected[j])) for j in range(12)]
        expected.append(sum(w * value for w, value in terms) / sum(w for w, _ in terms))
    blurred = functional.gaussian_blur(line.expand(1, 3, 4, 4), torch.tensor([1.3]))
    # The sum above ends after one reflection on each side.
    torch.testing.assert_close(blurred[0, 0, 2], torch.tensor(expected), rtol=0, atol=2e-4)


OPERATIONS = {
    "normalize": functional.normalize,
    "denormalize": functional.denormalize,
    "random_resized_crop": lambda x: functional.random_resized_crop(x, 16, (0.2, 1.0)),
    "random_horizontal_flip": functional.random_horizontal_flip,
    "color_jitter": lambda x: functional.color_jitter(x, 0.8, 0.8, 0.8, 0.2),
    "random_grayscale": functional.random_grayscale,
    "random_gaussian_blur": lambda x: functional.random_gaussian_blur(x, 0.5),
    "random_solarize": lambda x: functional.random_solarize(x, 0.5),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_does_not_change_its_input_and_is_determined_by_the_seed(images, operation):
    original, results = images.clone(), []
    for _ in range(2):
        torch.manual_seed(3)
        random.seed(3)
        results.append(operation(images))
    assert torch.equal(images, original)
    assert torch.equal(*results)
    assert results[0].dtype == torch.float32
    if operation is not functional.normalize:
        assert results[0].min() >= -1e-6
        assert results[0].max() <= 1 + 1e-6
