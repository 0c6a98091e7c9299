"""Inpainting: the encoder does not see the hole, and the loss weights its border ten times."""

import pytest
import torch

from minissl.data.transforms.functional import normalize
from minissl.errors import InputError
from minissl.methods.inpainting import ContextEncoder
from minissl.models.factory import create_encoder
from tests.golden import tiny_vit
from tests.pretext import build, is_learned, noise, smooth_images


def is_in_hole(y, x):
    return 4 <= y < 12 and 4 <= x < 12


def test_the_encoder_does_not_see_the_hole():
    method, images = build("inpainting"), noise(2, 3, 16, 16)
    expected = torch.tensor([[float(is_in_hole(y, x)) for x in range(16)] for y in range(16)])
    pixels, hole = method.inpaint(images)
    assert torch.equal(hole[0, 0], expected)
    assert pixels.shape == images.shape
    change = noise(2, 3, 16, 16, seed=6)
    assert torch.equal(method.inpaint(images + change * hole)[0], pixels)
    assert (method.inpaint(images + change * (1 - hole))[0] - pixels).abs().max() > 1e-4


def test_the_loss_is_a_weighted_mean_squared_error(monkeypatch):
    """The weight is 1 in the interior of the hole, 10 in its border of two pixels, and 0 outside."""
    method, images = build("inpainting"), smooth_images(2)
    weights = torch.zeros(16, 16)
    for y, x in ((y, x) for y in range(16) for x in range(16) if is_in_hole(y, x)):
        weights[y, x] = 1 if 6 <= y < 10 and 6 <= x < 10 else 10
    error, hole = noise(2, 3, 16, 16), method.inpaint(images)[1]
    pixels = (normalize(images) + error).requires_grad_()
    monkeypatch.setattr(method, "inpaint", lambda images: (pixels, hole))
    loss = method.loss_on_crops(images)["loss"]
    torch.testing.assert_close(loss, (error.square().mean((0, 1)) * weights).sum() / weights.sum())
    (gradient,) = torch.autograd.grad(loss, pixels)
    torch.testing.assert_close(gradient, 2 * error * weights / (6 * weights.sum()), rtol=1e-3, atol=1e-7)


def test_a_convolutional_encoder_can_inpaint():
    method = ContextEncoder(create_encoder("cnn"), crop_size=32)
    assert method.inpaint(noise(2, 3, 32, 32))[0].shape == (2, 3, 32, 32)


def test_crops_that_the_patches_do_not_divide_are_rejected():
    with pytest.raises(InputError, match="--crop_size"):
        ContextEncoder(tiny_vit(), crop_size=18)


def test_inpainting_is_learned():
    assert is_learned(build("inpainting"))
