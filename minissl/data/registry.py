"""Load data sets by name. Every source gives an `ImageDataset`: uint8 images of one size with their annotations."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from minissl.data.captions import CAPTION_SETS, load_captions
from minissl.data.downloads import DOWNLOAD_DIR, cifar10, imagenette, pets, stl10, stl10_unlabeled
from minissl.data.folder import load_folder
from minissl.data.images import ImageDataset, Images
from minissl.data.names import DATASET_NAMES, DOWNLOADS
from minissl.data.synthetic.scenes import FACTORS, Scenes
from minissl.errors import InputError, suggestion

LOADERS: dict[str, Callable[..., ImageDataset]] = dict(
    zip(DOWNLOADS, (cifar10, stl10, stl10_unlabeled, imagenette, pets), strict=True)
)
PARTS = ("compositions", "known", "new")  # of Scenes


def list_datasets() -> list[str]:
    """Return the names that `load_dataset` knows; PATH stands for a folder of yours."""
    scenes = ["scenes", *(f"scenes:{part}" for part in (*PARTS, *FACTORS))]
    return sorted([*scenes, "digits", *DOWNLOADS, *(f"{name}:PATH" for name in ("folder", *CAPTION_SETS))])


def load_dataset(
    name: str, split: str, image_size: int, seed: int = 0, min_size: int = 1, root: Path = DOWNLOAD_DIR
) -> ImageDataset:
    """Load a split of a data set.

    Args:
        name: one of `list_datasets()`.
        split: "train" or "test".
        image_size: pixels per side; a data set of smaller photographs keeps their size.
        seed: of scenes.
        min_size: pixels that the short side of every image of a folder must have.
        root: folder of downloads.

    Raises:
        InputError: for an unknown name or split, a folder that is missing or holds no readable image, a failed
            download, or too little memory.
    """
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        dataset: ImageDataset = load_folder(Path(rest).expanduser(), split, image_size, min_size)
    elif kind == "scenes":
        dataset = load_scenes(rest, split, image_size, seed)
    elif kind in CAPTION_SETS:
        dataset = load_captions(name, split, image_size)
    elif name == "digits":
        dataset = load_digits(split, image_size)
    elif name in DOWNLOADS:
        dataset = LOADERS[name](split, image_size, root=root)
    else:
        hint = suggestion(name, [known.removesuffix(":PATH") for known in list_datasets()])
        raise InputError(f"Unknown data set {name!r}{hint}; choose {DATASET_NAMES}.")
    dataset.name = name
    return dataset


def load_scenes(part: str, split: str, image_size: int, seed: int) -> ImageDataset:
    """Load a split of Scenes.

    Args:
        part: "" for scenes labeled by their object; "color", "action" or "place" for another factor as the label;
            "compositions" for a training split in which every object misses a color and an action, and a test split of
            just those; "known" and "new" for the first and the last five objects, labeled 0 to 4.
        split: "train", "val" or "test".
        image_size: S.
        seed: see `Scenes`.

    Raises:
        InputError: for an unknown part or split.
    """
    if part not in ("", *PARTS, *FACTORS):
        parts = [f"scenes:{known}" for known in (*PARTS, *FACTORS)]
        hint = suggestion(f"scenes:{part}", parts)
        raise InputError(f"Unknown part scenes:{part}{hint}; choose scenes or one of {', '.join(parts)}.")
    if part == "compositions":
        _check_split("scenes:compositions", split)
        split = {"train": "seen", "test": "unseen"}[split]
    scenes = Scenes(split, image_size, seed=seed)
    if part in ("known", "new"):
        return scenes.select_classes(range(5) if part == "known" else range(5, 10))
    return scenes.with_labels(part) if part in FACTORS else scenes


def load_digits(split: str, image_size: int) -> Images:
    """Load scikit-learn's 1,797 scanned digits, 8 x 8 gray, enlarged (bicubic). Every fifth is in the test split."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    _check_split("digits", split)
    digits = load_sklearn_digits()
    gray = torch.from_numpy(digits.images).float()[:, None] / 16  # (N, 1, 8, 8)
    gray = interpolate(gray, size=(image_size, image_size), mode="bicubic").clamp(0, 1)
    images = (gray * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    in_split = (torch.arange(len(images)) % 5 == 0) == (split == "test")
    return Images(images[in_split], torch.from_numpy(digits.target)[in_split].long(), tuple("0123456789"))


def _check_split(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise InputError(f"{name} has no split {split!r}; choose one of train, test.")
