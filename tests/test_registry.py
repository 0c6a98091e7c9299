"""`load_dataset` finds every data set by its name, with its labels, factors and captions."""

import numpy as np
import pytest
import torch
from PIL import Image

from minissl.data import list_datasets, load_dataset, registry
from minissl.data.images import decode_image, read_mask
from minissl.data.synthetic.scenes import FACTORS, OBJECTS, Scenes
from minissl.errors import InputError
from tests.folders import class_folders, write_image


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(registry, "Scenes", lambda split, size, seed: Scenes(split, size, 60, seed))


def test_scenes_have_factors_and_captions():
    dataset = load_dataset("scenes", "train", 32)
    assert set(dataset.factors) == set(FACTORS)
    assert torch.equal(dataset.factors["object"].labels, dataset.labels)
    for name, factor in dataset.factors.items():
        assert factor.classes == FACTORS[name]
        assert len(factor.prompts) == len(factor.classes)
        for i in range(10):
            assert factor.classes[factor.labels[i]] in dataset.captions[i][0]


@pytest.mark.parametrize("name", FACTORS)
def test_another_factor_can_be_the_label(name):
    dataset = load_dataset(f"scenes:{name}", "train", 32)
    assert dataset.classes == FACTORS[name]
    assert torch.equal(dataset.labels, dataset.factors[name].labels)


def test_known_and_new_partition_the_objects():
    known, new, everything = (load_dataset(name, "train", 32) for name in ("scenes:known", "scenes:new", "scenes"))
    assert known.classes + new.classes == OBJECTS
    assert len(known) + len(new) == len(everything)
    for part in (known, new):
        assert set(part.labels.tolist()) == set(range(5))
        for i in range(len(part)):
            assert part.classes[part.labels[i]] in part.captions[i][0]
            assert OBJECTS[part.factors["object"].labels[i]] == part.classes[part.labels[i]]
        assert len(part.masks) == len(part)
    assert torch.equal(known.images, everything.images[everything.labels < 5])


def test_compositions_are_tested_on_unseen_combinations():
    train, test = load_dataset("scenes:compositions", "train", 32), load_dataset("scenes:compositions", "test", 32)
    for dataset, unseen in ((train, False), (test, True)):
        objects = dataset.labels
        is_color = dataset.factors["color"].labels == 5 * objects % 8
        is_action = dataset.factors["action"].labels == 2 * objects % 5
        assert (is_color | is_action).tolist() == [unseen] * len(dataset)


def test_flickr8k_is_loaded_by_name(tmp_path):
    for i in range(3):
        write_image(tmp_path / "Images" / f"{i}.jpg")
    lines = [f"{i}.jpg,a photo of {i}\n" for i in range(3)]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(lines))
    dataset = load_dataset(f"flickr8k:{tmp_path}", "train", 16)
    assert dataset.captions == tuple((f"a photo of {i}",) for i in range(3))
    assert dataset.labels is None


def test_data_sets_know_their_names(tmp_path):
    names = ["scenes", "scenes:new", "scenes:color", "digits", f"folder:{class_folders(tmp_path, train=2)}"]
    for name in names:
        assert load_dataset(name, "train", 16).name == name
    assert load_dataset("scenes", "train", 16).subsample(5).name == "custom"


def test_every_listed_name_is_known(tmp_path, monkeypatch):
    downloaded = dict.fromkeys(registry.LOADERS, lambda *_, **__: Scenes("val", 16, 4))
    monkeypatch.setattr(registry, "LOADERS", downloaded)
    for name in list_datasets():
        if name.endswith(":PATH"):
            with pytest.raises(InputError, match="no folder"):
                load_dataset(name.replace("PATH", str(tmp_path / "nowhere")), "train", 16)
        else:
            assert load_dataset(name, "train", 16).name == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar", "'cifar10'"),
        ("scene", "'scenes'"),
        ("scenes:colr", "'scenes:color'"),
        ("stl10-unlabeld", "'stl10-unlabeled'"),
        ("folders:x", "'folder'"),
    ],
)
def test_a_misspelled_name_gets_a_suggestion(name, hint):
    with pytest.raises(InputError, match=f"did you mean {hint}"):
        load_dataset(name, "train", 32)


@pytest.mark.parametrize("name", ["scenes", "scenes:compositions", "digits", "cifar10"])
def test_an_unknown_split_is_refused(name):
    with pytest.raises(InputError, match="no split 'all'"):
        load_dataset(name, "all", 32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
def test_the_exif_orientation_is_applied_to_an_image_and_its_mask(tmp_path, orientation, kind):
    upright = np.zeros((24, 16), dtype=np.uint8)
    upright[:8, :8] = 255  # bright at the top left
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that a camera held so would store
    stored = Image.fromarray(upright)
    stored = stored if orientation == 1 else stored.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / f"photo.{kind}", exif=exif)
    stored.save(tmp_path / "mask.png")
    image = decode_image(tmp_path / f"photo.{kind}", 16)[..., 0]
    mask = read_mask(tmp_path / "mask.png", 16, tmp_path / f"photo.{kind}").numpy()
    expected = upright[4:20] > 128  # the center
    assert ((image > 128) == expected).mean() > 0.98  # JPEG blurs an edge
    assert ((mask > 128) == expected).all()
