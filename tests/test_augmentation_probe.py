"""Tests of the augmentation probe where the answer is known: grayscale destroys color, a flip left and right."""

import random

import pytest
import torch

from minissl.data import Scenes
from minissl.data.transforms import functional
from minissl.errors import InputError
from minissl.evaluation import augmentation_probe, probe_augmentations

AUGMENTATIONS = {
    "flip": functional.random_horizontal_flip,
    "grayscale": lambda x: functional.random_grayscale(x, 1.0),
    "crop": lambda x: functional.random_resized_crop(x, 32, (0.08, 1.0)),
    "black": torch.zeros_like,
}
TARGETS = ("color", "orientation", "position")


@pytest.fixture(scope="module")
def scenes():
    return Scenes("train", 32, n=2400)


@pytest.fixture(scope="module")
def accuracies(scenes):
    return probe_augmentations(scenes.images, AUGMENTATIONS, {"place": scenes.factors["place"].labels})


@pytest.mark.slow
def test_the_chance_level_is_that_of_the_most_frequent_label(accuracies, scenes):
    assert set(accuracies) == {"chance", "nothing", *AUGMENTATIONS}
    assert {tuple(row) for row in accuracies.values()} == {(*TARGETS, "place")}
    assert [accuracies["chance"][name] for name in TARGETS] == [0.25] * 3
    assert accuracies["chance"]["place"] == scenes.factors["place"].labels[1200:].bincount().max() / 1200


@pytest.mark.slow
def test_targets_are_predicted_without_augmentation(accuracies):
    assert accuracies["nothing"]["color"] > 0.98
    assert accuracies["nothing"]["orientation"] > 0.7
    assert accuracies["nothing"]["position"] > 0.5
    assert accuracies["nothing"]["place"] > accuracies["chance"]["place"] + 0.3


@pytest.mark.slow
def test_black_images_destroy_everything(accuracies):
    assert all(accuracies["black"][name] == 0.25 for name in TARGETS)


@pytest.mark.slow
def test_grayscale_destroys_color_and_keeps_most_of_the_orientation(accuracies):
    """Not all of the orientation: the light comes from a random direction, and a sky is told by its blue."""
    assert accuracies["grayscale"]["color"] == pytest.approx(0.25, abs=0.05)
    assert accuracies["grayscale"]["orientation"] - 0.25 > 0.5 * (accuracies["nothing"]["orientation"] - 0.25)


@pytest.mark.slow
def test_a_flip_keeps_color_and_destroys_left_and_right(accuracies):
    assert accuracies["flip"]["color"] > 0.98
    assert 0.3 < accuracies["flip"]["position"] < 0.5  # above and below stay


@pytest.mark.slow
def test_a_crop_destroys_most_of_the_position_and_keeps_color(accuracies):
    kept = (accuracies["crop"]["position"] - 0.25) / (accuracies["nothing"]["position"] - 0.25)
    assert kept < 0.5  # not 0: most crops are large
    assert accuracies["crop"]["color"] > 0.98


def test_a_seed_repeats_the_result_and_generators_are_restored(scenes):
    images = scenes.images[:60]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    first = probe_augmentations(images, AUGMENTATIONS, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.rand(1)
    assert probe_augmentations(images, AUGMENTATIONS, seed=1) == first
    assert probe_augmentations(images, AUGMENTATIONS, seed=2) != first


def test_tints_have_no_luma_and_clip_nothing():
    for k in range(4):
        black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 3, 1, 1)
        tinted = augmentation_probe.tint(black_and_white, k)
        assert tinted.min() >= 0
        assert tinted.max() <= 1
        luma = functional.rgb_to_grayscale(tinted).flatten()
        torch.testing.assert_close(luma, torch.tensor([0.25, 0.75]), rtol=0, atol=2e-4)


def test_shift_moves_to_four_corners():
    dot = torch.zeros(1, 3, 32, 48)
    dot[..., 16, 24] = 1
    positions = [augmentation_probe.shift(dot, k)[0, 0].nonzero()[0].tolist() for k in range(4)]
    assert positions == [[18, 27], [18, 21], [14, 27], [14, 21]]


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (20, 3, 32, 15)])
def test_few_or_small_images_are_rejected(shape):
    with pytest.raises(InputError):
        probe_augmentations(torch.zeros(shape), {})
