"""Data sets by name: what the embedded world can be asked for, and captions on the same way."""

import numpy as np
import pytest
import torch
from PIL import Image

from minissl.data import load, sources
from minissl.data.images import decode, read_mask
from minissl.data.scenes import FACTORS, OBJECTS, Scenes
from minissl.errors import InputError
from tests.folders import picture


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sources, "Scenes", lambda split, size, seed: Scenes(split, size, 60, seed))


def test_scenes_know_their_factors_and_captions():
    images = load("scenes", "train", 32)
    assert set(images.factors) == set(FACTORS)
    assert torch.equal(images.factors["object"].labels, images.labels)
    for name, factor in images.factors.items():
        assert factor.classes == FACTORS[name]
        assert len(factor.prompts) == len(factor.classes)
        for i in range(10):
            assert factor.classes[factor.labels[i]] in images.captions[i][0]


@pytest.mark.parametrize("name", FACTORS)
def test_another_factor_can_be_the_label(name):
    images = load(f"scenes:{name}", "train", 32)
    assert images.classes == FACTORS[name]
    assert torch.equal(images.labels, images.factors[name].labels)


def test_known_and_new_kinds_are_all_of_them_once():
    known, new, all_of_them = (load(name, "train", 32) for name in ("scenes:known", "scenes:new", "scenes"))
    assert known.classes + new.classes == OBJECTS
    assert len(known) + len(new) == len(all_of_them)
    for part in (known, new):
        assert set(part.labels.tolist()) == set(range(5))
        for i in range(len(part)):
            assert part.classes[part.labels[i]] in part.captions[i][0]
            assert OBJECTS[part.factors["object"].labels[i]] == part.classes[part.labels[i]]
        assert len(part.masks) == len(part)


def test_compositions_are_tested_on_what_they_were_not_trained_on():
    train, test = load("scenes:compositions", "train", 32), load("scenes:compositions", "test", 32)
    pairs = [
        {(int(o), int(c)) for o, c in zip(x.factors["object"].labels, x.factors[name].labels)}
        for x in (train, test) for name in ("color", "action")
    ]  # fmt: skip
    seen_colors, seen_actions, new_colors, new_actions = pairs
    assert new_colors - seen_colors or new_actions - seen_actions
    objects = test.factors["object"].labels
    missing = (test.factors["color"].labels == 5 * objects % 8) | (test.factors["action"].labels == 2 * objects % 5)
    assert missing.all()


def test_an_unknown_part_is_said():
    with pytest.raises(InputError, match=r"no scenes:sky; choose scenes or one of scenes:compositions, scenes:known"):
        load("scenes:sky", "train", 32)


def test_captioned_photographs_come_the_same_way(tmp_path):
    for i in range(3):
        picture(tmp_path / "Images" / f"{i}.jpg")
    lines = [f"{i}.jpg,a picture of {i}\n" for i in range(3)]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(lines))
    images = load(f"flickr8k:{tmp_path}", "train", 16)
    assert images.captions == tuple((f"a picture of {i}",) for i in range(3))
    assert images.labels is None


def test_batches_bring_what_is_known_of_each_image():
    images = load("scenes", "train", 32)
    rows = torch.tensor([7, 3, 50])
    (batch,) = images.batches([rows])
    assert torch.equal(batch["images"], images.images[rows])
    assert batch["captions"] == [images.captions[i] for i in rows.tolist()]
    assert all(torch.equal(batch["factors"][n], f.labels[rows]) for n, f in images.factors.items())


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
def test_a_photograph_is_seen_as_it_was_taken_and_so_is_its_mask(tmp_path, turned, kind):
    upright = np.zeros((24, 16), dtype=np.uint8)
    upright[:8, :8] = 255  # light at the top left
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what a camera held so would have stored, by Pillow's number
    stored = Image.fromarray(upright)
    stored = stored if turned == 1 else stored.transpose(Image.Transpose(back[turned]))
    exif = Image.Exif()
    exif[0x0112] = turned
    stored.convert("RGB").save(tmp_path / f"photo.{kind}", exif=exif)
    stored.save(tmp_path / "mask.png")
    seen = decode(tmp_path / f"photo.{kind}", 16)[..., 0]
    mask = read_mask(tmp_path / "mask.png", 16, tmp_path / f"photo.{kind}").numpy()
    expected = upright[4:20] > 128  # the middle
    assert ((seen > 128) == expected).mean() > 0.98  # JPEG blurs an edge
    assert ((mask > 128) == expected).all()
