"""The base class of synthetic data sets, whose images are rendered when they are first needed.

Shapes: N images of S x S pixels in a data set, B of them in a batch.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from minissl.data.batch import Batch
from minissl.data.images import Factor, InMemoryDataset

IMAGES_AHEAD = 512  # rendered at once while a data set is iterated; fewer are slower
FINGERPRINT_IMAGES = 16


@dataclass
class _Cache:
    """Rendered maps (N, ...), and which images of them are done, (N,) bool."""

    done: Tensor
    maps: list[Tensor] = field(default_factory=list)


class RenderedDataset(InMemoryDataset):
    """Render images on first use and keep them. Single items and batches render only what is missing.

    Args:
        n: N.
        image_size, labels, classes, factors, name: see `ImageDataset`.
    """

    def __init__(
        self,
        n: int,
        image_size: int,
        labels: Tensor,
        classes: Sequence[str],
        factors: Mapping[str, Factor],
        name: str = "custom",
    ):
        super().__init__(image_size, labels, classes, factors, name)
        self._cache = _Cache(torch.zeros(n, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self._cache.done)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def images(self) -> Tensor:
        return self._rendered()[0]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The number of images and a checksum of the first ones."""
        first = self._load_images(torch.arange(min(FINGERPRINT_IMAGES, len(self))))
        return {"images": len(self), "first_pixels": f"{crc32(first.contiguous().numpy().data):08x}"}

    @abstractmethod
    def _render(self, indices: Tensor) -> Sequence[Tensor]:
        """Render images (B, 3, S, S) uint8 of indices (B,), and any further maps (B, ...)."""

    def _rendered(self, indices: Tensor | None = None) -> list[Tensor]:
        """Return all maps (N, ...); those of `indices` (all if None) are rendered, the others may be undefined."""
        done, maps = self._cache.done, self._cache.maps
        needed = torch.arange(len(self)) if indices is None else torch.arange(len(self))[indices].unique()
        missing = needed[~done[needed]]
        if len(missing) == len(self):
            maps[:] = self._render(missing)
        elif len(missing) or not maps:
            new = self._render(missing)
            if not maps:
                maps.extend(part.new_empty(len(self), *part.shape[1:]) for part in new)
            for whole, part in zip(maps, new):
                whole[missing] = part
        done[missing] = True
        return maps

    def _load_images(self, indices: Tensor) -> Tensor:
        return self._rendered(indices)[0][indices]

    def iterate(self, index_batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield the batch of each tensor of indices (B,), in order. Images are rendered some batches ahead."""
        iterator = iter(index_batches)
        for first in iterator:
            rest = islice(iterator, IMAGES_AHEAD // max(1, len(first)))
            group = [first, *rest]
            self._rendered(torch.cat(group))
            yield from super().iterate(group)
