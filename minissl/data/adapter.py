"""Use any map-style data set: those of torchvision and Hugging Face, or a list of images.

Shapes: N images in a data set, converted to S x S pixels.
"""

import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Subset

from minissl.data.images import UNSCALED, ImageDataset, center_crop, check_memory, exceeds_memory
from minissl.data.streaming import StreamedDataset
from minissl.errors import InputError

IMAGE_KEYS, LABEL_KEYS = ("image", "img"), ("label", "labels")
OVERSHOOT = 0.1  # float values this far outside of [0, 1] are clipped: bicubic resizing causes them
ALLOWED_IMAGES = (
    "give a PIL image, a tensor (C, H, W) or an array (H, W, C) of uint8, or of floats in [0, 1], "
    "with 1, 3 or 4 channels and without normalization"
)


def from_dataset(dataset: Any, size: int, *, in_memory: bool | None = None) -> ImageDataset:
    """Convert a data set with a length and integer indices to an `ImageDataset`.

    An item is an image, a tuple that starts with an image and its label, or a dict with "image" or "img" and "label" or
    "labels". An image is a PIL image, a tensor (C, H, W) or (H, W), or an array (H, W, C) or (H, W). Tensors and arrays
    hold uint8, or floats in [0, 1], and have C = 1, 3 or 4 channels. An alpha channel is dropped.

    Labels are integers; -1 marks an unlabeled image. If the label of the first item is missing or something else, such
    as boxes, the data set counts as unlabeled. Class names come from `dataset.classes` or from
    `dataset.features["label"].names`; without them they are the numbers of the classes.

    Items should not be augmented, since methods do that. The labels of a data set that is not kept in memory are read
    from `targets`, `labels` or a column "label"; without these, every item is read once.

    Args:
        dataset: with `len(dataset)` and `dataset[i]`.
        size: S; the short side is resized (bicubic), and the center is cropped.
        in_memory: whether to keep all images in memory; None does so if they fit. Otherwise worker processes read the
            items during training.

    Returns:
        `Images`, or an `AdaptedDataset`, which reads an item each time it is needed.

    Raises:
        InputError: if the data set is empty or has no length, an item cannot be used (with its index and what it is), a
            label has no class name, or memory is too small for `in_memory=True`.
    """
    if size < 1:
        raise InputError(f"Images cannot be {size} pixels wide; give a positive size.")
    _check_indexable(dataset)
    adapted = AdaptedDataset(dataset, size)
    num_bytes = len(adapted) * 3 * size * size
    if in_memory:
        check_memory(num_bytes)
    converted: ImageDataset = adapted
    if in_memory is False or (in_memory is None and exceeds_memory(num_bytes)):
        adapted.labels = adapted.find_labels()
    else:
        converted = adapted.subset(torch.arange(len(adapted)))
    if converted.labels is not None and bool((converted.labels < 0).all()):
        converted.labels = None  # a test split whose labels are secret
    if converted.labels is not None:
        converted.classes = _class_names(dataset, converted.labels)
    return converted


