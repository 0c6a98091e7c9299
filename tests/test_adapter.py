"""`from_dataset` converts data sets of torchvision, Hugging Face and users, and explains items that it cannot use."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset

from minissl.data import Images, Scenes, adapter, from_dataset, load_dataset
from minissl.data.adapter import AdaptedDataset
from minissl.data.images import decode_image
from minissl.errors import InputError
from tests.folders import class_folders, small_memory

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (20, 28, 3), dtype=np.uint8)
GRAY = COLOR[..., 0]


class Items:
    """A data set of one's own: items by index, with attributes."""

    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def cropped(pixels, size=16):
    """The image that a file with these pixels would give, (3, S, S)."""
    fitted = adapter.center_crop(Image.fromarray(pixels), size)
    return torch.from_numpy(fitted.copy()).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(COLOR), COLOR),
        (Image.fromarray(GRAY), GRAY),
        (Image.fromarray(np.dstack([COLOR, GRAY])), COLOR),
        (COLOR, COLOR),
        (GRAY, GRAY),
        (GRAY[..., None], GRAY),
        (np.dstack([COLOR, GRAY]), COLOR),
        (np.float32(COLOR / 255), COLOR),
        (GRAY / 255, GRAY),
        (torch.from_numpy(COLOR).permute(2, 0, 1), COLOR),
        (torch.from_numpy(GRAY), GRAY),
        (torch.from_numpy(GRAY)[None], GRAY),
        (torch.from_numpy(np.dstack([COLOR, GRAY])).permute(2, 0, 1) / 255, COLOR),
        (torch.from_numpy(COLOR).permute(2, 0, 1).double() / 255, COLOR),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_every_kind_of_image_gives_the_same_pixels(image, expected, in_memory):
    dataset = from_dataset([image, image], 16, in_memory=in_memory)
    assert dataset.labels is None
    assert dataset.classes == ()
    assert torch.equal(dataset[1]["image"], cropped(expected))


def test_float_overshoots_of_a_resize_are_clipped():
    image = torch.full((3, 16, 16), 1.05)
    image[0] = -0.05
    assert from_dataset([image], 16)[0]["image"].amax((1, 2)).tolist() == [0, 255, 255]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    "as_item",
    [
        lambda image, label: (image, label),
        lambda image, label: [image, torch.tensor(label), "more"],
        lambda image, label: {"image": image, "label": label},
        lambda image, label: {"img": image, "labels": np.int64(label), "id": 7},
    ],
)
def test_labels_come_from_tuples_and_dicts(as_item, in_memory):
    dataset = from_dataset([as_item(COLOR, i % 3) for i in range(5)], 8, in_memory=in_memory)
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1]
    assert dataset.labels.dtype == torch.int64
    assert dataset.classes == ("0", "1", "2")
    assert [dataset[i]["label"] for i in range(5)] == [0, 1, 2, 0, 1]
    assert dataset.name == "custom"


def test_torchvision_data_sets_are_read(tmp_path):
    fake = torchvision.datasets.FakeData(12, image_size=(3, 20, 24), num_classes=4)
    dataset = from_dataset(fake, 16)
    assert isinstance(dataset, Images)
    assert dataset.labels.tolist() == [int(label) for _, label in fake]
    expected = adapter.center_crop(fake[5][0], 16)
    assert np.array_equal(dataset.images[5].permute(1, 2, 0).numpy(), expected)
    as_tensors = torchvision.datasets.FakeData(
        12, image_size=(3, 20, 24), num_classes=4, transform=torchvision.transforms.ToTensor()
    )
    assert torch.equal(from_dataset(as_tensors, 16).images, dataset.images)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_image_folder_is_the_same_by_torchvision(tmp_path, in_memory):
    folder = class_folders(tmp_path, train=6)
    ours = load_dataset(f"folder:{folder}", "train", 16).subset(torch.arange(11))
    theirs = from_dataset(torchvision.datasets.ImageFolder(folder / "train"), 16, in_memory=in_memory)
    assert theirs.classes == ("cat", "dog")
    assert theirs.labels.tolist() == [0] * 6 + [1] * 6
    files = sorted((folder / "train").rglob("*.png"))
    for i, file in enumerate(files):
        assert np.array_equal(theirs[i]["image"].permute(1, 2, 0).numpy(), decode_image(file, 16))
    assert len(ours) == 11


