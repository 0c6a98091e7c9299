"""Random and block masks: the number of masked patches, their distribution and their reproducibility."""

import random

import pytest
import torch

from minissl.data.transforms.masking import block_masks, random_masking, sample_block_masks


@pytest.mark.parametrize(("patches", "ratio", "expected"), [(16, 0.75, 4), (15, 0.6, 6), (9, 0.5, 4), (16, 0.0, 16)])
def test_random_masking_keeps_the_given_number_of_patches(patches, ratio, expected):
    torch.manual_seed(0)
    visible, masks = random_masking(20, patches, ratio, torch.zeros(1))
    assert visible.shape == (20, expected)
    for indices, mask in zip(visible.tolist(), masks.tolist()):
        assert sorted(indices) == [i for i in range(patches) if not mask[i]]


def test_random_masking_masks_every_patch_equally_often_and_each_image_independently():
    torch.manual_seed(0)
    _, masks = random_masking(4000, 16, 0.75, torch.zeros(1))
    frequency = masks.float().mean(0)
    assert (frequency - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5
    joint = (masks.float().T @ masks.float() / 4000)[~torch.eye(16, dtype=torch.bool)]
    assert (joint - 0.75 * 11 / 15).abs().max() < 0.04


@pytest.mark.parametrize(
    ("grid", "target", "mean", "minimum"),
    [  # measured on the authors' generator, 1,000 samples
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
def test_number_of_masked_patches_equals_the_authors(grid, target, mean, minimum):
    ratio = (target + 0.01) / (grid[0] * grid[1])
    counts = block_masks(1000, grid, ratio, random.Random(0)).flatten(1).sum(dim=1)
    assert counts.max() == target
    assert counts.min() >= minimum
    assert counts.double().mean().item() == pytest.approx(mean, abs=0.05)


def test_masked_fractions_are_spread_evenly_over_the_range():
    fractions = block_masks(10, (16, 16), (0.1, 0.5), random.Random(0)).flatten(1).sum(dim=1) / 256
    for i, fraction in enumerate(fractions.tolist()):
        assert 0.1 + 0.04 * i - 4 / 256 <= fraction <= 0.1 + 0.04 * (i + 1)


def test_block_masks_are_contiguous():
    """The neighbors of a masked patch are mostly masked; in shuffled masks they are not."""
    masks = block_masks(200, (16, 16), 0.3, random.Random(1)).float()
    contiguous = (masks[:, 1:] * masks[:, :-1]).sum() / masks[:, 1:].sum()
    shuffled = masks.flatten(1)[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))].view_as(masks)
    assert contiguous > 0.7 > 0.45 > (shuffled[:, 1:] * shuffled[:, :-1]).sum() / shuffled[:, 1:].sum()


def test_exactly_half_of_the_crops_are_masked_and_indices_are_in_order():
    masks, indices = sample_block_masks(31, (8, 8), 0.5, (0.2, 0.5), random.Random(0))
    assert int(masks.flatten(1).any(dim=1).sum()) == 15
    assert torch.equal(indices, masks.flatten().nonzero()[:, 0])


def test_a_generator_determines_the_masks():
    first, second, third = (block_masks(5, (8, 8), 0.4, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(*(block_masks(5, (8, 8), 0.4) for _ in range(2)))
