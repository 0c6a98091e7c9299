"""Pretext tasks: what is hidden stays hidden, the losses are their plain descriptions, and all of them are learnt."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from minissl import train
from minissl.augment import GREY, grey, normalize
from minissl.color import gamut, rgb_to_lab
from minissl.data import Images
from minissl.encoders import make_encoder
from minissl.errors import InputError
from minissl.masking import hide
from minissl.method import Batch, Tokens
from minissl.methods.pretext import Pretext, masked_pixel_loss, rotate_four
from minissl.patches import patchify, unpatchify
from minissl.train import TrainConfig
from minissl.vit import ViT
from tests.golden import tiny_vit, wave
from tests.test_contract import fake_steps, move

TASKS = ["rotation", "colorization", "regression", "hole", "mae"]


def small(task, **options):
    torch.manual_seed(0)
    return Pretext(tiny_vit(), task=task, size=16, scale=(1.0, 1.0), decoder_width=32, decoder_depth=1, **options)


def soft_images(n, size=16, seed=0):
    """Blobs of colour in [0, 1], darker at the bottom, so that there is something to find."""
    blobs = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    light = torch.linspace(1, 0.3, size).view(-1, 1)
    return F.interpolate(blobs, size=(size, size), mode="bilinear") * light


def noise(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Rotation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_turns_move_pixels_only(dtype):
    images = torch.arange(2 * 3 * 5 * 5).view(2, 3, 5, 5).to(dtype)
    turned, turns = rotate_four(images)
    assert turned.dtype == dtype
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, image in enumerate(images):
        expected = image
        for turn in range(4):
            assert torch.equal(turned[2 * turn + i], expected)
            expected = expected.mT.flip(-2)  # a quarter, counter-clockwise
        assert torch.equal(expected, image)


def test_a_head_that_knows_nothing_is_right_in_a_quarter_of_the_turns():
    method = small("rotation")
    nn.init.zeros_(method.task.head.weight)
    nn.init.zeros_(method.task.head.bias)
    terms = method.task(method.encoder, soft_images(3))
    assert terms["loss"].item() == pytest.approx(math.log(4))
    assert terms["accuracy"].item() == 0.25


# Patches


def test_patches_are_in_the_published_order():
    found = patchify(wave(2, 3, 8, 8, c=0.37), 4)
    first = [0.99588084, 0.02725540, -0.98946051, 0.96127520, 0.38689204, -0.87013809]
    assert found[0, 1, :6].tolist() == pytest.approx(first, abs=1e-8)


def test_patches_equal_the_slices_and_come_back():
    images = noise(2, 3, 8, 12)
    found = patchify(images, 4)
    assert found.shape == (2, 6, 48)
    for i in range(2):
        for j in range(3):
            piece = images[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert torch.equal(found[:, 3 * i + j], piece.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(found, 4, (2, 3)), images)


@pytest.mark.parametrize(("normalized", "expected"), [(True, 1.49852178), (False, 1.02068374)])
def test_the_loss_of_hidden_patches_equals_the_golden_numbers(normalized, expected):
    images, prediction = wave(2, 3, 8, 8, c=0.37), wave(2, 4, 48, c=0.11)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
    for kind in (torch.bool, torch.float64):
        found = masked_pixel_loss(prediction, images, mask.to(kind), 4, normalized)
        assert found.item() == pytest.approx(expected, rel=1e-8)


def test_what_was_seen_costs_nothing():
    prediction = wave(2, 4, 48, c=0.11).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
    masked_pixel_loss(prediction, wave(2, 3, 8, 8, c=0.37), mask, 4).backward()
    assert torch.equal(prediction.grad.any(-1), mask.bool())


@pytest.mark.parametrize(("patches", "ratio", "stay"), [(16, 0.75, 4), (15, 0.6, 6), (9, 0.5, 4), (16, 0.0, 16)])
def test_as_many_patches_stay_as_asked_for(patches, ratio, stay):
    torch.manual_seed(0)
    kept, mask = hide(20, patches, ratio, torch.zeros(1))
    assert kept.shape == (20, stay)
    for places, hidden in zip(kept.tolist(), mask.tolist()):
        assert sorted(places) == [place for place in range(patches) if not hidden[place]]


def test_every_patch_is_hidden_as_often_and_each_image_for_itself():
    torch.manual_seed(0)
    _, mask = hide(4000, 16, 0.75, torch.zeros(1))
    often = mask.float().mean(0)
    assert (often - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5
    together = (mask.float().T @ mask.float() / 4000)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 0.75 * 11 / 15).abs().max() < 0.04


def test_all_patches_in_order_are_embedded_as_the_image_is():
    torch.manual_seed(0)
    encoder = tiny_vit()
    for images in (noise(2, 3, 16, 16), noise(2, 3, 16, 24)):
        expected, grid = encoder.embed(images)
        pieces = patchify(images, 4).unflatten(2, (4, 4, 3)).permute(0, 1, 4, 2, 3)
        places = torch.arange(pieces.shape[1]).expand(2, -1)
        torch.testing.assert_close(encoder.embed_some(pieces, places, grid), expected)
        shuffled = torch.stack([torch.randperm(pieces.shape[1]) for _ in range(2)])[:, :5]
        pieces = pieces[torch.arange(2)[:, None], shuffled]
        found = encoder.embed_some(pieces, shuffled, grid)
        torch.testing.assert_close(found[:, 1:], expected[:, 1:][torch.arange(2)[:, None], shuffled])
        torch.testing.assert_close(found[:, 0], expected[:, 0])


def test_positions_get_the_same_gradient_on_several_threads():
    """To the bit: a run that was killed has to end as if it had not been."""
    torch.manual_seed(0)
    encoder, threads = ViT(128, 0, 4, 4, 56), torch.get_num_threads()
    pieces, weights = torch.randn(256, 49, 3, 4, 4), torch.randn(256, 50, 128)
    places, found = torch.rand(256, 196).argsort(1)[:, :49], []
    try:
        torch.set_num_threads(2)
        for _ in range(4):
            loss = (encoder.embed_some(pieces, places, (14, 14)) * weights).sum()
            found.append(torch.autograd.grad(loss, encoder.pos_embed)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)


# Masked autoencoder


def filled(method, images, ratio=0.75):
    torch.manual_seed(3)
    return method.task.fill(method.encoder, images, ratio)


def pixels_of(mask):
    """(B, 1, 16, 16), 1 where a patch of 4 x 4 is marked."""
    return unpatchify(mask[..., None].expand(-1, -1, 48).float(), 4, (4, 4))[:, :1]


def test_the_encoder_sees_no_hidden_patch():
    method, images = small("mae"), noise(2, 3, 16, 16)
    found, mask = filled(method, images)
    assert found.shape == (2, 16, 48)
    assert mask.sum(1).tolist() == [12, 12]
    change, hidden = noise(2, 3, 16, 16, seed=6), pixels_of(mask)
    assert torch.equal(filled(method, images + change * hidden)[0], found)
    assert ((filled(method, images + change * (1 - hidden))[0] - found).abs().amax(-1) > 1e-6).all()


def test_no_patch_is_seen_in_two_images():
    method, images = small("mae"), noise(2, 3, 16, 16)
    found, _ = filled(method, images)
    images[1] += 1
    again, _ = filled(method, images)
    torch.testing.assert_close(again[0], found[0])
    assert (again[1] - found[1]).abs().max() > 1e-4


def test_what_was_seen_goes_back_to_its_place():
    """With nothing hidden, in whatever order the encoder saw the patches, the decoder has them row by row."""
    method, images = small("mae"), noise(2, 3, 16, 16)
    task, tokens = method.task, method.encoder(images)
    x = task.embed(torch.cat([tokens.cls[:, None], tokens.patches.flatten(1, 2)], dim=1)) + task.positions
    expected = task.head(task.norm(task.blocks(x)))[:, 1:]
    torch.testing.assert_close(filled(method, images, 0.0)[0], expected, rtol=1e-4, atol=1e-5)


def test_hidden_patches_differ_by_their_place_only():
    method = small("mae")
    task = method.task
    task.blocks = nn.Identity()
    found, mask = filled(method, noise(2, 3, 16, 16))
    alone = task.head(task.norm(task.mask_token + task.positions))[:, 1:].expand(2, -1, -1)
    torch.testing.assert_close(found[mask], alone[mask])
    assert ((found - alone)[~mask].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("normalized", [True, False])
def test_the_loss_is_that_of_the_hidden_pixels_of_normalised_images(normalized):
    method, images = small("mae", ratio=0.5, normalize_patches=normalized), soft_images(2)
    found, mask = filled(method, normalize(images), 0.5)
    torch.manual_seed(3)
    loss = method.task(method.encoder, images)["loss"]
    torch.testing.assert_close(loss, masked_pixel_loss(found, normalize(images), mask, 4, normalized))


@pytest.mark.parametrize("task", ["mae", "hole"])
def test_an_encoder_without_patches_is_refused(task):
    with pytest.raises(InputError, match=rf"{task}.*--encoder\.name nano"):
        Pretext(make_encoder("cnn"), task=task, size=16)


# Hole


def in_the_hole(y, x):
    return 4 <= y < 12 and 4 <= x < 12


def test_the_encoder_does_not_see_into_the_hole():
    method, images = small("hole"), noise(2, 3, 16, 16)
    hidden = torch.tensor([[float(in_the_hole(y, x)) for x in range(16)] for y in range(16)])
    found, hole = method.task.fill(method.encoder, images)
    assert torch.equal(hole[0, 0], hidden)
    assert found.shape == images.shape
    change = noise(2, 3, 16, 16, seed=6)
    assert torch.equal(method.task.fill(method.encoder, images + change * hidden)[0], found)
    assert (method.task.fill(method.encoder, images + change * (1 - hidden))[0] - found).abs().max() > 1e-4


def test_the_border_of_the_hole_counts_ten_times(monkeypatch):
    """Inside 1, in a band of two pixels 10, outside 0; the loss is the weighted mean of squared errors."""
    method, images = small("hole"), soft_images(2)
    expected = torch.zeros(16, 16)
    for y, x in ((y, x) for y in range(16) for x in range(16) if in_the_hole(y, x)):
        expected[y, x] = 1 if 6 <= y < 10 and 6 <= x < 10 else 10
    error = noise(2, 3, 16, 16)
    found, hole = (normalize(images) + error).requires_grad_(), method.task.fill(method.encoder, images)[1]
    monkeypatch.setattr(method.task, "fill", lambda encoder, images: (found, hole))
    loss = method.task(method.encoder, images)["loss"]
    mean = (error.square().mean((0, 1)) * expected).sum() / expected.sum()
    torch.testing.assert_close(loss, mean)
    (gradient,) = torch.autograd.grad(loss, found)
    torch.testing.assert_close(gradient, 2 * error * expected / (6 * expected.sum()), rtol=1e-3, atol=1e-7)


# Colorization


class Places(nn.Module):
    """An encoder whose patches say where they are: (row, column, 1)."""

    dim = 3

    def forward(self, images):
        h, w = images.shape[-2] // 4, images.shape[-1] // 4
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        patches = torch.stack([rows, columns, torch.ones_like(rows)], dim=-1).float().expand(len(images), -1, -1, -1)
        return Tokens(patches.mean((1, 2)), patches)


def test_cells_are_where_their_pixels_are():
    """A head that says 2 row + y, 2 column + x for the cell (y, x) of a patch gives the coordinates of all cells."""
    method = Pretext(Places(), task="regression", size=16)
    with torch.no_grad():
        method.task.head.bias.zero_()
        for cell in range(4):
            y, x = divmod(cell, 2)
            method.task.head.weight[2 * cell] = torch.tensor([2.0, 0, y])
            method.task.head.weight[2 * cell + 1] = torch.tensor([0, 2.0, x])
    found = method.task.answer(method.encoder, torch.rand(2, 3, 8, 12))
    assert found.shape == (2, 4, 6, 2)
    for y in range(4):
        for x in range(6):
            assert found[:, y, x].tolist() == [[y, x]] * 2


@pytest.mark.parametrize("task", ["colorization", "regression"])
def test_only_the_lightness_is_seen(task):
    method, images = small(task), soft_images(2)
    without = grey(images).expand_as(images) / sum(GREY)  # the weights sum to 0.9999
    found = method.task.answer(method.encoder, images)
    assert found.shape == (2, 8, 8, 2 if task == "regression" else len(gamut()))
    torch.testing.assert_close(method.task.answer(method.encoder, without), found, rtol=1e-4, atol=1e-5)
    painted = [method.task.paint(method.encoder, x) for x in (images, without)]
    torch.testing.assert_close(*painted, rtol=0, atol=1e-4)
    assert (method.task.answer(method.encoder, images.flip(-1)) - found).abs().max() > 0.01


def colors_of_cells(images):
    """a and b of every 2 x 2 pixels, in a loop: a dict by (image, row, column)."""
    return {
        (i, y, x): rgb_to_lab(images[i, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2)).view(1, 3, 1, 1))[
            0, 1:, 0, 0
        ]
        for i in range(len(images))
        for y in range(8)
        for x in range(8)
    }


def test_the_loss_equals_the_loop_over_cells():
    """The five nearest bins share a cell by a Gaussian of 5; the weight is the nearest's."""
    method, images = small("colorization"), soft_images(2)
    method.task.weights.copy_(torch.rand(len(method.task.weights)) + 0.5)
    found, bins, total = method.task.answer(method.encoder, images).log_softmax(-1), method.task.bins, 0.0
    for place, ab in colors_of_cells(images).items():
        squared = [((ab - b) ** 2).sum().item() for b in bins]
        nearest = sorted(range(len(bins)), key=squared.__getitem__)[:5]
        shares = [math.exp(-squared[q] / 50) for q in nearest]
        entropy = -sum(share * found[place][q] for share, q in zip(shares, nearest)) / sum(shares)
        total = total + method.task.weights[nearest[0]] * entropy
    torch.testing.assert_close(method.task(method.encoder, images)["loss"], total / 128, rtol=1e-4, atol=1e-5)