def test_hugging_face_features_name_the_classes():
    features = {"img": object(), "label": SimpleNamespace(names=["cat", "dog"])}
    dataset = from_dataset(Items([{"img": COLOR, "label": i % 2} for i in range(4)], features=features), 8)
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 1, 0, 1]


def test_classes_are_found_through_subsets_and_may_have_synonyms():
    items = Items([(COLOR, i) for i in range(2)], classes=[("tench", "Tinca tinca"), "church"])
    dataset = from_dataset(Subset(items, [1, 0]), 8)
    assert dataset.classes == ("tench", "church")
    assert dataset.labels.tolist() == [1, 0]


def test_targets_that_are_not_numbers_count_as_no_labels():
    assert from_dataset([(COLOR, {"boxes": []})] * 3, 8).labels is None
    assert from_dataset([{"image": COLOR, "label": None}] * 3, 8).labels is None
    assert from_dataset([{"image": COLOR, "label": -1}] * 3, 8).labels is None  # a secret test split


def test_some_images_may_be_unlabeled():
    assert from_dataset([(COLOR, 2), (COLOR, -1)], 8).labels.tolist() == [2, -1]


@pytest.mark.parametrize("image_size", [16, 64])
def test_our_own_data_sets_are_accepted(image_size):
    scenes = Scenes("val", 16, 6)
    dataset = from_dataset(scenes, image_size)
    assert torch.equal(dataset.labels, scenes.labels)
    assert dataset.classes == scenes.classes
    assert torch.equal(dataset.images, scenes.images) == (image_size == 16)


def reading(items):
    """Items that count how often each is read."""
    counts = [0] * len(items)

    class Counting(Items):
        def __getitem__(self, index):
            counts[index] += 1
            return items[index]

    return Counting(items), counts


def test_a_streamed_data_set_uses_listed_labels_if_they_are_true():
    items = [(COLOR, i % 3) for i in range(9)]
    listed, counts = reading(items)
    listed.targets = [i % 3 for i in range(9)]
    assert from_dataset(listed, 8, in_memory=False).labels.tolist() == listed.targets
    assert counts[1] == 0
    for targets in ([2 - i % 3 for i in range(9)], [0], ["a"] * 9, torch.zeros(9)):  # another order, length or kind
        listed.targets = targets
        assert from_dataset(listed, 8, in_memory=False).labels.tolist() == [i % 3 for i in range(9)]


def test_listed_labels_are_found_as_tensors_columns_and_in_subsets():
    labels = torch.arange(9) % 3
    for attributes in ({"targets": labels}, {"labels": labels.numpy()}, {"labels": labels.tolist()}):
        listed, counts = reading([(COLOR, int(label)) for label in labels])
        vars(listed).update(attributes)
        assert from_dataset(Subset(listed, [8, 3, 1, 4, 5]), 8, in_memory=False).labels.tolist() == [2, 0, 1, 1, 2]
        assert counts[4] == 0

    class Columns(Items):
        def __getitem__(self, index):
            return [item["label"] for item in self.items] if index == "label" else self.items[index]

    items = [{"image": COLOR, "label": int(label)} for label in labels]
    dataset = from_dataset(Columns(items, features={"label": None}), 8, in_memory=False)
    assert torch.equal(dataset.labels, labels)


def test_a_data_set_larger_than_memory_is_streamed_with_the_same_batches():
    items = [(RNG.integers(0, 256, (20, 28, 3), dtype=np.uint8), i % 3) for i in range(20)]
    resident = from_dataset(items, 16)
    with small_memory():
        streamed = from_dataset(items, 16)
        with pytest.raises(InputError, match="memory"):
            from_dataset(items, 16, in_memory=True)
    assert isinstance(streamed, AdaptedDataset)
    assert streamed.nbytes == 0
    assert torch.equal(streamed.labels, resident.labels)
    assert streamed.num_workers > 0
    orders = [torch.tensor([19, 3, 3]), torch.tensor([0, 7, 5])]
    for ours, theirs in zip(streamed.iterate(orders), resident.iterate(orders)):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(streamed.subsample(20).images, resident.images)
    items[8] = (items[8][0], 0)
    assert streamed.fingerprint == streamed.fingerprint
    assert from_dataset(items, 16, in_memory=False).fingerprint != streamed.fingerprint


