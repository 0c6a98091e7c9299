"""Scenes are the same on every machine, their factors are independent, and their annotations are true."""

import hashlib
import subprocess
import sys

import pytest
import torch

from minissl.data.synthetic import scenes as scenes_module
from minissl.data.synthetic.captions import CAPTIONS, PLACE_PHRASES, factor_prompts
from minissl.data.synthetic.scenes import (
    CLUTTER,
    FACTORS,
    NUM_DRAWS,
    OBJECT,
    OCCLUDER,
    SECOND_OBJECT,
    SPLITS,
    Scenes,
    boxes,
    part_names,
    render,
    scene_factors,
    uniforms,
)
from minissl.data.synthetic.shapes import OBJECT_PARTS
from minissl.errors import InputError

# Of Scenes("train", size=32, n=16). If these change, all published results have to be measured again.
GOLDEN = {"images": "541f9bf3f539e0c5", "masks": "2de15bd2f99474eb", "regions": "7267c0f83839fde4"}
HASH_SCRIPT = (
    "import hashlib, torch; torch.set_num_threads(3); from minissl.data import Scenes;"
    "s = Scenes('train', size=32, n=300); print(hashlib.sha256(s.images.numpy().tobytes()).hexdigest()[:16])"
)


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def scenes():
    return Scenes("train", size=32, n=300)