def test_the_loss_of_two_numbers_is_their_squared_error():
    method, images = small("regression"), soft_images(2)
    found = method.task.answer(method.encoder, images)
    errors = [(found[place] - ab / 110).square().mean() for place, ab in colors_of_cells(images).items()]
    torch.testing.assert_close(method.task(method.encoder, images)["loss"], torch.stack(errors).mean())


def red_and_blue():
    """Seven red images and one blue, uint8."""
    images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    images[:7, 0] = images[7:, 2] = 200
    return images


def test_after_a_look_at_the_data_rare_colours_weigh_more():
    method = small("colorization")
    assert method.task.weights.unique().tolist() == [1]
    method.prepare(Images(red_and_blue()))
    ab = rgb_to_lab(red_and_blue()[[0, 7]] / 255)[:, 1:, 0, 0]
    red, blue = ((method.task.bins - color).square().sum(1).argmin() for color in ab)
    assert method.task.weights[blue] > method.task.weights[red] > 0
    assert (method.task.weights > 0).sum() == 10  # five bins each
    other = small("colorization")
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.task.weights, method.task.weights)


def test_other_tasks_do_not_look_at_the_data():
    for task in ("rotation", "hole", "mae"):
        small(task).prepare(None)


def test_the_data_may_be_elsewhere_than_the_method():
    """They are prepared from images on the CPU when the method is on a GPU already."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        method = copy.deepcopy(small("colorization"))
    with mode:
        move(method, "cuda")
        method.task.prepare(torch.zeros(8, 3, 16, 16, dtype=torch.uint8))
    assert method.task.weights.device.type == "cuda"


def test_a_head_that_is_sure_of_a_colour_paints_it():
    method, color = small("colorization"), torch.tensor([20.0, -30.0])
    chosen = (method.task.bins == color).all(1).nonzero().item()
    with torch.no_grad():
        method.task.head.bias.view(4, -1)[:, chosen] = 1000
    images = 0.4 + 0.2 * soft_images(2)
    painted = rgb_to_lab(method.task.paint(method.encoder, images))
    torch.testing.assert_close(painted[:, 1:], color.view(2, 1, 1).expand(2, 2, 16, 16), rtol=0, atol=0.1)
    torch.testing.assert_close(painted[:, :1], rgb_to_lab(grey(images).expand_as(images))[:, :1], rtol=0, atol=0.1)


def test_two_numbers_are_painted_as_they_are():
    method = small("regression")
    with torch.no_grad():
        method.task.head.weight.zero_()
        method.task.head.bias.copy_(torch.tensor([20.0, -30.0]).repeat(4) / 110)
    painted = rgb_to_lab(method.task.paint(method.encoder, 0.4 + 0.2 * soft_images(2)))
    expected = torch.tensor([20.0, -30.0]).view(2, 1, 1).expand(2, 2, 16, 16)
    torch.testing.assert_close(painted[:, 1:], expected, rtol=0, atol=0.1)


# Every task


@pytest.mark.parametrize("task", TASKS)
def test_every_trained_parameter_gets_a_gradient(task):
    method = small(task)
    method.task(method.encoder, soft_images(4))["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_learnt(task):
    method, config = small(task), TrainConfig(lr=3e-3, warmup=0.0, precision="fp32")
    batch = Batch((soft_images(8) * 255).to(torch.uint8))
    optimizer, losses = train.make_optimizer(method, config), []
    for step in range(30):
        train.seed_step(0, step)
        losses.append(train.training_step(method, optimizer, batch, 0.1, config)["loss"].item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_stay_on_the_gpu(task, precision):
    terms = fake_steps(small(task), TrainConfig(precision=precision), size=20)
    assert terms["loss"].dtype == torch.float32


@pytest.mark.parametrize("task", TASKS)
def test_the_backward_pass_reads_no_number_back(task):
    fake_steps(small(task), TrainConfig(precision="fp32"), size=20, device="cpu")
