"""Scenes are the same everywhere, their factors are independent of each other, and they know the truth."""

import hashlib
import subprocess
import sys

import pytest
import torch

from minissl.data.scenes import (
    BEFORE,
    CLUTTER,
    DRAWS,
    FACTORS,
    OBJECT,
    SECOND,
    SPLITS,
    Scenes,
    boxes,
    factors,
    part_names,
    render,
    uniforms,
)
from minissl.data.shapes import KINDS
from minissl.data.words import _WHERE, CAPTIONS, prompts
from minissl.errors import InputError

# Of Scenes("train", size=32, n=16). A change here is a change of the world: measure everything again.
GOLDEN = {"images": "541f9bf3f539e0c5", "masks": "2de15bd2f99474eb", "things": "7267c0f83839fde4"}


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def scenes():
    return Scenes("train", size=32, n=300)


def test_the_world_is_the_one_that_was_measured():
    scenes = Scenes("train", size=32, n=16)
    assert {name: digest(getattr(scenes, name)) for name in GOLDEN} == GOLDEN


def test_another_process_with_another_number_of_threads_draws_the_same_bytes(scenes):
    script = (
        "import hashlib, torch; torch.set_num_threads(3); from minissl.data.scenes import Scenes;"
        "s = Scenes('train', size=32, n=300); print(hashlib.sha256(s.images.numpy().tobytes()).hexdigest()[:16])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest(scenes.images)


def test_the_processors_instructions_do_not_change_the_bytes(scenes):
    """Elementwise float64 is rounded alike with and without vector instructions, to far below a grey level."""
    script = (
        "import hashlib; from minissl.data.scenes import Scenes; s = Scenes('train', size=32, n=300);"
        "print(hashlib.sha256(s.images.numpy().tobytes()).hexdigest()[:16])"
    )
    plain = {"ATEN_CPU_CAPABILITY": "default", "PATH": ""}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=plain)
    assert out.stdout.strip() == digest(scenes.images)


def test_a_scene_does_not_depend_on_its_neighbours(scenes):
    draws = uniforms("train", 0, [150])
    alone = render(draws, factors(draws), 32)
    for name in ("images", "masks", "things"):
        assert torch.equal(getattr(alone, name)[0], getattr(scenes, name)[150])


def test_splits_and_seeds_share_no_scene():
    sets = [uniforms(split, seed, range(50)) for split in SPLITS for seed in (0, 1)]
    rows = torch.cat(sets)[:, 0]
    assert len(rows.unique()) == len(rows)


def test_factors_are_uniform_and_independent():
    scenes = Scenes("train", n=8000)
    for name, values in FACTORS.items():
        counts = torch.bincount(scenes.factors[name], minlength=len(values)).float()
        expected = 8000 / len(values)
        assert ((counts - expected) ** 2 / expected).sum() < 30, name  # chi-square, at most 9 degrees: p < 0.001
    pair = scenes.factors["object"] * 8 + scenes.factors["place"]
    counts = torch.bincount(pair, minlength=80).float()
    assert ((counts - 100) ** 2 / 100).sum() < 124  # 79 degrees: p < 0.001


def pairs(scenes, name):
    return set(zip(scenes.factors["object"].tolist(), scenes.factors[name].tolist()))


def test_what_is_unseen_is_in_no_scene_that_was_seen():
    seen, unseen = Scenes("seen", n=4000), Scenes("unseen", n=2000)
    missing = {"color": {(k, 5 * k % 8) for k in range(10)}, "action": {(k, 2 * k % 5) for k in range(10)}}
    for name in ("color", "action"):
        assert pairs(seen, name) == {(k, v) for k in range(10) for v in range(len(FACTORS[name]))} - missing[name]
    new = torch.zeros(2000, dtype=torch.bool)
    for name in ("color", "action"):
        number = {"color": 5, "action": 2}[name] * unseen.factors["object"] % len(FACTORS[name])
        new |= number == unseen.factors[name]
        assert missing[name] <= pairs(unseen, name)
    assert new.all()
    for name, values in FACTORS.items():  # every word has been seen, only not together
        assert len(seen.factors[name].unique()) == len(values)


def test_every_object_is_in_its_picture_with_its_parts(scenes):
    for mask, kind in zip(scenes.masks, scenes.labels):
        assert (mask > 0).float().mean() > 0.03
        assert mask.max() <= len(list(KINDS.values())[kind])


def test_the_map_of_things_agrees_with_the_parts(scenes):
    assert torch.equal(scenes.things == OBJECT, scenes.masks > 0)
    shares = {code: float((scenes.things == code).flatten(1).any(1).float().mean()) for code in (1, 2, 3, 4)}
    assert shares[OBJECT] == 1
    assert 0.15 < shares[SECOND] < 0.35
    assert shares[CLUTTER] > 0.5
    assert 0.3 < shares[BEFORE] < 0.6


def test_what_stands_before_hides_some_of_the_object():
    """Without it the same scenes show more of their objects."""
    scenes = Scenes("val", size=32, n=100)
    hidden = (scenes.things == BEFORE).flatten(1).any(1)
    area = (scenes.masks > 0).flatten(1).float().mean(1)
    assert area[hidden].mean() < area[~hidden].mean()


def test_a_box_holds_the_object_and_nothing_more(scenes):
    for mask, (left, top, right, bottom) in zip(scenes.masks[:50] > 0, scenes.boxes[:50].tolist()):
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert mask[top].any()
        assert mask[bottom - 1].any()
        assert mask[:, left].any()
        assert mask[:, right - 1].any()


def test_nothing_has_an_empty_box():
    assert boxes(torch.zeros(1, 8, 8, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("size", [64, 128, 512])
def test_a_scene_is_the_same_at_any_size(size):
    draws = uniforms("test", 0, range(4))
    small, large = (render(draws, factors(draws), s).images.float() for s in (32, size))
    shrunk = torch.nn.functional.avg_pool2d(large, size // 32)
    assert (small - shrunk).abs().mean() < 6  # of 255: edges and fine texture


def test_every_caption_tells_all_the_factors(scenes):
    assert len(set(CAPTIONS)) >= 6
    assert len(scenes.captions) == len(scenes)
    for i, texts in enumerate(scenes.captions[:50]):
        assert len(set(texts)) == len(CAPTIONS)
        for text in texts:
            for name, values in FACTORS.items():
                assert values[scenes.factors[name][i]] in text


def test_prompts_say_their_class_and_are_alike_otherwise():
    for name, classes in FACTORS.items():
        for texts in zip(*prompts(name, FACTORS, n=12)):
            assert len(set(texts)) == len(classes)
            assert len({text.replace(described(name, c), "") for c, text in zip(classes, texts)}) == 1


def described(name, c):
    return f"{_WHERE[c]}" if name == "place" else c


def test_parts_have_names():
    assert part_names("fish") == ("tail", "fin", "body", "eye", "eye")
    assert len(KINDS) >= 10


def test_what_is_not_there_is_said():
    with pytest.raises(InputError, match="train, val, test"):
        Scenes("all")
    with pytest.raises(InputError, match="16 or more"):
        Scenes("train", size=8)


def test_a_scene_is_made_of_its_draws():
    """All but the caption's are used, and no more are asked for."""
    draws = uniforms("train", 0, range(3))
    assert draws.shape == (3, DRAWS)
    render(draws[:, :-1], factors(draws), 16)
    with pytest.raises(StopIteration):
        render(draws[:, :-2], factors(draws), 16)
