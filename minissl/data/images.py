"""The base class of all data sets, images in memory, and the decoding of image files.

A data set is a `torch.utils.data.Dataset` of dicts, so it works in a `DataLoader`. The training loop uses `iterate`,
which gathers whole batches at once.

Shapes: N images of S x S pixels in a data set, B of them in a batch.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from minissl.data.batch import Batch
from minissl.errors import InputError, suggestion

Captions = tuple[tuple[str, ...], ...]  # for each image, all of its captions
AnyDataset = TypeVar("AnyDataset", bound="ImageDataset")


class Factor(NamedTuple):
    """One annotation of every image besides the labels, such as its color."""

    labels: Tensor  # (N,) int64 indices into `classes`
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]  # for each class, sentences that describe it


class ImageDataset(Dataset[dict[str, Any]], ABC):
    """Base class of all data sets: N square RGB images, with the annotations that are known.

    Attributes:
        image_size: S.
        labels: (N,) int64 indices into `classes`, or None.
        classes: names of the classes.
        masks: (N, S, S) uint8, 0 on the background, or None.
        captions: all captions of each image, or None.
        factors: further annotations by name.
        name: the name that `load_dataset` knows the data set by; "custom" for one made in Python.
        device: where `get_batch` puts images and labels.
    """

    labels: Tensor | None

    def __init__(
        self,
        image_size: int,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        factors: Mapping[str, Factor] | None = None,
        name: str = "custom",
    ):
        self.image_size, self.labels, self.classes, self.name = image_size, labels, tuple(classes), name
        self.factors = dict(factors or {})

    def __repr__(self) -> str:
        size = f"{len(self)} images of {self.image_size} x {self.image_size}"
        return f"{type(self).__name__}({self.name}: {size}, {len(self.classes)} classes)"

    @property
    def masks(self) -> Tensor | None:
        return None

    @property
    def captions(self) -> Captions | None:
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory in bytes that all images take on a device; 0 if they stay where they are."""

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Numbers that identify the images, to notice that they changed: "images", N, and a checksum."""

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abstractmethod
    def get_batch(self, indices: Tensor) -> Batch:
        """Gather the images and annotations of indices (B,) int64 on the CPU; the batch is on `device`."""

    def _load_masks(self, indices: Tensor) -> Tensor | None:
        """Gather masks (B, S, S) uint8 of indices (B,), or None if there are none."""
        del indices
        return None

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one image with its annotations.

        Returns:
            "image" (3, S, S) uint8 and, where they are known, "label" (int), "mask" (S, S) uint8, "captions" (strings)
            and "factors" (an int by name). In a DataLoader the default collation makes a dict of tensors of it; it
            transposes captions to one tuple of B strings each, and needs the same number of them for every image.

        Raises:
            IndexError: if there is no such image.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} images.")
        return self.__getitems__([int(index) % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of B indices, gathered at once; a DataLoader calls it for each batch."""
        selected = torch.as_tensor(indices, dtype=torch.long)
        batch, masks = self.get_batch(selected), self._load_masks(selected)
        items: list[dict[str, Any]] = [{"image": image} for image in batch.images]
        columns: dict[str, Iterable[Any] | None] = {
            "label": None if batch.labels is None else batch.labels.tolist(),
            "mask": masks,
            "captions": batch.captions,
        }
        for name, column in columns.items():
            for item, value in zip(items, () if column is None else column):
                item[name] = value
        for name, labels in (batch.factors or {}).items():
            for item, value in zip(items, labels.tolist()):
                item.setdefault("factors", {})[name] = value
        return items

    def iterate(self, index_batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield the batch of each tensor of indices (B,), in order."""
        for indices in index_batches:
            yield self.get_batch(indices)

    def subset(self, indices: Tensor) -> "Images":
        """Load the images of indices (n,) int64 into memory, in that order."""
        batch = self.get_batch(indices)
        factors = {name: self.factors[name]._replace(labels=labels) for name, labels in (batch.factors or {}).items()}
        captions = None if batch.captions is None else tuple(batch.captions)
        return Images(batch.images, batch.labels, self.classes, self._load_masks(indices), captions, factors)

    def subsample(self, n: int) -> "Images":
        """Load at most n images into memory, evenly spaced: a folder is ordered by class, and all should be there."""
        n = min(n, len(self))
        return self.subset(torch.arange(n) * len(self) // n)

    def to(self, device: torch.device) -> "ImageDataset":
        """Move images and annotations to a device; masks stay on the CPU. Data sets on the disk return themselves."""
        del device
        return self

    def select_classes(self, classes: Sequence[int]) -> "Images":
        """Keep the images of some classes in memory; the new labels are positions in `classes`.

        Raises:
            InputError: if the images have no labels.
        """
        if self.labels is None:
            raise InputError("Classes cannot be selected because the images have no labels; give a labeled data set.")
        positions = torch.isin(self.labels, torch.tensor(classes, device=self.labels.device)).nonzero()[:, 0]
        new_label = self.labels.new_zeros(len(self.classes))
        new_label[list(classes)] = torch.arange(len(classes), device=new_label.device)
        selected = self.subset(positions.cpu())
        assert selected.labels is not None
        selected.labels, selected.classes = new_label[selected.labels], tuple(self.classes[i] for i in classes)
        return selected

    def with_labels(self: AnyDataset, factor: str) -> AnyDataset:
        """Return the same images with another factor as their labels.

        Raises:
            InputError: if there is no such factor.
        """
        if factor not in self.factors:
            known = ", ".join(self.factors) or "none"
            raise InputError(f"Unknown factor {factor!r}{suggestion(factor, self.factors)}; this data set has {known}.")
        relabeled = copy.copy(self)
        relabeled.labels, relabeled.classes, relabeled.name = *self.factors[factor][:2], "custom"
        return relabeled


class InMemoryDataset(ImageDataset):
    """Base class of data sets whose images fit into memory.

    Attributes:
        images: (N, 3, S, S) uint8.
    """

    @property
    @abstractmethod
    def images(self) -> Tensor: ...

    @property
    def nbytes(self) -> int:
        return len(self) * 3 * self.image_size**2

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"images": len(self), "pixels": f"{crc32(self.images.cpu().contiguous().numpy().data):08x}"}

    def get_batch(self, indices: Tensor) -> Batch:
        on_device = indices.to(self.device, non_blocking=True)
        labels = None if self.labels is None else self.labels[on_device]
        captions = None if self.captions is None else [self.captions[i] for i in indices.tolist()]
        factors = {name: factor.labels[on_device] for name, factor in self.factors.items()}
        return Batch(self._load_images(on_device), labels, captions, factors or None)

    def _load_images(self, indices: Tensor) -> Tensor:
        """Gather images (B, 3, S, S) of indices (B,) on the device of the images."""
        return self.images[indices]

    def _load_masks(self, indices: Tensor) -> Tensor | None:
        return None if self.masks is None else self.masks[indices.cpu()]

    def to(self, device: torch.device) -> "Images":
        labels = None if self.labels is None else self.labels.to(device)
        factors = {name: f._replace(labels=f.labels.to(device)) for name, f in self.factors.items()}
        images = self.images.to(device)
        return Images(images, labels, self.classes, self.masks, self.captions, factors, self.name)


class Images(InMemoryDataset):
    """A data set made of tensors.

    Args:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64 indices into `classes`, on the same device.
        classes: names.
        masks: (N, S, S) uint8, 0 on the background.
        captions: all captions of each image.
        factors: further annotations by name.
        name: see `ImageDataset`.

    Raises:
        InputError: for images of another dtype or shape, and for annotations of another number of images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        masks: Tensor | None = None,
        captions: Captions | None = None,
        factors: Mapping[str, Factor] | None = None,
        name: str = "custom",
    ):
        if images.dtype != torch.uint8 or images.shape[1:2] != (3,) or images.ndim != 4:
            given = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise InputError(f"Images must be uint8 (N, 3, S, S), but these are {given}; scale them to 0..255.")
        for what, annotation in (("labels", labels), ("masks", masks), ("captions", captions)):
            if annotation is not None and len(annotation) != len(images):
                raise InputError(f"{len(annotation)} {what} were given for {len(images)} images; give one for each.")
        super().__init__(images.shape[-1], labels, classes, factors, name)
        self._images, self._masks, self._captions = images, masks, captions

    def __len__(self) -> int:
        return len(self._images)

    @property
    def images(self) -> Tensor:
        return self._images

    @property
    def masks(self) -> Tensor | None:
        return self._masks

    @property
    def captions(self) -> Captions | None:
        return self._captions

    @property
    def device(self) -> torch.device:
        return self._images.device

    @property
    def nbytes(self) -> int:
        return self._images.nbytes


