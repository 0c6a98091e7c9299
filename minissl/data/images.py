"""A set of images in memory, what is known of them, and how a file becomes one.

Shapes: N images of S x S pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minissl.errors import InputError


class Factor(NamedTuple):
    """One thing that is true of an image."""

    labels: Tensor  # (N,) int64 indices into `classes`
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]  # for each class, sentences that say it


@dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64 indices into `classes`, or None.
        classes: names.
        masks: (N, S, S) uint8, 0 where the background is, or None.
        captions: of each image, all of its captions, or None.
        factors: what else is known of each image, by name.

    Raises:
        InputError: for images of another type or shape; floats could be no numbers, and would be found out late.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    masks: Tensor | None = None
    captions: tuple[tuple[str, ...], ...] | None = None
    factors: dict[str, Factor] = field(default_factory=dict)

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.shape[1:2] != (3,) or self.images.ndim != 4:
            found = f"{str(self.images.dtype).removeprefix('torch.')} {tuple(self.images.shape)}"
            raise InputError(f"Images are kept as uint8 (N, 3, S, S), and these are {found}; scale them to 0 .. 255.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]

    @property
    def nbytes(self) -> int:
        """Of the images."""
        return self.images.nbytes

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def fingerprint(self) -> dict[str, Any]:
        """By which the same images are known again."""
        return {"images": len(self), "pixels": f"{crc32(self.images.cpu().contiguous().numpy()):08x}"}

    def batches(self, orders: Iterable[Tensor]) -> Iterator[dict[str, Any]]:
        """What a `method.Batch` holds, for each order of rows (B,), on the device of the images."""
        for rows in orders:
            there = rows.to(self.device, non_blocking=True)
            labels = None if self.labels is None else self.labels[there]
            captions = None if self.captions is None else [self.captions[row] for row in rows.tolist()]
            factors = {name: factor.labels[there] for name, factor in self.factors.items()}
            yield {"images": self.images[there], "labels": labels, "captions": captions, "factors": factors}

    def take(self, rows: Tensor) -> "Images":
        """Those of some rows (n,)."""
        parts = {name: getattr(self, name) for name in ("images", "labels", "masks")}
        parts = {name: None if part is None else part[rows] for name, part in parts.items()}
        captions = None if self.captions is None else tuple(self.captions[row] for row in rows.tolist())
        factors = {name: f._replace(labels=f.labels[rows]) for name, f in self.factors.items()}
        return replace(self, **parts, captions=captions, factors=factors)

    def some(self, n: int) -> "Images":
        """At most n of them, evenly spaced: a folder's images come class by class, and all classes should be there."""
        return self.take(torch.arange(min(n, len(self))) * len(self) // min(n, len(self)))

    def known_as(self, factor: str) -> "Images":
        """The same images with another factor as their labels."""
        return replace(self, labels=self.factors[factor].labels, classes=self.factors[factor].classes)

    def to(self, device: torch.device) -> "Images":
        """The images and what is known of them on a device; masks stay, they are only looked at."""
        labels = None if self.labels is None else self.labels.to(device)
        factors = {name: f._replace(labels=f.labels.to(device)) for name, f in self.factors.items()}
        return replace(self, images=self.images.to(device), labels=labels, factors=factors)

    def only(self, classes: Sequence[int]) -> "Images":
        """The images of some classes; their labels are the places in `classes`."""
        rows = torch.isin(self.labels, torch.tensor(classes, device=self.device)).nonzero()[:, 0]
        place = self.labels.new_zeros(len(self.classes))
        place[list(classes)] = torch.arange(len(classes), device=self.device)
        kept = self.take(rows)
        return replace(kept, labels=place[kept.labels], classes=tuple(self.classes[i] for i in classes))


ORIENTATION = 0x0112  # the tag in which a camera notes how it was held
UNREADABLE = Exception  # what a decoder raises for a broken file: each has its own, AVIF's a plain RuntimeError
UNSCALED = ("I", "F")  # whole numbers of 32 bits and floats, also NaN: which of them is white is not said


def short_side(file: Path) -> int:
    """From the header alone; 0 for what is no image."""
    try:
        with Image.open(file) as image:
            return 0 if image.mode in UNSCALED else min(image.size)
    except UNREADABLE:
        return 0


def decode(file: Path, size: int) -> np.ndarray | None:
    """(size, size, 3) uint8: turned as the camera noted, short side resized, middle cut out; None for a broken file."""
    try:
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(ImageOps.fit(_rgb(image), (size, size), Image.Resampling.BICUBIC))
    except UNREADABLE:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel. Raises ValueError for UNSCALED ones: Pillow would make white what is above 255."""
    if image.mode in UNSCALED:
        raise ValueError(image.mode)
    if image.mode.startswith("I;16"):  # grey, where 65,535 is white; of colours Pillow keeps 8 bits by itself
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_mask(file: Path, size: int, of: Path) -> Tensor:
    """A mask of whole numbers, (size, size) uint8, turned and cut as `decode` its image `of`. Raises InputError."""
    try:
        with Image.open(file) as mask, Image.open(of) as image:
            mask.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
            ImageOps.exif_transpose(mask, in_place=True)
            return torch.from_numpy(np.array(ImageOps.fit(mask, (size, size), Image.Resampling.NEAREST)))
    except UNREADABLE:
        raise InputError(f"The mask {file} is missing or cannot be read.") from None


def fills_memory(need: int) -> bool:
    """Whether `need` bytes would leave too little of the memory that is free."""
    return need > 0.7 * psutil.virtual_memory().available


def need_memory(need: int) -> None:
    """Raises InputError if `need` bytes would fill the memory."""
    if fills_memory(need):
        raise InputError(f"The images need {need / 1e9:.1f} GB of memory, more than is free; keep them smaller.")
