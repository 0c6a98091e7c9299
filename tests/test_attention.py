"""Tests of the class token's attention maps and their comparison with masks."""

import math

import pytest
import torch

from minissl.evaluation import attention_fraction, attention_iou, attention_mass_mask, dense_attention, pointing_game
from tests.golden import tiny_vit
from tests.toy_encoders import BrightnessAttention, UniformAttention


def test_the_mass_mask_equals_the_authors():
    attention = torch.tensor([0.05, 0.30, 0.10, 0.25, 0.20, 0.10]).view(2, 3)
    assert attention_mass_mask(attention, 0.6).flatten().nonzero()[:, 0].tolist() == [1, 3, 4]


def test_the_mass_mask_holds_the_mass():
    torch.manual_seed(0)
    attention = torch.rand(5, 3, 6, 4) ** 3
    mask = attention_mass_mask(attention, 0.6)
    kept = (attention * mask).sum((-2, -1)) / attention.sum((-2, -1))
    assert (kept >= 0.6 - 1e-6).all()
    least = torch.where(mask, attention, torch.inf).amin((-2, -1)) / attention.sum((-2, -1))
    assert (kept - least < 0.6).all()  # without its smallest patch it would not


def test_attention_iou_is_1_on_the_object_and_0_beside_it():
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[:, :4, :4] = 3
    on, off = torch.full((4, 4), 1e-4), torch.full((4, 4), 1e-4)
    on[:2, :2], off[2:, 2:] = 1, 1
    iou = attention_iou(torch.stack([on, off])[None], masks, mass=0.99)
    torch.testing.assert_close(iou, torch.tensor([[1.0, 0.0]]))


def test_attention_fraction_is_that_on_the_object():
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[:, :, :4] = 3
    on, uniform = torch.zeros(4, 4), torch.ones(4, 4)
    on[:, 0] = 2.0
    fraction = attention_fraction(torch.stack([on, uniform])[None], masks)
    torch.testing.assert_close(fraction, torch.tensor([[1.0, 0.5]]))


def pointing_by_loops(attention, masks):
    """Return whether the center pixel of the patch with the most attention is on the object."""
    (h, w), (height, width) = attention.shape[-2:], masks.shape[-2:]
    hits = []
    for maps, mask in zip(attention, masks):
        for one in maps:
            best, row, column = -1.0, 0, 0
            for i in range(h):
                for j in range(w):
                    if float(one[i, j]) > best:
                        best, row, column = float(one[i, j]), i, j
            y, x = math.floor((row + 0.5) * height / h), math.floor((column + 0.5) * width / w)
            hits.append(bool(mask[y, x] > 0))
    return torch.tensor(hits).view(attention.shape[:2])


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (16, 16)), ((3, 5), (24, 20)), ((6, 7), (6, 7)), ((2, 3), (7, 9))])
def test_pointing_game_equals_loops(grid, size):
    torch.manual_seed(0)
    attention, masks = torch.rand(20, 3, *grid), torch.randint(0, 3, (20, *size), dtype=torch.uint8)
    attention[::2] = (attention[::2] * 4).round()  # many ties
    hits = pointing_game(attention, masks)
    assert hits.dtype == torch.bool
    assert torch.equal(hits, pointing_by_loops(attention, masks))
    assert 0 < hits.float().mean() < 1


def test_pointing_game_takes_the_first_of_equal_maxima():
    masks = torch.zeros(1, 4, 6, dtype=torch.uint8)
    masks[:, :2, :2] = 7  # the first of 2 x 3 patches
    attention = torch.zeros(1, 3, 2, 3)
    attention[0, 0, 0, 0] = attention[0, 0, 1, 2] = attention[0, 1, 0, 1] = attention[0, 1, 1, 0] = 1
    assert pointing_game(attention, masks).tolist() == [[True, False, True]]


def test_dense_attention_locates_a_spot_between_patches():
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[:, :, 6:10, 6:10] = 255  # over the corners of four patches
    maps = dense_attention(BrightnessAttention(), images, 16, stride=1)
    assert maps.shape == (1, 1, 16, 16)
    assert maps.sum().item() == pytest.approx(1)
    row, column = divmod(int(maps.argmax()), 16)
    assert 6 <= row < 10
    assert 6 <= column < 10
    center = (maps[0, 0].sum(0) * (torch.arange(16) + 0.5)).sum()
    assert center.item() == pytest.approx(8, abs=0.6)
    torch.testing.assert_close(dense_attention(BrightnessAttention(), images.float() / 255, 16, stride=1), maps)


def test_dense_attention_of_each_layer():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    encoder = tiny_vit().eval()
    first, last = (dense_attention(encoder, images, 16, layer=layer) for layer in (0, 1))
    assert torch.equal(last, dense_attention(encoder, images, 16))
    assert not torch.equal(first, last)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_uniform_attention_stays_uniform_to_the_border(stride):
    maps = dense_attention(UniformAttention(), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 16, stride)
    torch.testing.assert_close(maps, torch.full((2, 1, 16, 16), 1 / 256))