ORIENTATION = 0x0112  # EXIF tag of the camera's orientation
UNREADABLE = Exception  # decoders raise many types for a broken file; AVIF's raises a plain RuntimeError
UNSCALED = ("I", "F")  # modes of 32-bit integers and floats: the value of white is not defined


def short_side(file: Path) -> int:
    """Return the shorter side in pixels, read from the header alone; 0 if the file is not an image."""
    try:
        with Image.open(file) as image:
            return 0 if image.mode in UNSCALED else min(image.size)
    except UNREADABLE:
        return 0


def decode_image(file: Path, size: int) -> np.ndarray | None:
    """Decode an image file to (size, size, 3) uint8, or return None if it cannot be read.

    The EXIF orientation is applied. Then the short side is resized to `size`, and the center is cropped.
    """
    try:
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return center_crop(image, size)
    except UNREADABLE:
        return None


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the short side to `size` (bicubic) and crop the center, (size, size, 3) uint8.

    Raises:
        ValueError: for an image of one of the modes UNSCALED; Pillow would clip all values above 255 to white.
    """
    if image.mode in UNSCALED:
        raise ValueError(f"mode {image.mode}, whose range of values is not defined")
    if image.mode.startswith("I;16"):  # 16-bit gray, white is 65,535; Pillow itself reduces 16-bit color to 8 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def read_mask(file: Path, size: int, image_file: Path) -> Tensor:
    """Read a mask of integer values as (size, size) uint8, oriented and cropped as `decode_image` does its image.

    Raises:
        InputError: if the mask is missing or cannot be read.
    """
    try:
        with Image.open(file) as mask, Image.open(image_file) as image:
            mask.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
            ImageOps.exif_transpose(mask, in_place=True)
            return torch.from_numpy(np.array(ImageOps.fit(mask, (size, size), Image.Resampling.NEAREST)))
    except UNREADABLE:
        raise InputError(f"The mask {file} is missing or cannot be read; restore it.") from None


def exceeds_memory(num_bytes: int) -> bool:
    """Return whether `num_bytes` take more than 70 % of the memory that is free."""
    return num_bytes > 0.7 * psutil.virtual_memory().available


def check_memory(num_bytes: int) -> None:
    """Raise InputError if `num_bytes` would fill the memory."""
    if exceeds_memory(num_bytes):
        raise InputError(
            f"The images need {num_bytes / 1e9:.1f} GB of memory, more than is free; give a smaller --image_size."
        )
