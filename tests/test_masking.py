"""Rectangles are hidden as DINOv2 hides them: as many as asked, by its statistics."""

import random

import pytest
import torch

from minissl.masking import block_masks, hide_in_some


@pytest.mark.parametrize(
    ("grid", "target", "mean", "least"),
    [  # measured on the authors' generator, 1,000 draws
        ((16, 16), 25, 24.90, 23),
        ((16, 16), 76, 75.92, 74),
        ((16, 16), 128, 127.92, 126),
        ((8, 8), 6, 5.98, 5),
        ((8, 8), 32, 31.95, 30),
        ((7, 7), 24, 23.97, 22),
        ((4, 4), 1, 0.71, 0),
        ((4, 4), 8, 7.99, 3),
    ],
)
def test_how_many_are_hidden(grid, target, mean, least):
    ratio = (target + 0.01) / (grid[0] * grid[1])
    hidden = block_masks(1000, grid, ratio, random.Random(0)).flatten(1).sum(dim=1)
    assert hidden.max() == target
    assert hidden.min() >= least
    assert hidden.double().mean().item() == pytest.approx(mean, abs=0.05)


def test_each_mask_has_its_share_of_the_range():
    hidden = block_masks(10, (16, 16), (0.1, 0.5), random.Random(0)).flatten(1).sum(dim=1) / 256
    for i, share in enumerate(hidden.tolist()):
        assert 0.1 + 0.04 * i - 4 / 256 <= share <= 0.1 + 0.04 * (i + 1)


def test_hidden_patches_come_in_rectangles():
    """Of blocks the neighbours are mostly hidden as well; of as many single patches they would not be."""
    masks = block_masks(200, (16, 16), 0.3, random.Random(1)).float()
    together = (masks[:, 1:] * masks[:, :-1]).sum() / masks[:, 1:].sum()
    scattered = masks.flatten(1)[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))].view_as(masks)
    assert together > 0.7 > 0.45 > (scattered[:, 1:] * scattered[:, :-1]).sum() / scattered[:, 1:].sum()


def test_exactly_half_of_the_crops_hide_and_their_places_are_in_order():
    masks, rows = hide_in_some(31, (8, 8), 0.5, (0.2, 0.5), random.Random(0))
    assert int(masks.flatten(1).any(dim=1).sum()) == 15
    assert torch.equal(rows, masks.flatten().nonzero()[:, 0])


def test_a_generator_decides():
    first, second, third = (block_masks(5, (8, 8), 0.4, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(*(block_masks(5, (8, 8), 0.4) for _ in range(2)))