def test_scenes_equal_the_published_ones():
    scenes = Scenes("train", size=32, n=16)
    assert {name: digest(getattr(scenes, name)) for name in GOLDEN} == GOLDEN


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["", "default"])
def test_threads_and_vector_instructions_do_not_change_the_bytes(scenes, capability):
    """Elementwise float64 is rounded alike with and without vector instructions, to far below a gray level."""
    environment = {"PATH": "", "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", HASH_SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == digest(scenes.images)


def test_a_scene_does_not_depend_on_the_others(scenes):
    draws = uniforms("train", 0, [150])
    rendering = render(draws, scene_factors(draws), 32)
    for name in ("images", "masks", "regions"):
        assert torch.equal(getattr(rendering, name)[0], getattr(scenes, name)[150])


def test_construction_renders_nothing_and_an_item_only_itself(monkeypatch):
    rendered = []
    render_all = scenes_module.render_all
    monkeypatch.setattr(scenes_module, "render_all", lambda d, f, s: rendered.append(len(d)) or render_all(d, f, s))
    scenes = Scenes("train", size=16, n=40)
    assert scenes.with_labels("color").classes == FACTORS["color"]
    assert (len(scenes), scenes.nbytes, len(scenes.captions)) == (40, 40 * 3 * 16 * 16, 40)
    assert rendered == []
    scenes[3], scenes[3], scenes.get_batch(torch.tensor([5, 3, 5, 4])), scenes.subset(torch.tensor([4, 9]))
    assert rendered == [1, 2, 1]
    relabeled = scenes.with_labels("place")
    assert relabeled.images.data_ptr() == scenes.images.data_ptr()
    assert rendered == [1, 2, 1, 36]
    assert torch.equal(scenes.images, Scenes("train", size=16, n=40).images)
    assert torch.equal(scenes.masks, Scenes("train", size=16, n=40).masks)


def test_splits_and_seeds_share_no_scene():
    draws = [uniforms(split, seed, range(50)) for split in SPLITS for seed in (0, 1)]
    first_numbers = torch.cat(draws)[:, 0]
    assert len(first_numbers.unique()) == len(first_numbers)


def test_factors_are_uniform_and_independent():
    scenes = Scenes("train", n=8000)
    labels = {name: factor.labels for name, factor in scenes.factors.items()}
    for name, classes in FACTORS.items():
        counts = torch.bincount(labels[name], minlength=len(classes)).float()
        expected = 8000 / len(classes)
        assert ((counts - expected) ** 2 / expected).sum() < 30, name  # chi-square, at most 9 degrees: p < 0.001
    counts = torch.bincount(labels["object"] * 8 + labels["place"], minlength=80).float()
    assert ((counts - 100) ** 2 / 100).sum() < 124  # 79 degrees: p < 0.001


def test_factors_have_their_classes_and_prompts(scenes):
    assert torch.equal(scenes.labels, scenes.factors["object"].labels)
    for name, factor in scenes.factors.items():
        assert factor.classes == FACTORS[name]
        assert len(factor.prompts) == len(factor.classes)


def combinations(scenes, name):
    return set(zip(scenes.factors["object"].labels.tolist(), scenes.factors[name].labels.tolist()))


def test_unseen_combinations_are_in_no_seen_scene():
    seen, unseen = Scenes("seen", n=4000), Scenes("unseen", n=2000)
    missing = {"color": {(k, 5 * k % 8) for k in range(10)}, "action": {(k, 2 * k % 5) for k in range(10)}}
    for name in ("color", "action"):
        every = {(k, v) for k in range(10) for v in range(len(FACTORS[name]))}
        assert combinations(seen, name) == every - missing[name]
    is_new = torch.zeros(2000, dtype=torch.bool)
    for name, step in (("color", 5), ("action", 2)):
        is_new |= step * unseen.labels % len(FACTORS[name]) == unseen.factors[name].labels
        assert missing[name] <= combinations(unseen, name)
    assert is_new.all()
    for name, classes in FACTORS.items():  # every word is known, only its combinations are new
        assert len(seen.factors[name].labels.unique()) == len(classes)


def test_every_object_is_visible_with_its_own_parts(scenes):
    for mask, label in zip(scenes.masks, scenes.labels):
        assert (mask > 0).float().mean() > 0.03
        assert mask.max() <= len(list(OBJECT_PARTS.values())[label])


def test_regions_agree_with_the_masks(scenes):
    assert torch.equal(scenes.regions == OBJECT, scenes.masks > 0)
    fractions = {code: float((scenes.regions == code).flatten(1).any(1).float().mean()) for code in (1, 2, 3, 4)}
    assert fractions[OBJECT] == 1
    assert 0.15 < fractions[SECOND_OBJECT] < 0.35
    assert fractions[CLUTTER] > 0.5
    assert 0.3 < fractions[OCCLUDER] < 0.6


def test_occluders_hide_a_part_of_the_object():
    scenes = Scenes("val", size=32, n=100)
    occluded = (scenes.regions == OCCLUDER).flatten(1).any(1)
    area = (scenes.masks > 0).flatten(1).float().mean(1)
    assert area[occluded].mean() < area[~occluded].mean()


def test_boxes_are_tight(scenes):
    for mask, (left, top, right, bottom) in zip(scenes.masks[:50] > 0, scenes.boxes[:50].tolist()):
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert mask[top].any()
        assert mask[bottom - 1].any()
        assert mask[:, left].any()
        assert mask[:, right - 1].any()


def test_an_empty_mask_has_an_empty_box():
    assert boxes(torch.zeros(1, 8, 8, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("size", [64, 128, 512])
def test_a_scene_is_the_same_at_any_size(size):
    draws = uniforms("test", 0, range(4))
    small, large = (render(draws, scene_factors(draws), s).images.float() for s in (32, size))
    downsampled = torch.nn.functional.avg_pool2d(large, size // 32)
    assert (small - downsampled).abs().mean() < 6  # of 255: edges and fine texture


def test_every_caption_names_all_factors(scenes):
    assert len(set(CAPTIONS)) >= 6
    assert len(scenes.captions) == len(scenes)
    for i, captions in enumerate(scenes.captions[:50]):
        assert len(set(captions)) == len(CAPTIONS)
        for caption in captions:
            for factor in scenes.factors.values():
                assert factor.classes[factor.labels[i]] in caption


def test_prompts_of_two_classes_differ_by_the_class_alone():
    for name, classes in FACTORS.items():
        for sentences in zip(*factor_prompts(name, FACTORS, n=12)):
            assert len(set(sentences)) == len(classes)
            words = [PLACE_PHRASES[c] if name == "place" else c for c in classes]
            assert len({sentence.replace(word, "") for word, sentence in zip(words, sentences)}) == 1


def test_parts_have_names():
    assert part_names("fish") == ("tail", "fin", "body", "eye", "eye")
    assert len(OBJECT_PARTS) >= 10


def test_an_unknown_split_and_a_tiny_size_are_refused():
    with pytest.raises(InputError, match="did you mean 'train'"):
        Scenes("trian")
    with pytest.raises(InputError, match="16"):
        Scenes("train", size=8)


def test_rendering_uses_all_random_numbers_but_one_and_no_more():
    draws = uniforms("train", 0, range(3))
    assert draws.shape == (3, NUM_DRAWS)
    render(draws[:, :-1], scene_factors(draws), 16)
    with pytest.raises(StopIteration):
        render(draws[:, :-2], scene_factors(draws), 16)
