"""Alignment and uniformity are means over pairs, as their definitions say."""

import math

import pytest
import torch

from minissl.evaluate.spread import alignment, uniformity


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip((a / a.norm()).tolist(), (b / b.norm()).tolist()))


def test_alignment_equals_the_loop():
    a, b = rows(6, 5), rows(6, 5, seed=1)
    expected = sum(squared_distance(x, y) for x, y in zip(a, b)) / 6
    assert alignment(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_equals_the_loop_over_pairs(t):
    x = rows(7, 5)
    pairs = [math.exp(-t * squared_distance(x[i], x[j])) for i in range(7) for j in range(i)]
    assert len(pairs) == 21
    assert uniformity(x, t) == pytest.approx(math.log(sum(pairs) / 21), rel=1e-10)
    assert uniformity(x) == uniformity(x, 2.0)


def test_one_point_is_aligned_and_not_spread():
    x = rows(1, 5).expand(6, 5)
    assert alignment(x, x) == pytest.approx(0, abs=1e-12)
    assert uniformity(x) == pytest.approx(0, abs=1e-12)


def test_opposite_partners_are_as_far_apart_as_can_be():
    x = rows(6, 5)
    assert alignment(x, -x) == pytest.approx(4)
    assert uniformity(torch.stack([x[0], -x[0]])) == pytest.approx(-8)


def test_strangers_are_two_apart_and_spread():
    a, b = rows(300, 1000), rows(300, 1000, seed=1)
    assert alignment(a, b) == pytest.approx(2, abs=0.02)
    assert uniformity(a) == pytest.approx(-4, abs=0.02)


def test_only_directions_count():
    a, b = rows(6, 5), rows(6, 5, seed=1)
    lengths = torch.arange(1.0, 7)[:, None]
    assert alignment(a * lengths, 3 * b) == pytest.approx(alignment(a, b), rel=1e-10)
    assert uniformity(a * lengths) == pytest.approx(uniformity(a), rel=1e-10)
