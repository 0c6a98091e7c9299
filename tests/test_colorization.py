"""Colorization: only the lightness is seen, cells lie where their pixels are, and the loss equals a loop over cells."""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from minissl.data import Images
from minissl.data.transforms.functional import LUMA, rgb_to_grayscale
from minissl.data.transforms.lab_color import gamut_bins, rgb_to_lab
from minissl.methods.colorization import Colorization
from minissl.models.outputs import Encoder, Tokens
from minissl.training.config import TrainConfig
from tests.pretext import build, is_learned, smooth_images
from tests.test_contract import fake_steps, move

both_variants = pytest.mark.parametrize("regression", [False, True])


class PositionEncoder(Encoder):
    """An encoder whose patch tokens are their positions: (row, column, 1)."""

    embed_dim, patch_size = 3, 4

    def forward(self, images):
        h, w = images.shape[-2] // 4, images.shape[-1] // 4
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        patches = torch.stack([rows, columns, torch.ones_like(rows)], dim=-1).float().expand(len(images), -1, -1, -1)
        return Tokens(patches.mean((1, 2)), patches)


def test_cells_lie_where_their_pixels_are():
    """A head that predicts (2 row + y, 2 column + x) for cell (y, x) of a patch gives the coordinates of all cells."""
    method = Colorization(PositionEncoder(), regression=True, crop_size=16)
    with torch.no_grad():
        method.head.bias.zero_()
        for cell in range(4):
            y, x = divmod(cell, 2)
            method.head.weight[2 * cell] = torch.tensor([2.0, 0, y])
            method.head.weight[2 * cell + 1] = torch.tensor([0, 2.0, x])
    predictions = method.predict(torch.rand(2, 3, 8, 12))
    assert predictions.shape == (2, 4, 6, 2)
    for y in range(4):
        for x in range(6):
            assert predictions[:, y, x].tolist() == [[y, x]] * 2


@both_variants
def test_predictions_depend_on_the_lightness_only(regression):
    method, images = build("colorization", regression=regression), smooth_images(2)
    gray = rgb_to_grayscale(images).expand_as(images) / sum(LUMA)  # the weights sum to 0.9999
    predictions = method.predict(images)
    assert predictions.shape == (2, 8, 8, 2 if regression else len(gamut_bins()))
    torch.testing.assert_close(method.predict(gray), predictions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.colorize(images), method.colorize(gray), rtol=0, atol=1e-4)
    assert (method.predict(images.flip(-1)) - predictions).abs().max() > 0.01


def ab_by_loops(images):
    """Return a and b of every cell of 2 x 2 pixels, by (image, row, column)."""
    ab = {}
    for i in range(len(images)):
        for y in range(8):
            for x in range(8):
                color = images[i, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
                ab[i, y, x] = rgb_to_lab(color.view(1, 3, 1, 1))[0, 1:, 0, 0]
    return ab


def test_classification_loss_equals_a_loop_over_cells():
    """The targets are Gaussian mixtures of the five nearest bins; the weight is that of the nearest bin."""
    method, images = build("colorization"), smooth_images(2)
    method.class_weights.copy_(torch.rand(len(method.class_weights)) + 0.5)
    log_probs, bins, total = method.predict(images).log_softmax(-1), method.bins, 0.0
    for place, ab in ab_by_loops(images).items():
        squared = [((ab - b) ** 2).sum().item() for b in bins]
        nearest = sorted(range(len(bins)), key=squared.__getitem__)[:5]
        mixture = [math.exp(-squared[q] / 50) for q in nearest]
        cross_entropy = -sum(m * log_probs[place][q] for m, q in zip(mixture, nearest)) / sum(mixture)
        total = total + method.class_weights[nearest[0]] * cross_entropy
    torch.testing.assert_close(method.loss_on_crops(images)["loss"], total / 128, rtol=1e-4, atol=1e-5)


def test_regression_loss_equals_a_loop_over_cells():
    method, images = build("colorization", regression=True), smooth_images(2)
    predictions = method.predict(images)
    errors = [(predictions[place] - ab / 110).square().mean() for place, ab in ab_by_loops(images).items()]
    torch.testing.assert_close(method.loss_on_crops(images)["loss"], torch.stack(errors).mean())


def seven_red_and_one_blue():
    images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    images[:7, 0] = images[7:, 2] = 200
    return images


def test_prepare_gives_rare_colors_a_larger_weight():
    method, images = build("colorization"), seven_red_and_one_blue()
    assert method.class_weights.unique().tolist() == [1]
    method.prepare(Images(images))
    ab = rgb_to_lab(images[[0, 7]] / 255)[:, 1:, 0, 0]
    red, blue = ((method.bins - color).square().sum(1).argmin() for color in ab)
    assert method.class_weights[blue] > method.class_weights[red] > 0
    assert (method.class_weights > 0).sum() == 10  # five bins for each color
    other = build("colorization")
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.class_weights, method.class_weights)


def test_prepare_accepts_images_on_another_device():
    """A run prepares from images on the CPU when the method is on a GPU."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        method = copy.deepcopy(build("colorization"))
    with mode:
        move(method, "cuda")
        method.prepare(Images(torch.zeros(8, 3, 16, 16, dtype=torch.uint8)))
    assert method.class_weights.device.type == "cuda"


def test_colorize_paints_the_color_of_a_confident_head():
    method, color = build("colorization"), torch.tensor([20.0, -30.0])
    index = (method.bins == color).all(1).nonzero().item()
    with torch.no_grad():
        method.head.bias.view(4, -1)[:, index] = 1000
    images = 0.4 + 0.2 * smooth_images(2)
    lab = rgb_to_lab(method.colorize(images))
    torch.testing.assert_close(lab[:, 1:], color.view(2, 1, 1).expand(2, 2, 16, 16), rtol=0, atol=0.1)
    lightness = rgb_to_lab(rgb_to_grayscale(images).expand_as(images))[:, :1]
    torch.testing.assert_close(lab[:, :1], lightness, rtol=0, atol=0.1)


def test_colorize_paints_the_colors_of_a_regression():
    method, color = build("colorization", regression=True), torch.tensor([20.0, -30.0])
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(color.repeat(4) / 110)
    lab = rgb_to_lab(method.colorize(0.4 + 0.2 * smooth_images(2)))
    torch.testing.assert_close(lab[:, 1:], color.view(2, 1, 1).expand(2, 2, 16, 16), rtol=0, atol=0.1)


@both_variants
def test_colorization_is_learned(regression):
    assert is_learned(build("colorization", regression=regression))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_of_the_regression_stay_on_the_gpu(precision):
    """The contract test covers the classification."""
    method = build("colorization", regression=True)
    assert fake_steps(method, TrainConfig(precision=precision), size=20)["loss"].dtype == torch.float32
    fake_steps(method, TrainConfig(precision="fp32"), size=20, device="cpu")


def test_every_parameter_of_the_regression_gets_a_gradient():
    method = build("colorization", regression=True)
    method.loss_on_crops(smooth_images(4))["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad.any(), name
