"""The contract of every `ImageDataset`: items, batches, subsets and the DataLoader agree."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from minissl.data import ImageDataset, Images, Scenes, from_dataset
from minissl.data.images import Factor
from minissl.data.streaming import ImageFiles
from minissl.data.synthetic.uncurated import UncuratedPool
from minissl.errors import InputError
from tests.folders import class_folders

N = 12


def images_with_everything():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 3, (N, 16, 16), dtype=torch.uint8, generator=generator)
    captions = tuple((f"image {i}", f"number {i}") for i in range(N))
    factors = {"half": Factor(torch.arange(N) // 6, ("first", "second"), ((), ()))}
    return Images(images, torch.arange(N) % 3, ("a", "b", "c"), masks, captions, factors)


@pytest.fixture(params=["images", "scenes", "pool", "files", "streamed adapter"])
def dataset(request, tmp_path):
    if request.param == "files":
        files = sorted(class_folders(tmp_path, train=6).rglob("*.png"))
        return ImageFiles(files, 16, torch.arange(N) // 6, ("cat", "dog"), num_workers=0)
    if request.param == "streamed adapter":
        items = [{"image": np.full((20, 30), 20 * i, np.uint8), "label": i % 4} for i in range(N)]
        return from_dataset(items, 16, in_memory=False)
    if request.param == "images":
        return images_with_everything()
    return Scenes("val", 16, N) if request.param == "scenes" else UncuratedPool(N, 16)


def expected(dataset):
    """All images (N, 3, S, S) of a data set, one by one."""
    return torch.stack([dataset[i]["image"] for i in range(len(dataset))])


def test_every_data_set_is_an_image_dataset(dataset):
    assert isinstance(dataset, ImageDataset)
    assert isinstance(dataset, Dataset)
    assert len(dataset) == N
    assert dataset.image_size == 16
    assert dataset.device == torch.device("cpu")
    assert dataset.fingerprint["images"] == N
    assert dataset.fingerprint == dataset.fingerprint
    assert str(N) in repr(dataset)


def test_an_item_has_an_image_and_every_known_annotation(dataset):
    images = expected(dataset)
    assert images.dtype == torch.uint8
    assert images.shape == (N, 3, 16, 16)
    item = dataset[7]
    assert item["label"] == int(dataset.labels[7])
    assert ("mask" in item) == (dataset.masks is not None)
    if dataset.masks is not None:
        assert torch.equal(item["mask"], dataset.masks[7])
    assert item.get("captions") == (None if dataset.captions is None else dataset.captions[7])
    assert item.get("factors", {}) == {name: int(factor.labels[7]) for name, factor in dataset.factors.items()}


def test_indices_are_checked_and_iteration_ends(dataset):
    assert torch.equal(dataset[-1]["image"], dataset[N - 1]["image"])
    assert torch.equal(dataset[np.int64(3)]["image"], dataset[3]["image"])
    for index in (N, -N - 1):
        with pytest.raises(IndexError, match=f"{N} images"):
            dataset[index]
    assert len(list(dataset)) == N


def test_batches_equal_items(dataset):
    images, indices = expected(dataset), torch.tensor([7, 3, 3, 10])
    batches = list(dataset.iterate([indices, indices[:1]]))
    for batch in (dataset.get_batch(indices), batches[0]):
        assert torch.equal(batch.images, images[indices])
        assert torch.equal(batch.labels, dataset.labels[indices])
        assert batch.captions == (None if dataset.captions is None else [dataset.captions[i] for i in indices])
        assert set(batch.factors or {}) == set(dataset.factors)
        for name, labels in (batch.factors or {}).items():
            assert torch.equal(labels, dataset.factors[name].labels[indices])
    assert torch.equal(batches[1].images, images[7:8])


def test_subsets_are_in_memory_with_all_annotations(dataset):
    images, indices = expected(dataset), torch.tensor([11, 0, 5])
    subset = dataset.subset(indices)
    assert isinstance(subset, Images)
    assert torch.equal(subset.images, images[indices])
    assert torch.equal(subset.labels, dataset.labels[indices])
    assert subset.classes == dataset.classes
    assert subset.captions == (None if dataset.captions is None else tuple(dataset.captions[i] for i in indices))
    assert (subset.masks is None) == (dataset.masks is None)
    if subset.masks is not None:
        assert torch.equal(subset.masks, dataset.masks[indices])
    assert {name: f.labels.tolist() for name, f in subset.factors.items()} == {
        name: f.labels[indices].tolist() for name, f in dataset.factors.items()
    }
    assert torch.equal(dataset.subsample(4).images, images[::3])
    assert torch.equal(dataset.subsample(99).images, images)


def test_classes_are_selected_with_new_labels(dataset):
    chosen = [int(dataset.labels[N - 1]), int(dataset.labels[0])]
    if chosen[0] == chosen[1] or min(chosen) < 0:
        chosen = dataset.labels[dataset.labels >= 0].unique().tolist()[:2][::-1]
    selected = dataset.select_classes(chosen)
    rows = torch.isin(dataset.labels, torch.tensor(chosen)).nonzero()[:, 0]
    assert torch.equal(selected.images, expected(dataset)[rows])
    assert [chosen[i] for i in selected.labels] == dataset.labels[rows].tolist()
    assert selected.classes == tuple(dataset.classes[i] for i in chosen)


def test_a_factor_can_become_the_label(dataset):
    for name, factor in dataset.factors.items():
        relabeled = dataset.with_labels(name)
        assert torch.equal(relabeled.labels, factor.labels)
        assert relabeled.classes == factor.classes
        assert torch.equal(expected(relabeled), expected(dataset))
        assert not torch.equal(dataset.labels, factor.labels) or name == "object"
    with pytest.raises(InputError, match="colr"):
        dataset.with_labels("colr")


def test_a_device_gets_all_that_is_known(dataset):
    moved = dataset.to(torch.device("cpu"))
    assert torch.equal(moved.get_batch(torch.arange(N)).images, expected(dataset))
    assert torch.equal(moved.labels, dataset.labels)
    assert moved.name == dataset.name
    assert set(moved.factors) == set(dataset.factors)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_dicts_of_tensors(dataset, num_workers):
    loader = DataLoader(dataset, batch_size=8, num_workers=num_workers)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), expected(dataset))
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), dataset.labels)
    for name, factor in dataset.factors.items():
        assert torch.equal(torch.cat([batch["factors"][name] for batch in batches]), factor.labels)
    if dataset.masks is not None:
        assert torch.equal(torch.cat([batch["mask"] for batch in batches]), dataset.masks)
    if dataset.captions is not None:
        assert batches[0]["captions"][1][3] == dataset.captions[3][1]


def test_a_data_loader_of_the_full_training_split_starts_at_once():
    """Ten thousand scenes would take many seconds to render; a batch renders its own eight."""
    scenes = Scenes("train", size=16)
    batch = next(iter(DataLoader(scenes, batch_size=8)))
    assert batch["image"].shape == (8, 3, 16, 16)
    assert batch["mask"].shape == (8, 16, 16)
    assert torch.equal(batch["label"], scenes.labels[:8])
    assert batch["factors"]["color"].shape == (8,)
    assert int(scenes._cache.done.sum()) == 8


def test_torch_subsets_work(dataset):
    part = Subset(dataset, [2, 9])
    assert torch.equal(part[1]["image"], dataset[9]["image"])
    assert [item["label"] for item in part] == dataset.labels[[2, 9]].tolist()


def test_annotations_of_another_length_are_refused():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for options in ({"labels": torch.zeros(3)}, {"masks": torch.zeros(5, 8, 8)}, {"captions": (("a",),)}):
        with pytest.raises(InputError, match=f"{next(iter(options))}.* 4 images"):
            Images(images, **options)


def test_unlabeled_images_cannot_be_selected_by_class():
    with pytest.raises(InputError, match="no labels"):
        Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)).select_classes([0])