def test_worker_processes_read_a_large_data_set(monkeypatch):
    monkeypatch.setattr("minissl.data.streaming.MIN_FOR_WORKERS", 10)
    items = [(np.full((8, 8), i, np.uint8), i) for i in range(130)]
    dataset = from_dataset(items, 8)
    assert dataset.images[:, 0, 0, 0].tolist() == dataset.labels.tolist() == list(range(130))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_dicts_of_tensors(num_workers):
    dataset = from_dataset(torchvision.datasets.FakeData(12, (3, 20, 24), 4), 16)
    batch = next(iter(DataLoader(dataset, batch_size=8, num_workers=num_workers)))
    assert batch["image"].shape == (8, 3, 16, 16)
    assert torch.equal(batch["label"], dataset.labels[:8])


class Endless(IterableDataset):
    def __iter__(self):
        return iter([COLOR])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "empty"),
        (Endless(), "Endless has no length"),
        (iter([COLOR]), "no length"),
        ({"train": [COLOR], "test": [COLOR]}, "'train', 'test'"),
        ("folder:photos", "load_dataset"),
    ],
)
def test_a_data_set_without_length_indices_or_images_is_refused(dataset, message):
    with pytest.raises(InputError, match=message):
        from_dataset(dataset, 16)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("cat.png", "item 2 is of type str"),
        (None, "item 2 is missing"),
        ((), "Item 2 is an empty tuple"),
        ({"photo": COLOR}, "Item 2 is a dict with the keys 'photo'"),
        (np.zeros((3, 20, 28), np.uint8), r"item 2 is an array uint8 \(3, 20, 28\)"),
        (torch.zeros(20, 28, 3), r"item 2 is a tensor float32 \(20, 28, 3\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "item 2 is a tensor int64"),
        (torch.zeros(2, 3, 8, 8), r"item 2 is a tensor float32 \(2, 3, 8, 8\)"),
        (torch.zeros(3, 0, 8), r"item 2 is a tensor float32 \(3, 0, 8\)"),
        (torch.full((3, 8, 8), float("nan")), "from nan to nan"),
        (torch.full((3, 8, 8), -2.0), "from -2 to -2"),
        (torch.full((3, 8, 8), 255.0), "from 255 to 255"),
        (Image.fromarray(np.zeros((8, 8), np.float32)), "item 2 is a PIL image of mode 'F'"),
    ],
)
def test_an_unusable_item_is_named_with_what_it_is(item, message, in_memory):
    def convert_and_read():
        dataset = from_dataset([COLOR, COLOR, item], 16, in_memory=in_memory)
        next(dataset.iterate([torch.tensor([0, 2])]))

    with pytest.raises(InputError, match=message):
        convert_and_read()


def test_a_broken_image_file_is_named(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(COLOR).save(tmp_path / name)
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    images = [Image.open(tmp_path / name) for name in ("a.png", "b.png")]  # Pillow reads them later
    with pytest.raises(InputError, match="item 1 cannot be decoded"):
        from_dataset(images, 16)
    for image in images:
        image.close()


def test_an_exception_of_the_data_set_is_named():
    class Failing(Items):
        def __getitem__(self, index):
            raise KeyError("gone")

    with pytest.raises(InputError, match=r"Item 0 cannot be read \(KeyError: 'gone'\)"):
        from_dataset(Failing([1, 2]), 16)


@pytest.mark.parametrize(
    ("labels", "attributes", "message"),
    [
        ([0, None], {}, "label of item 1 is missing"),
        ([0, 0.5], {}, "label of item 1 is of type float"),
        (["cat", "dog"], {}, "label of item 0 is the text 'cat'"),
        ([0, 2], {"classes": ["cat", "dog"]}, "label of item 1 is 2, .* 2 classes"),
    ],
)
def test_an_unusable_label_is_named(labels, attributes, message):
    with pytest.raises(InputError, match=message):
        from_dataset(Items([(COLOR, label) for label in labels], **attributes), 16)


@pytest.mark.parametrize("size", [0, -3])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(InputError, match=str(size)):
        from_dataset([COLOR], size)
