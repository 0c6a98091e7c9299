"""Images that do not fit into memory give the same batches and the same run as those that do."""

import pytest
import torch

from minissl.cli import main
from minissl.data.folder import load_folder
from minissl.data.streaming import ImageFiles
from minissl.errors import InputError
from minissl.training.sampler import iterate_batches
from tests.folders import TINY, class_folders, small_memory


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "data", train=6, test=4)


def test_a_folder_larger_than_memory_stays_on_the_disk(folder, capsys):
    resident = load_folder(folder, "train", 16)
    with small_memory():
        streamed = load_folder(folder, "train", 16)
    assert isinstance(streamed, ImageFiles)
    assert "decoded as they come" in capsys.readouterr().out
    assert len(streamed) == len(resident) == 12
    assert streamed.image_size == resident.image_size
    subset = streamed.subsample(12)
    assert torch.equal(subset.images, resident.images)
    assert torch.equal(subset.labels, resident.labels)
    assert streamed.subsample(4).labels.tolist() == resident.subsample(4).labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_from_the_disk_wherever_they_start(folder, num_workers):
    resident = load_folder(folder, "train", 16)
    files = sorted((folder / "train").rglob("*.png"))
    streamed = ImageFiles(files, 16, resident.labels, resident.classes, num_workers)
    for step in (0, 4):
        ours = iterate_batches(streamed, 5, seed=3, start_step=step)
        theirs = iterate_batches(resident, 5, seed=3, start_step=step)
        for _, one, other in zip(range(5), ours, theirs):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert one.images.dtype == torch.uint8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_streaming_leaves_the_global_random_state_alone(folder, num_workers):
    files = sorted((folder / "train").rglob("*.png"))
    state = torch.get_rng_state()
    next(ImageFiles(files, 16, num_workers=num_workers).iterate([torch.tensor([0, 1])]))
    assert torch.equal(torch.get_rng_state(), state)


def test_worker_processes_load_a_large_subset(folder, monkeypatch):
    monkeypatch.setattr("minissl.data.streaming.MIN_FOR_WORKERS", 10)
    monkeypatch.setattr("minissl.data.streaming.CHUNK", 5)
    resident = load_folder(folder, "train", 16)
    files = sorted((folder / "train").rglob("*.png"))
    indices = torch.arange(12).flip(0)
    subset = ImageFiles(files, 16, resident.labels, resident.classes, num_workers=2).subset(indices)
    assert torch.equal(subset.images, resident.images[indices])
    assert torch.equal(subset.labels, resident.labels[indices])


def test_a_damaged_file_is_replaced_by_the_next(folder):
    files = sorted((folder / "train").rglob("*.png"))
    files[2].write_bytes(files[2].read_bytes()[:200])
    images = ImageFiles(files, 16).get_batch(torch.tensor([1, 2, 3])).images
    assert torch.equal(images[1], images[2])
    assert not torch.equal(images[0], images[1])
    with pytest.raises(InputError, match="None of the image files"):
        ImageFiles([files[2]], 16)[0]


@pytest.mark.slow
def test_a_run_from_the_disk_is_the_run_from_memory(folder, tmp_path):
    words = ["train", "dino", *TINY, "--data", f"folder:{folder}", "--out"]
    assert main([*words, str(tmp_path / "memory")]) == 0
    with small_memory():
        assert main([*words, str(tmp_path / "disk")]) == 0
    for name in ("encoder.safetensors", "metrics.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
