"""Images that do not fit into memory give the same batches as those that do."""

from unittest.mock import patch

import psutil
import pytest
import torch

from minissl.training import trainer
from minissl.cli import main
from minissl.data.folder import load_folder
from minissl.data.streaming import ImageFiles
from minissl.errors import InputError
from tests.folders import TINY, class_folders


class Full:
    available = 1000


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "data", train=6, test=4)


def small_memory():
    return patch.object(psutil, "virtual_memory", Full)


def test_a_folder_larger_than_memory_stays_on_the_disk(folder, capsys):
    resident = load_folder(folder, "train", 16)
    with small_memory():
        streamed = load_folder(folder, "train", 16)
    assert isinstance(streamed, ImageFiles)
    assert "decoded as they come" in capsys.readouterr().out
    assert len(streamed) == len(resident) == 12
    assert streamed.size == resident.size
    some = streamed.some(12)
    assert torch.equal(some.images, resident.images)
    assert torch.equal(some.labels, resident.labels)
    assert streamed.some(4).labels.tolist() == resident.some(4).labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_from_the_disk_wherever_they_start(folder, workers):
    resident = load_folder(folder, "train", 16)
    files = tuple(sorted((folder / "train").rglob("*.png")))
    streamed = ImageFiles(files, 16, resident.labels, resident.classes, workers)
    for step in (0, 4):
        ours = trainer.batches(streamed, 5, seed=3, step=step)
        theirs = trainer.batches(resident, 5, seed=3, step=step)
        for _, one, other in zip(range(5), ours, theirs):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert one.images.dtype == torch.uint8


def test_a_file_that_is_broken_inside_gives_its_neighbour(folder):
    files = sorted((folder / "train").rglob("*.png"))
    files[2].write_bytes(files[2].read_bytes()[:200])
    images, _ = ImageFiles(tuple(files), 16)[[1, 2, 3]]
    assert torch.equal(images[1], images[2])
    assert not torch.equal(images[0], images[1])
    with pytest.raises(InputError, match="None of the files"):
        ImageFiles((files[2],), 16)[[0]]


def test_a_run_from_the_disk_is_the_run_from_memory(folder, tmp_path):
    words = ["train", "dino", *TINY, "--data", f"folder:{folder}", "--out"]
    assert main([*words, str(tmp_path / "memory")]) == 0
    with small_memory():
        assert main([*words, str(tmp_path / "disk")]) == 0
    for name in ("encoder.safetensors", "metrics.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
