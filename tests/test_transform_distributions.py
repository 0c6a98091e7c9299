"""Random transforms have the stated probabilities and ranges, independently for each image.

Samples are compared with their distributions by the Kolmogorov-Smirnov test at the 1 % level, with fixed seeds.
"""

import itertools
import math
import random

import pytest
import torch

from minissl.data.transforms import functional

MANY = 4000


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(4, 3, 40, 48)


@pytest.fixture
def many(images):
    """The same small image many times, so that only random parameters differ; no value of it is clipped."""
    torch.manual_seed(1)
    random.seed(1)
    return (0.3 + 0.2 * images[:1, :, :8, :8]).expand(MANY, -1, -1, -1)


def is_uniform(samples, low, high):
    """Kolmogorov-Smirnov test at the 1 % level: the largest distance of the empirical distribution function."""
    cdf = ((samples.flatten().double().sort().values - low) / (high - low)).clamp(0, 1)
    return (cdf - (torch.arange(len(cdf)) + 0.5) / len(cdf)).abs().max() < 1.63 / math.sqrt(len(cdf))


def changed(after, before):
    """Return which images differ, (B,) bool."""
    return (after != before).flatten(1).any(1)


def test_the_uniformity_test_rejects_other_distributions():
    torch.manual_seed(0)
    uniform = torch.rand(MANY)
    assert is_uniform(uniform, 0, 1)
    assert not any(is_uniform(x, 0, 1) for x in (uniform**1.1, 0.95 * uniform, uniform.round(decimals=1)))


def test_crops_have_the_stated_areas_and_aspect_ratios():
    torch.manual_seed(0)
    top, left, h, w = functional.sample_crop_boxes(MANY, 100, 100, (0.4, 1.0), torch.empty(0))
    area, aspect = h * w / 1e4, w / h
    assert 0.38 < area.min() < 0.45
    assert area.max() <= 1
    assert aspect.min() > 0.72
    assert aspect.max() < 1.38
    assert aspect.log().mean().abs() < 0.02  # wide and tall equally often
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 100).all()
    assert (left + w <= 100).all()


def test_crops_that_always_fit_are_uniform_in_area_log_aspect_and_position():
    torch.manual_seed(0)
    side = 10_000  # rounding to whole pixels is negligible
    top, left, h, w = functional.sample_crop_boxes(MANY, side, side, (0.05, 0.4), torch.empty(0))
    assert is_uniform(h * w / side**2, 0.05, 0.4)
    assert is_uniform((w / h).log(), -math.log(4 / 3), math.log(4 / 3))
    assert is_uniform(top / (side - h), 0, 1)
    assert is_uniform(left / (side - w), 0, 1)
    assert abs(torch.corrcoef(torch.stack([h * w, (w / h).log(), top, left])).triu(1)[0, 1]) < 0.05


def test_a_crop_that_never_fits_is_the_center_in_the_nearest_aspect_ratio():
    top, left, h, w = functional.sample_crop_boxes(5, 10, 100, (1.0, 1.0), torch.empty(0))
    assert set(zip(*(x.tolist() for x in (top, left, h, w)))) == {(0.0, 43.0, 10.0, 13.0)}


def test_operations_have_the_stated_probabilities(many):
    def fraction(images):
        return changed(images, many).float().mean().item()

    assert fraction(functional.random_horizontal_flip(many)) == pytest.approx(0.5, abs=0.03)
    assert fraction(functional.random_horizontal_flip(many, 0.2)) == pytest.approx(0.2, abs=0.03)
    assert fraction(functional.color_jitter(many, 0.4, 0.4, 0.2, 0.1)) == pytest.approx(0.8, abs=0.03)
    assert fraction(functional.random_gaussian_blur(many, 0.1, min_sigma=0.3)) == pytest.approx(0.1, abs=0.03)
    # A sigma below 0.16 pixels changes no float32.
    assert fraction(functional.random_gaussian_blur(many, 1.0, min_sigma=0.3)) == 1
    assert fraction(functional.random_solarize(many, 0.2, threshold=0.4)) == pytest.approx(0.2, abs=0.03)
    gray = functional.random_grayscale(many, 0.2)
    assert (gray[:, 0] == gray[:, 1]).flatten(1).all(1).float().mean().item() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("operation", [functional.random_gaussian_blur, functional.random_solarize])
def test_probability_zero_samples_no_random_numbers(images, operation):
    state = torch.get_rng_state()
    assert operation(images, 0.0) is images
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "strength", "low", "high"),
    [
        ("brightness", 0.4, 0.6, 1.4),
        ("contrast", 0.8, 0.2, 1.8),
        ("saturation", 1.5, 0.0, 2.5),
        ("hue", 0.1, -0.1, 0.1),
    ],
)
def test_every_image_has_its_own_jitter(many, monkeypatch, name, strength, low, high):
    amounts = []
    adjust = getattr(functional, f"adjust_{name}")
    monkeypatch.setattr(functional, f"adjust_{name}", lambda x, amount: amounts.append(amount) or adjust(x, amount))
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | {name: strength}
    functional.color_jitter(many, **strengths)
    assert amounts[0].shape == (MANY, 1, 1, 1)
    assert is_uniform(amounts[0], low, high)


def test_jitter_has_all_24_orders_with_equal_probability(images, monkeypatch):
    orders, names = [], ("brightness", "contrast", "saturation", "hue")
    for name in names:
        adjust = getattr(functional, f"adjust_{name}")
        recorder = lambda x, a, f=adjust, n=name: orders[-1].append(n) or f(x, a)  # noqa: E731
        monkeypatch.setattr(functional, f"adjust_{name}", recorder)
    random.seed(0)
    for _ in range(24 * 40):
        orders.append([])
        functional.color_jitter(images[:1, :, :2, :2], 0.4, 0.4, 0.2, 0.1)
    counts = torch.tensor([orders.count(list(order)) for order in itertools.permutations(names)])
    assert counts.sum() == len(orders)
    assert ((counts - 40) ** 2 / 40).sum() < 41.6  # chi-square, 23 degrees of freedom: p < 0.01


def test_the_order_of_the_jitter_matters(images):
    results = []
    for order in range(20):
        torch.manual_seed(0)
        random.seed(order)
        results.append(functional.color_jitter(images, 0.4, 0.4, 0.2, 0.1))
    assert not all(torch.equal(results[0], other) for other in results)


def test_every_blurred_image_has_its_own_sigma():
    """The neighbor of a bright pixel gets exp(-1 / (2 sigma^2)) times its value."""
    torch.manual_seed(0)
    dots = torch.zeros(MANY, 3, 17, 17)
    dots[:, :, 8, 8] = 1
    blurred = functional.random_gaussian_blur(dots, 1.0, 0.2, 1.0)[:, 0].double()
    assert is_uniform((-0.5 / (blurred[:, 8, 9] / blurred[:, 8, 8]).log()).sqrt(), 0.2, 1.0)


def test_operations_are_independent_of_each_other(many):
    """A flip and a grayscale conversion coincide with the product of their probabilities."""
    flipped = changed(functional.random_horizontal_flip(many), many)
    gray = changed(functional.random_grayscale(many, 0.5), many)
    assert (flipped & gray).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(flipped[1:], flipped[:-1])
