"""Tests of figures of similarities: each value is a cosine, drawn at its place."""

import math

import pytest
import torch

from minissl.evaluation import dense_patches
from minissl.visualization import matches_figure, neighbors_figure, patch_similarity, similarity_figure
from minissl.visualization.attention import HIT, WRONG
from tests.golden import tiny_vit


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def drawn(axis):
    return torch.as_tensor(axis.images[0].get_array())


def test_patch_similarity_equals_loops():
    torch.manual_seed(0)
    patches = torch.randn(3, 5, 6)
    expected = [[cosine(patches[i, j], patches[2, 1]) for j in range(5)] for i in range(3)]
    torch.testing.assert_close(patch_similarity(patches, 2, 1), torch.tensor(expected))


def test_a_point_is_marked_at_the_same_place_in_the_image_and_in_its_map():
    torch.manual_seed(0)
    encoder, image = tiny_vit().eval(), torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    points = [(5, 20), (31, 0)]
    figure = similarity_figure(encoder, image, 16, points)
    patches = dense_patches(encoder, image[None], 16)[0]  # (8, 8, 32)
    for (row, column), axis in zip(points, figure.axes[1:3]):
        torch.testing.assert_close(drawn(axis), patch_similarity(patches, row // 4, column // 4))
        x, y = (float(value) for value in axis.lines[0].get_xydata()[0])
        assert (x + 0.5) / 8 == pytest.approx((column + 0.5) / 32)
        assert (y + 0.5) / 8 == pytest.approx((row + 0.5) / 32)
        assert drawn(axis).max() == drawn(axis)[row // 4, column // 4]
        assert axis.images[0].get_clim() == figure.axes[1].images[0].get_clim()
    assert [tuple(line.get_xydata()[0][::-1]) for line in figure.axes[0].lines] == points


def test_neighbors_are_the_nearest_by_cosine_without_the_query():
    torch.manual_seed(0)
    images = torch.arange(9, dtype=torch.uint8).view(-1, 1, 1, 1).expand(9, 3, 4, 4)
    features = torch.randn(9, 5)
    figure = neighbors_figure(images, features, [7, 2], n=3)
    for query, axes in zip((7, 2), (figure.axes[:4], figure.axes[4:])):
        others = sorted((-cosine(features[i], features[query]), i) for i in range(9) if i != query)[:3]
        assert [int(drawn(axis)[0, 0, 0]) for axis in axes] == [query, *(i for _, i in others)]
        assert [axis.texts[0].get_text() for axis in axes[1:]] == [f"{-c:.2f}" for c, _ in others]


def test_neighbors_in_another_set():
    torch.manual_seed(0)
    images, features = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.randn(2, 5)
    others = torch.arange(1, 4, dtype=torch.uint8).view(-1, 1, 1, 1).expand(3, 3, 4, 4)
    other_features = torch.stack([-features[0], features[0] * 7, features[1]])
    figure = neighbors_figure(images, features, [0], n=6, gallery=(others, other_features))
    assert len(figure.axes) == 1 + 3
    assert int(drawn(figure.axes[1])[0, 0, 0]) == 2
    assert int(drawn(figure.axes[3])[0, 0, 0]) == 1


def test_a_match_joins_the_centers_of_two_patches():
    a, b = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.5)
    matches = {"one": [torch.tensor([[0, 5], [15, 3]]), torch.tensor([[6, 6]])], "other": [torch.tensor([[4, 4]])] * 2}
    correct = {"one": [torch.tensor([True, False]), torch.tensor([True])], "other": [torch.tensor([False])] * 2}
    figure = matches_figure(a, b, matches, correct, (4, 4))
    assert [axis.get_title() for axis in figure.axes[:2]] == ["one", "other"]
    pair = drawn(figure.axes[0])  # (16, 16 + 2 + 16, 3)
    assert (pair[:, :16] == 0).all()
    assert (pair[:, 16:18] == 1).all()
    assert (pair[:, 18:] == 0.5).all()
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines] == [
        [[1.5, 1.5], [18 + 5.5, 5.5]],
        [[13.5, 13.5], [18 + 13.5, 1.5]],
    ]
    assert [line.get_color() for line in figure.axes[0].lines] == [HIT[1], WRONG[1]]
    assert len(figure.axes[2].lines) == 1