class AdaptedDataset(StreamedDataset):
    """A data set of another library, whose items are converted each time they are needed.

    Args:
        dataset: see `from_dataset`.
        image_size: S.

    Raises:
        InputError: if the first item cannot be used.
    """

    def __init__(self, dataset: Any, image_size: int):
        super().__init__(image_size)
        self.dataset, self.num_workers = dataset, max(1, (os.cpu_count() or 2) - 1)
        self._labeled = _is_label(self._item(0)[1], 0)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The number of images, and a checksum of the labels and of 16 evenly spaced images."""
        sample = self.subsample(16).images.numpy().tobytes()
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        return {"images": len(self), "items": f"{crc32(sample + labels):08x}"}

    def _item(self, index: int) -> tuple[Any, Any]:
        """Return the image and the label of an item as the data set gives them. Raises InputError."""
        try:
            item = self.dataset[index]
        except Exception as error:  # code of another library raises exceptions of any type
            raise InputError(f"Item {index} cannot be read ({type(error).__name__}: {error}); remove it.") from error
        return _split_item(item, index)

    def _read(self, index: int) -> tuple[np.ndarray, int | None]:
        image, label = self._item(index)
        try:
            pixels = center_crop(_to_pil(image), self.image_size)
        except _UnusableImage as error:
            raise InputError(f"The image of item {index} is {error}; {ALLOWED_IMAGES}.") from None
        except Exception as error:  # Pillow decodes lazily, and raises exceptions of any type for a broken file
            name = type(error).__name__
            raise InputError(f"The image of item {index} cannot be decoded ({name}: {error}); remove it.") from error
        if not self._labeled:
            return pixels, None
        if not _is_label(label, index):
            raise InputError(
                f"The label of item {index} is {_describe(label)}, but the first item has an integer label; "
                "give every item one, or -1."
            )
        return pixels, operator.index(label)

    def find_labels(self) -> Tensor | None:
        """Return labels (N,) int64: those that the data set lists, if they agree with items, else those of items."""
        if not self._labeled:
            return None
        labels = _listed_labels(self.dataset)
        sample = {0, len(self) // 2, len(self) - 1}
        if labels is not None and all(int(labels[i]) == self._read(i)[1] for i in sample):
            return labels
        return self._read_all(torch.arange(len(self)))


class _UnusableImage(ValueError):
    """Says what a value is that cannot be used as an image."""


def _check_indexable(dataset: Any) -> None:
    """Raise InputError if a data set has no length or indices, or is empty."""
    if isinstance(dataset, (str, Path)):
        raise InputError(f"{str(dataset)!r} is text, not a data set; load it by its name with load_dataset.")
    if isinstance(dataset, Mapping):
        keys = ", ".join(repr(key) for key in dataset)
        raise InputError(f"The data set is a dict with the keys {keys}; give the data set of one of them.")
    try:
        length = len(dataset)
        dataset.__getitem__  # noqa: B018
    except (TypeError, AttributeError):
        kind = type(dataset).__name__
        raise InputError(
            f"{kind} has no length or no indices, which from_dataset needs; convert it to a list first."
        ) from None
    if not length:
        raise InputError(f"{type(dataset).__name__} is empty; give a data set with at least one image.")


def _split_item(item: Any, index: int) -> tuple[Any, Any]:
    """Return the image and the label (None if there is none) of an item. Raises InputError."""
    if isinstance(item, Mapping):
        image_key = next((key for key in IMAGE_KEYS if key in item), None)
        if image_key is None:
            keys = ", ".join(repr(key) for key in item)
            raise InputError(f'Item {index} is a dict with the keys {keys}; rename that of the image to "image".')
        return item[image_key], next((item[key] for key in LABEL_KEYS if key in item), None)
    if isinstance(item, tuple | list):
        if not item:
            raise InputError(
                f"Item {index} is an empty {type(item).__name__}; give an image, or an image and its label."
            )
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _is_label(label: Any, index: int) -> bool:
    """Return whether a label is an integer. Raises InputError for a string, which is a class name without a number."""
    if isinstance(label, str):
        raise InputError(f"The label of item {index} is the text {label!r}; give the number of the class instead.")
    try:
        operator.index(label)
    except TypeError:
        return False
    return True


def _to_pil(image: Any) -> Image.Image:
    """Convert an image of any allowed kind to a PIL image, with its EXIF orientation applied."""
    if isinstance(image, Image.Image):
        if image.mode in UNSCALED:
            raise _UnusableImage(f"a PIL image of mode {image.mode!r}, whose range of values is not defined")
        return ImageOps.exif_transpose(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
        pixels = image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()  # (H, W, C) or (H, W)
    elif isinstance(image, np.ndarray):
        pixels = image
    else:
        raise _UnusableImage(_describe(image))
    if pixels.ndim not in (2, 3) or not pixels.size or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4)):
        raise _UnusableImage(_describe(image))
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # also False for NaN
            raise _UnusableImage(f"{_describe(image)} with values from {low:.3g} to {high:.3g}")
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise _UnusableImage(_describe(image))
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _describe(value: Any) -> str:
    """Describe a value in a sentence: its type, and of a tensor or array the dtype and shape."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "missing" if value is None else f"of type {type(value).__name__}"


def _listed_labels(dataset: Any) -> Tensor | None:
    """Return the labels (N,) int64 that a data set lists for all items, or None."""
    if isinstance(dataset, Subset):
        parent = _listed_labels(dataset.dataset)
        return None if parent is None else parent[torch.as_tensor(dataset.indices)]
    columns: list[Any] = [getattr(dataset, name, None) for name in ("targets", "labels")]
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        columns += [dataset[key] for key in LABEL_KEYS if key in features]
    for column in columns:
        try:
            labels = np.asarray(column.numpy() if isinstance(column, Tensor) else list(column))
        except (TypeError, ValueError):  # none, or labels of different lengths
            continue
        if labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer):
            return torch.from_numpy(labels.astype(np.int64))
    return None


def _class_names(dataset: Any, labels: Tensor) -> tuple[str, ...]:
    """Return the class names that a data set lists, else the numbers of the classes. Raises InputError if too few."""
    names = _listed_names(dataset)
    if names is None:
        return tuple(str(i) for i in range(int(labels.max()) + 1))
    if int(labels.max()) >= len(names):
        index = int(labels.argmax())
        raise InputError(
            f"The label of item {index} is {int(labels[index])}, but the data set names only {len(names)} classes; "
            "correct the label, or the list of classes."
        )
    return names


def _listed_names(dataset: Any) -> tuple[str, ...] | None:
    if isinstance(dataset, Subset):
        return _listed_names(dataset.dataset)
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        names = next((getattr(features[key], "names", None) for key in LABEL_KEYS if key in features), None)
    if not names or not isinstance(names, list | tuple):
        return None
    return tuple(name if isinstance(name, str) else str(name[0]) for name in names)  # Imagenette lists synonyms
