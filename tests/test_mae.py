"""MAE: the encoder does not see masked patches, the decoder restores their order, and the loss covers them only."""

import pytest
import torch
from torch import nn

from minissl.data.transforms.functional import normalize
from minissl.errors import InputError
from minissl.methods.mae import MaskedAutoencoder, masked_pixel_loss
from minissl.models.factory import create_encoder
from minissl.models.vit import ViT, patchify, unpatchify
from tests.golden import tiny_vit, wave
from tests.pretext import build, is_learned, noise, smooth_images

DECODER = {"decoder_dim": 32, "decoder_depth": 1}


def test_patchify_equals_the_golden_numbers():
    patches = patchify(wave(2, 3, 8, 8, c=0.37), 4)
    expected = [0.99588084, 0.02725540, -0.98946051, 0.96127520, 0.38689204, -0.87013809]
    assert patches[0, 1, :6].tolist() == pytest.approx(expected, abs=1e-8)


def test_patchify_equals_slices_and_unpatchify_inverts_it():
    images = noise(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for i in range(2):
        for j in range(3):
            region = images[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert torch.equal(patches[:, 3 * i + j], region.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


@pytest.mark.parametrize(("normalized", "expected"), [(True, 1.49852178), (False, 1.02068374)])
def test_masked_pixel_loss_equals_the_golden_numbers(normalized, expected):
    images, prediction = wave(2, 3, 8, 8, c=0.37), wave(2, 4, 48, c=0.11)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
    for dtype in (torch.bool, torch.float64):
        loss = masked_pixel_loss(prediction, images, mask.to(dtype), 4, normalized)
        assert loss.item() == pytest.approx(expected, rel=1e-8)


def test_visible_patches_have_no_gradient():
    prediction = wave(2, 4, 48, c=0.11).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
    masked_pixel_loss(prediction, wave(2, 3, 8, 8, c=0.37), mask, 4).backward()
    assert torch.equal(prediction.grad.any(-1), mask.bool())


def as_patches(images):
    """Return patches (B, N, 3, 4, 4)."""
    return patchify(images, 4).unflatten(2, (4, 4, 3)).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("options", [{}, {"stem": "conv", "isolated_patches": True}])
def test_visible_tokens_equal_those_of_the_whole_image(options):
    torch.manual_seed(0)
    encoder = tiny_vit(**options).eval()
    for images in (noise(2, 3, 16, 16), noise(2, 3, 16, 24)):
        expected, grid = encoder.prepare_tokens(images)
        patches = as_patches(images)
        indices = torch.arange(patches.shape[1]).expand(2, -1)
        torch.testing.assert_close(encoder.prepare_visible_tokens(patches, indices, grid), expected)
        visible = torch.stack([torch.randperm(patches.shape[1]) for _ in range(2)])[:, :5]
        rows = torch.arange(2)[:, None]
        tokens = encoder.prepare_visible_tokens(patches[rows, visible], visible, grid)
        torch.testing.assert_close(tokens[:, 1:], expected[:, 1:][rows, visible])
        torch.testing.assert_close(tokens[:, 0], expected[:, 0])


def test_gradients_of_position_embeddings_are_deterministic_on_several_threads():
    """A resumed run has to equal an uninterrupted one bit for bit."""
    torch.manual_seed(0)
    encoder, num_threads = ViT(128, 0, 4, 4, 56), torch.get_num_threads()
    patches, weights = torch.randn(256, 49, 3, 4, 4), torch.randn(256, 50, 128)
    indices, gradients = torch.rand(256, 196).argsort(1)[:, :49], []
    try:
        torch.set_num_threads(2)
        for _ in range(4):
            loss = (encoder.prepare_visible_tokens(patches, indices, (14, 14)) * weights).sum()
            gradients.append(torch.autograd.grad(loss, encoder.pos_embed)[0])
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def reconstruct(method, images, mask_ratio=0.75):
    torch.manual_seed(3)
    return method.reconstruct(images, mask_ratio)


def pixel_mask(mask):
    """Return (B, 1, 16, 16), 1 in the masked patches of 4 x 4 pixels."""
    return unpatchify(mask[..., None].expand(-1, -1, 48).float(), 4, (4, 4))[:, :1]


def test_the_encoder_sees_all_visible_and_no_masked_patches():
    method, images = build("mae", **DECODER), noise(2, 3, 16, 16)
    patches, mask = reconstruct(method, images)
    assert patches.shape == (2, 16, 48)
    assert mask.sum(1).tolist() == [12, 12]
    change, masked = noise(2, 3, 16, 16, seed=6), pixel_mask(mask)
    assert torch.equal(reconstruct(method, images + change * masked)[0], patches)
    changed = reconstruct(method, images + change * (1 - masked))[0]
    assert ((changed - patches).abs().amax(-1) > 1e-6).all()


def test_images_of_a_batch_are_independent():
    method, images = build("mae", **DECODER), noise(2, 3, 16, 16)
    patches, _ = reconstruct(method, images)
    images[1] += 1
    changed, _ = reconstruct(method, images)
    torch.testing.assert_close(changed[0], patches[0])
    assert (changed[1] - patches[1]).abs().max() > 1e-4


def test_the_decoder_restores_the_order_of_the_patches():
    """Without masked patches, whatever their order in the encoder, the decoder has them row by row."""
    method, images = build("mae", **DECODER), noise(2, 3, 16, 16)
    tokens = method.encoder(images)
    x = torch.cat([tokens.cls[:, None], tokens.patches.flatten(1, 2)], dim=1)
    x = method.decoder_embed(x) + method.decoder_pos_embed
    expected = method.decoder_pred(method.decoder_norm(method.decoder_blocks(x)))[:, 1:]
    torch.testing.assert_close(reconstruct(method, images, 0.0)[0], expected, rtol=1e-4, atol=1e-5)


def test_masked_patches_enter_the_decoder_as_mask_tokens_with_positions():
    method = build("mae", **DECODER)
    method.decoder_blocks = nn.Identity()
    patches, mask = reconstruct(method, noise(2, 3, 16, 16))
    mask_tokens = method.mask_token + method.decoder_pos_embed
    expected = method.decoder_pred(method.decoder_norm(mask_tokens))[:, 1:].expand(2, -1, -1)
    torch.testing.assert_close(patches[mask], expected[mask])
    assert ((patches - expected)[~mask].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_is_that_of_the_masked_pixels_of_normalized_images(norm_pix_loss):
    method, images = build("mae", mask_ratio=0.5, norm_pix_loss=norm_pix_loss, **DECODER), smooth_images(2)
    patches, mask = reconstruct(method, normalize(images), 0.5)
    torch.manual_seed(3)
    loss = method.loss_on_crops(images)["loss"]
    torch.testing.assert_close(loss, masked_pixel_loss(patches, normalize(images), mask, 4, norm_pix_loss))


def test_other_encoders_and_indivisible_crops_are_rejected():
    with pytest.raises(InputError, match=r"--encoder\.name"):
        MaskedAutoencoder(create_encoder("cnn"), crop_size=16)
    with pytest.raises(InputError, match="--crop_size"):
        MaskedAutoencoder(tiny_vit(), crop_size=18)
    with pytest.raises(InputError, match=r"--encoder\.isolated_patches"):
        MaskedAutoencoder(tiny_vit(stem="conv"), crop_size=16)


def test_reconstruction_is_learned():
    assert is_learned(build("mae", **DECODER))
