"""Folders of your own images.

A folder holds images, class folders of images, or either of these under train/ and test/ (or val/). Without a test
part, every tenth image in the order of names is the test split.

Shapes: N images of S x S pixels.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median_low

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from minissl.data.images import Images, check_memory, decode_image, exceeds_memory, short_side
from minissl.data.streaming import ImageFiles
from minissl.errors import InputError

TEST_PARTS = ("test", "val")  # names of a folder's test part


def load_folder(folder: Path, split: str, image_size: int, min_size: int = 1) -> Images | ImageFiles:
    """Load a folder of images. The short side is resized, the center is cropped, unreadable files are left out.

    Args:
        folder: images, class folders of images, or these under train/ and test/ (or val/).
        split: "train" or "test".
        image_size: S; if most images are smaller, the median of their short sides is used.
        min_size: pixels that the short side of every image must have.

    Returns:
        `Images` in memory if they fit, else `ImageFiles`, which are decoded during training.

    Raises:
        InputError: if the folder is missing or empty, holds no readable image, or one that is too small.
    """
    listed = list_files(folder, split)
    files, image_size = readable_files(listed, folder, image_size, min_size)
    num_bytes = len(files) * 3 * image_size * image_size
    if exceeds_memory(num_bytes):
        print(f"The images need {num_bytes / 1e9:.1f} GB of memory, more than is free: they are decoded as they come.")
        _report_left_out(len(listed) - len(files), len(listed), folder)
        num_workers = max(1, (os.cpu_count() or 2) - 1)
        return ImageFiles(files, image_size, *read_labels(files, folder, split), num_workers)
    files, images = decode_all(files, folder, image_size, len(listed))
    return Images(images, *read_labels(files, folder, split))


def read_images(files: list[Path], folder: Path, size: int) -> tuple[list[Path], Tensor]:
    """Decode the files that can be read, in their order; prints how many cannot.

    Args:
        files: images, or files that may be images.
        folder: where they are, for messages.
        size: S; if most images are smaller, the median of their short sides is used.

    Returns:
        The N readable files, and their images (N, 3, S, S) uint8.

    Raises:
        InputError: if none can be read, or memory is too small.
    """
    readable, size = readable_files(files, folder, size)
    check_memory(len(readable) * 3 * size * size)
    return decode_all(readable, folder, size, len(files))


def readable_files(files: list[Path], folder: Path, size: int, min_size: int = 1) -> tuple[list[Path], int]:
    """Return the files whose headers are those of images, and S.

    Raises:
        InputError: if there is none, or an image is smaller than `min_size`.
    """
    with ThreadPoolExecutor() as pool:
        sides = {file: side for file, side in zip(files, pool.map(short_side, files)) if side}
    if not sides:
        raise _none_readable(len(files), folder)
    smallest = min(sides, key=lambda file: sides[file])
    if sides[smallest] < min_size:
        raise InputError(
            f"{smallest} is {sides[smallest]} pixels on its short side, smaller than a crop of {min_size}; "
            "remove it, or give a smaller --crop_size."
        )
    return list(sides), min(size, median_low(sides.values()))


def decode_all(files: list[Path], folder: Path, size: int, num_listed: int) -> tuple[list[Path], Tensor]:
    """Decode files to (N, 3, size, size) uint8; returns the N that are whole, too.

    Prints how many of all `num_listed` files were left out. Raises InputError if none is whole.
    """
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(partial(decode_image, size=size), files)
        progress_bar = tqdm(decoded, f"reading {folder.name}", len(files), leave=False)
        pixels = {file: image for file, image in zip(files, progress_bar) if image is not None}
    if not pixels:
        raise _none_readable(num_listed, folder)
    _report_left_out(num_listed - len(pixels), num_listed, folder)
    return list(pixels), torch.from_numpy(np.stack(list(pixels.values()))).permute(0, 3, 1, 2).contiguous()


def _none_readable(num_files: int, folder: Path) -> InputError:
    return InputError(
        f"None of the {num_files} files in {folder} is a readable image; images must be complete, have 8 or 16 bits "
        "per channel, and be within Pillow's size limit."
    )


def _report_left_out(num_bad: int, num_files: int, folder: Path) -> None:
    if num_bad:
        print(f"{num_bad} of {num_files} files in {folder} are not readable images; they are left out.")


def _split_root(folder: Path, split: str) -> Path:
    """Return the subfolder of a split, or the folder itself if both splits are taken from it."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; check the path.")
    parts = ("train",) if split == "train" else (*TEST_PARTS, "train")
    return next((folder / part for part in parts if (folder / part).is_dir()), folder)


def _is_visible(path: Path, root: Path) -> bool:
    """Return False for what a system or an editor hides in folders."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)


def list_files(folder: Path, split: str) -> list[Path]:
    """List the files of a split ("train" or another) in the order of their names.

    Raises:
        InputError: if the folder is missing or empty, or cannot be listed.
    """
    root = _split_root(folder, split)
    try:
        files = sorted(file for file in root.rglob("*") if file.is_file() and _is_visible(file, root))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be listed ({error.strerror}); was {root} being moved?") from None
    if root == folder:  # next to a test part, everything else is the training part
        files = [file for file in files if file.parent == root or file.relative_to(root).parts[0] not in TEST_PARTS]
    if not files:
        raise InputError(f"The folder {root} is empty; put images in it, or class folders of images.")
    if _split_root(folder, "train") == _split_root(folder, "test"):
        files = [file for i, file in enumerate(files) if (i % 10 == 9) == (split != "train")] or files
    return files


def read_labels(files: list[Path], folder: Path, split: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return labels (N,) int64 and class names from the class folders of the training part, or (None, ())."""
    root, train_root = _split_root(folder, split), _split_root(folder, "train")
    folders = [path for path in train_root.iterdir() if path.is_dir() and _is_visible(path, train_root)]
    folders = [path for path in folders if any(path.iterdir())]
    classes = tuple(sorted(path.name for path in folders if train_root != folder or path.name not in TEST_PARTS))
    names = [file.relative_to(root).parts[0] for file in files]
    single_class = split == "train" and len(set(names)) < 2  # also if only the files of one class can be read
    if len(classes) < 2 or single_class or not set(names) <= set(classes):
        return None, ()
    return torch.tensor([classes.index(name) for name in names]), classes
