"""Images that do not fit into memory: decoded when they are asked for, ahead of the training step, by other processes.

Shapes: N files, batches of B images of S x S pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minissl.data.images import Images, decode
from minissl.errors import InputError


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
        images, labels = self[rows]
        return Images(images, labels, self.classes)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, S, S) uint8 and labels (B,) of rows (B,)."""
        images = torch.from_numpy(np.stack([self._read(row) for row in rows.tolist()])).permute(0, 3, 1, 2)
        return images.contiguous(), None if self.labels is None else self.labels[rows]

    def _read(self, row: int) -> np.ndarray:
        """An image, or, where its file is broken, the next that is not."""
        for offset in range(len(self)):
            pixels = decode(self.files[(row + offset) % len(self)], self.size)
            if pixels is not None:
                return pixels
        raise InputError("None of the files is an image that can be read.")

    def batches(self, orders: Iterable[Tensor]) -> Iterator[dict[str, Tensor | None]]:
        """Images and labels of each order of rows (B,), decoded ahead."""
        pin = torch.cuda.is_available()
        loader = DataLoader(
            self, sampler=orders, batch_size=None, num_workers=self.workers, pin_memory=pin, collate_fn=_as_it_is
        )
        for images, labels in loader:
            yield {"images": images, "labels": labels}


def _as_it_is(batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return batch
