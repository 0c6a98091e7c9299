"""Data sets that do not fit into memory: worker processes decode batches ahead of the training step.

Shapes: N images of S x S pixels in a data set, B of them in a batch.
"""

import copy
import multiprocessing
import os
import signal
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from minissl.data.batch import Batch
from minissl.data.images import ImageDataset, Images, decode_image
from minissl.errors import InputError

NO_FILE_READABLE = "None of the image files can be read; restore them, and continue with the same command and --resume."
WORKER_KILLED = (
    "A worker process that decodes images was killed, as an operating system does when memory (in a container: shared "
    "memory) runs out. The last checkpoint is complete; the same command with --resume continues."
)
CHUNK = 64  # images per batch while a subset is loaded
MIN_FOR_WORKERS = 500  # images from which on loading a subset is worth the start of worker processes


class StreamedDataset(ImageDataset):
    """Base class of data sets that decode an image each time it is needed.

    Attributes:
        num_workers: processes that decode in `iterate`; 0 decodes in this process.
    """

    num_workers: int

    @abstractmethod
    def _read(self, index: int) -> tuple[np.ndarray, int | None]:
        """Decode an image (S, S, 3) uint8; returns it and its label. Raises InputError if that is impossible."""

    @property
    def nbytes(self) -> int:
        return 0

    def get_batch(self, indices: Tensor) -> Batch:
        images, labels = zip(*(self._read(index) for index in indices.tolist()))
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return Batch(stacked, None if labels[0] is None else torch.tensor(labels))

    def iterate(self, index_batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield the batch of each tensor of indices (B,), in order, decoded ahead by worker processes.

        Raises:
            InputError: if an image cannot be read and none can take its place, or a worker process was killed.
        """
        return self._iterate(index_batches, self.num_workers)

    def _iterate(self, index_batches: Iterable[Tensor], num_workers: int) -> Iterator[Batch]:
        # As lists: a thread passes tensors on, and it prints a traceback when the other process is killed.
        batches = (indices.tolist() for indices in index_batches)
        loader: DataLoader[Batch | InputError] = DataLoader(
            _BatchReader(self), batch_size=None, sampler=batches, num_workers=num_workers, collate_fn=_identity,
            pin_memory=torch.cuda.is_available(), worker_init_fn=_ignore_ctrl_c, generator=torch.Generator(),
            multiprocessing_context=_context_without_locks() if num_workers else None,
        )  # fmt: skip
        try:
            for batch in loader:
                if isinstance(batch, InputError):
                    raise batch
                yield batch
        except (ConnectionError, EOFError):  # the worker was killed while it passed a batch on
            time.sleep(5)  # PyTorch raises its own error an instant later: here, not outside `report_dead_workers`
            raise InputError(WORKER_KILLED) from None

    def subset(self, indices: Tensor) -> Images:
        """Load the images of indices (n,) int64 into memory, in that order. Raises InputError as `iterate` does."""
        images = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        return Images(images, self._read_all(indices, images), self.classes)

    def _read_all(self, indices: Tensor, images: Tensor | None = None) -> Tensor | None:
        """Read the images of indices (n,) in order, into `images` (n, 3, S, S) if given; returns their labels (n,)."""
        labels: list[Tensor] = []
        use_workers = len(indices) >= MIN_FOR_WORKERS
        targets = (None,) * len(indices) if images is None else images.split(CHUNK)
        with report_dead_workers():
            batches = self._iterate(indices.split(CHUNK), self.num_workers if use_workers else 0)
            progress_bar = tqdm(
                batches, "reading images", -(-len(indices) // CHUNK), leave=False, disable=not use_workers
            )
            for batch, target in zip(progress_bar, targets):
                if target is not None:
                    target.copy_(batch.images)
                if batch.labels is not None:
                    labels.append(batch.labels)
        return torch.cat(labels) if labels else None


class ImageFiles(StreamedDataset):
    """Images in files on the disk. A file that cannot be read is replaced by the next one that can, with its label.

    Args:
        files: N paths.
        image_size: S, pixels per side to which images are resized and cropped.
        labels: (N,) int64 indices into `classes`.
        classes: names.
        num_workers: processes that decode.
        name: see `ImageDataset`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_size: int,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        num_workers: int = 4,
        name: str = "custom",
    ):
        super().__init__(image_size, labels, classes, name=name)
        self.files, self.num_workers = tuple(files), num_workers

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The number of files and a checksum of their names and sizes."""
        listing = "".join(f"{file} {_file_size(file)} " for file in self.files)
        return {"images": len(self), "files": f"{crc32(os.fsencode(listing)):08x}"}

    def _read(self, index: int) -> tuple[np.ndarray, int | None]:
        for offset in range(len(self)):
            row = (index + offset) % len(self)
            image = decode_image(self.files[row], self.image_size)
            if image is not None:
                return image, None if self.labels is None else int(self.labels[row])
            _report_unreadable(self.files[row].parent)
        raise InputError(NO_FILE_READABLE)


class _BatchReader(Dataset[Batch | InputError]):
    """The data set that worker processes read: one item is a batch, or the error, which thus has no traceback."""

    def __init__(self, dataset: StreamedDataset):
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Batch | InputError:
        try:
            return self.dataset.get_batch(torch.tensor(indices))
        except InputError as error:
            return error


class _Flag:
    """An event between processes, without a lock that a killed process could hold for ever."""

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


def _context_without_locks() -> Any:
    """Return the default way to start processes, with another event.

    With the standard one a DataLoader can wait for ever: its workers ask the event at every batch, each time holding
    the lock that it needs to end them.
    """
    context = copy.copy(multiprocessing.get_context())
    context.Event = _Flag  # type: ignore[method-assign, assignment]
    return context


@contextmanager
def report_dead_workers() -> Iterator[None]:
    """Convert PyTorch's error for a killed worker process, which can appear at any moment, into an InputError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(WORKER_KILLED) from None


@cache
def _report_unreadable(folder: Path) -> None:
    """Print a warning, once per folder and process."""
    print(
        f"An image file in {folder} is broken or missing; wherever this happens, the next readable file replaces it.",
        flush=True,
    )


def _file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # the file is gone


def _ignore_ctrl_c(worker_id: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the main process; it then ends the workers."""
    del worker_id
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(batch: Any) -> Any:
    return batch
