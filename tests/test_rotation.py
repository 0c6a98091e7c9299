"""Rotation prediction: rotations move pixels exactly, and the loss is the cross-entropy of four classes."""

import math

import pytest
import torch
from torch import nn

from minissl.methods.rotation import rotate_four
from tests.pretext import build, is_learned, smooth_images


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rotations_move_pixels_only(dtype):
    images = torch.arange(2 * 3 * 5 * 5).view(2, 3, 5, 5).to(dtype)
    rotated, rotations = rotate_four(images)
    assert rotated.dtype == dtype
    assert rotations.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, image in enumerate(images):
        expected = image
        for rotation in range(4):
            assert torch.equal(rotated[2 * rotation + i], expected)
            expected = expected.mT.flip(-2)  # a quarter turn counterclockwise
        assert torch.equal(expected, image)


def test_uniform_logits_have_a_loss_of_ln_4_and_chance_accuracy():
    method = build("rotation")
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    terms = method.loss_on_crops(smooth_images(3))
    assert terms["loss"].item() == pytest.approx(math.log(4))
    assert terms["accuracy"].item() == 0.25


def test_rotation_is_learned():
    assert is_learned(build("rotation"))
