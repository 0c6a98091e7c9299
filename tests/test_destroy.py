"""What augmentations destroy is found where it is known: grey has no colour, a mirror no left, a crop little place."""

import random

import pytest
import torch

from minissl import augment
from minissl.data import Scenes
from minissl.errors import InputError
from minissl.evaluate import destroy, what_survives

AUGMENTATIONS = {
    "flip": augment.flip,
    "greyscale": lambda x: augment.random_grey(x, 1.0),
    "crop": lambda x: augment.random_resized_crop(x, 32, (0.08, 1.0)),
    "black": torch.zeros_like,
}


@pytest.fixture(scope="module")
def scenes():
    return Scenes("train", 32, n=2400)


@pytest.fixture(scope="module")
def table(scenes):
    return what_survives(scenes.images, AUGMENTATIONS, {"place": scenes.factors["place"]})


def test_the_table_says_what_chance_is(table, scenes):
    assert set(table) == {"chance", "nothing", *AUGMENTATIONS}
    assert {tuple(row) for row in table.values()} == {("color", "orientation", "position", "place")}
    assert [table["chance"][name] for name in ("color", "orientation", "position")] == [0.25] * 3
    assert table["chance"]["place"] == scenes.factors["place"][1200:].bincount().max() / 1200


def test_what_was_given_can_be_read_where_nothing_is_done(table):
    assert table["nothing"]["color"] > 0.98
    assert table["nothing"]["orientation"] > 0.7
    assert table["nothing"]["position"] > 0.5
    assert table["nothing"]["place"] > table["chance"]["place"] + 0.3


def test_black_destroys_everything(table):
    assert all(table["black"][name] == 0.25 for name in ("color", "orientation", "position"))


def test_greyscale_destroys_colour_and_leaves_most_of_the_orientation(table):
    """Not all of it: the light may come from anywhere, and the sky is known by its blue."""
    assert table["greyscale"]["color"] == pytest.approx(0.25, abs=0.05)
    assert table["greyscale"]["orientation"] - 0.25 > 0.5 * (table["nothing"]["orientation"] - 0.25)


def test_flip_leaves_colour_and_takes_left_from_right(table):
    assert table["flip"]["color"] > 0.98
    assert 0.3 < table["flip"]["position"] < 0.5  # up from down is still known


def test_crop_destroys_position_for_the_most_part_and_leaves_colour(table):
    left = (table["crop"]["position"] - 0.25) / (table["nothing"]["position"] - 0.25)
    assert left < 0.5  # not 0: most crops are large, so what was high up is often still high up
    assert table["crop"]["color"] > 0.98


def test_a_seed_brings_the_table_back_and_the_callers_chance_goes_on(scenes):
    some = scenes.images[:60]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    found = what_survives(some, AUGMENTATIONS, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.rand(1)
    assert what_survives(some, AUGMENTATIONS, seed=1) == found
    assert what_survives(some, AUGMENTATIONS, seed=2) != found


def test_tints_have_no_luma_and_cut_nothing_off():
    for k in range(4):
        black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 3, 1, 1)
        found = destroy.tinted(black_and_white, k)
        assert found.min() >= 0
        assert found.max() <= 1
        torch.testing.assert_close(augment.grey(found).flatten(), torch.tensor([0.25, 0.75]), rtol=0, atol=2e-4)


def test_moved_goes_to_four_corners():
    dot = torch.zeros(1, 3, 32, 48)
    dot[..., 16, 24] = 1
    places = [destroy.moved(dot, k)[0, 0].nonzero()[0].tolist() for k in range(4)]
    assert places == [[18, 27], [18, 21], [14, 27], [14, 21]]


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (20, 3, 32, 15)])
def test_too_little_to_ask_about_is_said(shape):
    with pytest.raises(InputError, match="8 images of 16 x 16"):
        what_survives(torch.zeros(shape), {})
