"""Operations are drawn as often and as far as they say, for each image on its own.

Draws are compared with their distributions by Kolmogorov and Smirnov's test at 1 %, with fixed seeds.
"""

import itertools
import math
import random

import pytest
import torch

from minissl import augment

MANY = 4000


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(4, 3, 40, 48)


@pytest.fixture
def many(images):
    """The same small image many times, so that what differs is what was drawn; no channel of it is cut off."""
    torch.manual_seed(1)
    random.seed(1)
    return (0.3 + 0.2 * images[:1, :, :8, :8]).expand(MANY, -1, -1, -1)


def is_uniform(found, low, high):
    """Kolmogorov-Smirnov at 1 %: the largest distance between the shares found and expected below a value."""
    shares = ((found.flatten().double().sort().values - low) / (high - low)).clamp(0, 1)
    return (shares - (torch.arange(len(shares)) + 0.5) / len(shares)).abs().max() < 1.63 / math.sqrt(len(shares))


def changed(found, before):
    """(B,) bool."""
    return (found != before).flatten(1).any(1)


def test_what_is_not_uniform_is_seen():
    torch.manual_seed(0)
    even = torch.rand(MANY)
    assert is_uniform(even, 0, 1)
    assert not any(is_uniform(x, 0, 1) for x in (even**1.1, 0.95 * even, even.round(decimals=1)))


def test_crops_cover_the_stated_areas_and_shapes():
    torch.manual_seed(0)
    top, left, h, w = augment.draw_crops(MANY, 100, 100, (0.4, 1.0), torch.empty(0))
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


def test_crops_that_always_fit_are_uniform_in_area_log_aspect_and_place():
    torch.manual_seed(0)
    side = 10_000  # so that whole pixels hardly matter
    top, left, h, w = augment.draw_crops(MANY, side, side, (0.05, 0.4), torch.empty(0))
    assert is_uniform(h * w / side**2, 0.05, 0.4)
    assert is_uniform((w / h).log(), -math.log(4 / 3), math.log(4 / 3))
    assert is_uniform(top / (side - h), 0, 1)
    assert is_uniform(left / (side - w), 0, 1)
    assert abs(torch.corrcoef(torch.stack([h * w, (w / h).log(), top, left])).triu(1)[0, 1]) < 0.05


def test_a_crop_that_never_fits_is_the_middle_in_the_nearest_shape():
    top, left, h, w = augment.draw_crops(5, 10, 100, (1.0, 1.0), torch.empty(0))
    assert set(zip(*(x.tolist() for x in (top, left, h, w)))) == {(0.0, 43.0, 10.0, 13.0)}


def test_things_come_as_often_as_stated(many):
    def share(found):
        return changed(found, many).float().mean().item()

    assert share(augment.flip(many)) == pytest.approx(0.5, abs=0.03)
    assert share(augment.flip(many, 0.2)) == pytest.approx(0.2, abs=0.03)
    assert share(augment.color_jitter(many, 0.4, 0.4, 0.2, 0.1)) == pytest.approx(0.8, abs=0.03)
    assert share(augment.random_blur(many, 0.1, low=0.3)) == pytest.approx(0.1, abs=0.03)
    assert share(augment.random_blur(many, 1.0, low=0.3)) == 1  # less than 0.16 pixels changes no float32
    assert share(augment.solarize(many, 0.2, threshold=0.4)) == pytest.approx(0.2, abs=0.03)
    grey = augment.random_grey(many, 0.2)
    assert (grey[:, 0] == grey[:, 1]).flatten(1).all(1).float().mean().item() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("operation", [augment.random_blur, augment.solarize])
def test_never_is_never_and_draws_nothing(images, operation):
    state = torch.get_rng_state()
    assert operation(images, 0.0) is images
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "reach", "low", "high"),
    [
        ("brightness", 0.4, 0.6, 1.4),
        ("contrast", 0.8, 0.2, 1.8),
        ("saturation", 1.5, 0.0, 2.5),
        ("hue", 0.1, -0.1, 0.1),
    ],
)
def test_every_image_is_jittered_by_its_own_amount(many, monkeypatch, name, reach, low, high):
    amounts = []
    true = getattr(augment, f"adjust_{name}")
    monkeypatch.setattr(augment, f"adjust_{name}", lambda x, amount: amounts.append(amount) or true(x, amount))
    reaches = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | {name: reach}
    augment.color_jitter(many, **reaches)
    assert amounts[0].shape == (MANY, 1, 1, 1)
    assert is_uniform(amounts[0], low, high)


def test_jitter_comes_in_all_24_orders_and_all_but_a_fifth_have_it(images, monkeypatch):
    orders, names = [], ("brightness", "contrast", "saturation", "hue")
    for name in names:
        true = getattr(augment, f"adjust_{name}")
        monkeypatch.setattr(augment, f"adjust_{name}", lambda x, a, f=true, n=name: orders[-1].append(n) or f(x, a))
    random.seed(0)
    for _ in range(24 * 40):
        orders.append([])
        augment.color_jitter(images[:1, :, :2, :2], 0.4, 0.4, 0.2, 0.1)
    counts = torch.tensor([orders.count(list(order)) for order in itertools.permutations(names)])
    assert counts.sum() == len(orders)
    assert ((counts - 40) ** 2 / 40).sum() < 41.6  # chi-squared of 23 degrees of freedom, 1 %


def test_the_order_of_the_jitter_matters(images):
    drawn = []
    for order in range(20):
        torch.manual_seed(0)
        random.seed(order)
        drawn.append(augment.color_jitter(images, 0.4, 0.4, 0.2, 0.1))
    assert not all(torch.equal(drawn[0], other) for other in drawn)


def test_every_blurred_image_has_its_own_sigma():
    """A bright pixel shows it: its neighbour gets exp(-1 / (2 sigma^2)) as much as itself."""
    torch.manual_seed(0)
    dots = torch.zeros(MANY, 3, 17, 17)
    dots[:, :, 8, 8] = 1
    blurred = augment.random_blur(dots, 1.0, 0.2, 1.0)[:, 0].double()
    assert is_uniform((-0.5 / (blurred[:, 8, 9] / blurred[:, 8, 8]).log()).sqrt(), 0.2, 1.0)


def test_what_is_drawn_for_an_image_says_nothing_of_another_operation(many):
    """Flip and grey, drawn one after the other, meet as often as chance has it."""
    flipped = changed(augment.flip(many), many)
    greyed = changed(augment.random_grey(many, 0.5), many)
    assert (flipped & greyed).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(flipped[1:], flipped[:-1])
