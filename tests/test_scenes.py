"""Scenes are the same everywhere, their factors are independent of each other, and they know the truth."""

import hashlib
import subprocess
import sys

import pytest
import torch

from minissl.data.scenes import ACTIONS, COLORS, DRAWS, FACTORS, OBJECTS, PLACES, Scenes, render, uniforms
from minissl.data.shapes import KINDS
from minissl.errors import InputError

# Of Scenes("train", size=32, n=16). A change here is a change of the world: measure everything again.
GOLDEN_IMAGES = "5d3e5b13398498ec"
GOLDEN_MASKS = "c71921356943fefd"


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def scenes():
    return Scenes("train", size=32, n=200)


def test_the_world_is_the_one_that_was_measured():
    scenes = Scenes("train", size=32, n=16)
    assert (digest(scenes.images), digest(scenes.masks)) == (GOLDEN_IMAGES, GOLDEN_MASKS)


def test_another_process_with_another_number_of_threads_draws_the_same_bytes(scenes):
    script = (
        "import hashlib, torch; torch.set_num_threads(3); from minissl.data.scenes import Scenes;"
        "s = Scenes('train', size=32, n=200); print(hashlib.sha256(s.images.numpy().tobytes()).hexdigest()[:16])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest(scenes.images)


def test_a_scene_does_not_depend_on_its_neighbours(scenes):
    alone, _ = render(uniforms("train", 0, [150]), 32)
    assert torch.equal(alone[0], scenes.images[150])


def test_splits_and_seeds_share_no_scene():
    sets = [uniforms(split, seed, range(50)) for split in ("train", "val", "test") for seed in (0, 1)]
    rows = torch.cat(sets)[:, 0]
    assert len(rows.unique()) == len(rows)


def test_factors_are_uniform_and_independent():
    scenes = Scenes("train", n=8000)
    sizes = {"object": OBJECTS, "color": COLORS, "action": ACTIONS, "place": PLACES}
    for name in FACTORS:
        counts = torch.bincount(scenes.factors[name], minlength=len(sizes[name])).float()
        expected = 8000 / len(sizes[name])
        assert ((counts - expected) ** 2 / expected).sum() < 30, name  # chi-square, at most 9 degrees: p < 0.001
    pair = scenes.factors["object"] * len(PLACES) + scenes.factors["place"]
    counts = torch.bincount(pair, minlength=80).float()
    assert ((counts - 100) ** 2 / 100).sum() < 124  # 79 degrees: p < 0.001


def test_every_object_is_in_its_picture_with_its_parts(scenes):
    for mask, kind in zip(scenes.masks, scenes.labels):
        assert (mask > 0).float().mean() > 0.04
        assert mask.max() <= len(list(KINDS.values())[kind])


def test_a_scene_is_the_same_at_any_size():
    draws = uniforms("test", 0, range(8))
    small, large = render(draws, 32)[0].float(), render(draws, 128)[0].float()
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - shrunk).abs().mean() < 6  # of 255: edges and fine texture


def test_captions_tell_the_factors(scenes):
    for i in range(20):
        for paraphrase in range(6):
            text = scenes.describe(i, paraphrase)
            assert OBJECTS[scenes.factors["object"][i]] in text
            assert list(COLORS)[scenes.factors["color"][i]] in text
            assert ACTIONS[scenes.factors["action"][i]] in text
            assert list(PLACES)[scenes.factors["place"][i]] in text


def test_captions_are_one_paraphrase_each(scenes):
    for i, text in enumerate(scenes.captions[:50]):
        assert text in {scenes.describe(i, paraphrase) for paraphrase in range(6)}


def test_what_is_not_there_is_said():
    with pytest.raises(InputError, match="train, val, test"):
        Scenes("all")
    with pytest.raises(InputError, match="16 or more"):
        Scenes("train", size=8)


def test_a_scene_is_made_of_its_draws():
    assert uniforms("train", 0, range(3)).shape == (3, DRAWS)
