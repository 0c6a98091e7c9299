"""Images that do not fit into memory: decoded when they are asked for, ahead of the training step, by other processes.

Shapes: N files, batches of B images of S x S pixels.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minissl.data.images import Images, decode
from minissl.errors import InputError

NONE = "None of the files is an image that can be read; when they are back, the same command with --resume goes on."
ENDED = (
    "A process that reads images was ended from outside, as a system does that has no memory left (or, in a container, "
    "no shared memory). What was saved last is whole; the same command with --resume goes on."
)


@dataclass(frozen=True)
class Files:
    """A set of images on the disk; it can stand where `Images` does.

    Attributes:
        files: N paths.
        size: pixels a side the images are decoded to.
        labels: (N,) int64 indices into `classes`, or None.
        classes: names.
        workers: processes that decode.
        masks: there are none.
    """

    files: tuple[Path, ...]
    size: int
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    workers: int = 4
    masks: None = None
    captions: None = None
    factors = MappingProxyType({})  # nothing else is known

    nbytes = 0  # that a device would have to hold
    device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> "Files":
        """Itself: batches are moved one by one."""
        return self

    def some(self, n: int) -> Images:
        """At most n of them, evenly spaced, in memory."""
        rows = torch.arange(min(n, len(self))) * len(self) // min(n, len(self))
        images, labels = self[rows.tolist()]
        return Images(images, labels, self.classes)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """By which the same files are known again: their names and sizes."""
        listed = "".join(f"{file} {_bytes_of(file)} " for file in self.files)
        return {"images": len(self), "files": f"{crc32(os.fsencode(listed)):08x}"}

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, S, S) uint8 and labels (B,) of B rows."""
        found, pixels = zip(*(self._read(row) for row in rows))
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return images, None if self.labels is None else self.labels[list(found)]

    def _read(self, row: int) -> tuple[int, np.ndarray]:
        """A row and its image; where its file is broken or gone, the next that is not."""
        for offset in range(len(self)):
            other = (row + offset) % len(self)
            pixels = decode(self.files[other], self.size)
            if pixels is not None:
                return other, pixels
            _say_gone(self.files[other].parent)
        raise InputError(NONE)

    def batches(self, orders: Iterable[Tensor]) -> Iterator[dict[str, Tensor | None]]:
        """Images and labels of each order of rows (B,), decoded ahead. Raises InputError if no file is left."""
        pin = torch.cuda.is_available()
        # As numbers: a tensor is handed over by a thread, which prints a traceback when the other process is killed.
        rows = (order.tolist() for order in orders)
        loader = DataLoader(
            self, sampler=rows, batch_size=None, num_workers=self.workers, pin_memory=pin, collate_fn=_as_it_is,
            worker_init_fn=_leave_ctrl_c,
        )  # fmt: skip
        try:
            for images, labels in loader:
                yield {"images": images, "labels": labels}
        except InputError:
            raise InputError(NONE) from None  # without the traceback of the other process
        except (ConnectionError, EOFError):  # that process was ended while it handed a batch over
            time.sleep(5)  # PyTorch raises its own error an instant later: here, rather than outside `decoders_alive`
            raise InputError(ENDED) from None


@contextmanager
def decoders_alive() -> Iterator[None]:
    """Inside, that a process which decodes was ended is said in one sentence; PyTorch raises it at any moment."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(ENDED) from None


@cache
def _say_gone(folder: Path) -> None:
    """Once in each process."""
    print(
        f"A file in {folder} is broken, or gone; here and wherever this happens the next one takes its place.",
        flush=True,
    )


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # gone


def _leave_ctrl_c(worker: int) -> None:
    """It reaches every process of a terminal. The training decides what it means, and then ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return batch
