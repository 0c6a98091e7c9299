"""Tests of alignment, uniformity and the standard deviation of features."""

import math

import pytest
import torch

from minissl.evaluation import alignment, feature_std, uniformity


def random_features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip((a / a.norm()).tolist(), (b / b.norm()).tolist()))


def test_alignment_equals_the_loop():
    a, b = random_features(6, 5), random_features(6, 5, seed=1)
    expected = sum(squared_distance(x, y) for x, y in zip(a, b)) / 6
    assert alignment(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_equals_the_loop_over_pairs(t):
    x = random_features(7, 5)
    pairs = [math.exp(-t * squared_distance(x[i], x[j])) for i in range(7) for j in range(i)]
    assert len(pairs) == 21
    assert uniformity(x, t) == pytest.approx(math.log(sum(pairs) / 21), rel=1e-10)
    assert uniformity(x) == uniformity(x, 2.0)


def test_feature_std_equals_the_loop():
    x = random_features(7, 5)
    unit = [[value / float(row.norm()) for value in row.tolist()] for row in x]
    stds = []
    for column in zip(*unit):
        mean = sum(column) / 7
        stds.append(math.sqrt(sum((value - mean) ** 2 for value in column) / 7))
    assert feature_std(x) == pytest.approx(sum(stds) / 5, rel=1e-10)


def test_equal_features_have_no_spread():
    x = random_features(1, 5).expand(6, 5)
    assert alignment(x, x) == pytest.approx(0, abs=1e-12)
    assert uniformity(x) == pytest.approx(0, abs=1e-12)
    assert feature_std(x) == pytest.approx(0, abs=1e-12)


def test_opposite_features_have_the_largest_distance():
    x = random_features(6, 5)
    assert alignment(x, -x) == pytest.approx(4)
    assert uniformity(torch.stack([x[0], -x[0]])) == pytest.approx(-8)


def test_values_of_a_uniform_distribution():
    a, b = random_features(300, 1000), random_features(300, 1000, seed=1)
    assert alignment(a, b) == pytest.approx(2, abs=0.02)
    assert uniformity(a) == pytest.approx(-4, abs=0.02)
    assert feature_std(a) == pytest.approx(1000**-0.5, rel=0.01)


def test_the_length_of_features_does_not_matter():
    a, b = random_features(6, 5), random_features(6, 5, seed=1)
    lengths = torch.arange(1.0, 7)[:, None]
    assert alignment(a * lengths, 3 * b) == pytest.approx(alignment(a, b), rel=1e-10)
    assert uniformity(a * lengths) == pytest.approx(uniformity(a), rel=1e-10)
    assert feature_std(a * lengths) == pytest.approx(feature_std(a), rel=1e-10)
