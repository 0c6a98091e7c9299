"""A folder of one's own images.

It may hold images directly, class folders of images, or either of these under train/ and test/ (or val/); what has no
test part gets one, every tenth image by the order of names.

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

from minissl.data.images import Images, decode, fills_memory, need_memory, short_side
from minissl.data.stream import Files
from minissl.errors import InputError


def load_folder(folder: Path, split: str, size: int, at_least: int = 1) -> Images | Files:
    """The images of a folder, short side brought to `size` and the middle kept. What cannot be read is left out.

    Args:
        folder: images, class folders of images, or these under train/ and test/ (or val/).
        split: "train" or "test".
        size: pixels a side to keep; folders of smaller images are kept at theirs.
        at_least: pixels an image must have on its short side.

    Returns:
        Images in memory, or, if they would fill it, Files that are decoded as they are asked for.
    """
    listed = list_files(folder, split)
    files, size = readable(listed, folder, size, at_least)
    need = len(files) * 3 * size * size
    if fills_memory(need):
        print(f"The images would take {need / 1e9:.1f} GB of memory, more than is free: they are decoded as they come.")
        _say_left_out(len(listed) - len(files), len(listed), folder)
        return Files(tuple(files), size, *read_labels(files, folder, split), max(1, (os.cpu_count() or 2) - 1))
    files, images = decode_all(files, folder, size, len(listed))
    return Images(images, *read_labels(files, folder, split))


def read_images(files: list[Path], folder: Path, size: int) -> tuple[list[Path], Tensor]:
    """The files that can be read, in their order, and their images; how many could not is printed.

    Args:
        files: images, or what may be.
        folder: where they are, for messages.
        size: pixels a side to keep; if most images are smaller, that of the middle one.

    Returns:
        The N files, and their images (N, 3, S, S) uint8.

    Raises:
        InputError: if none can be read, or memory is too little.
    """
    good, size = readable(files, folder, size)
    need_memory(len(good) * 3 * size * size)
    return decode_all(good, folder, size, len(files))


def readable(files: list[Path], folder: Path, size: int, at_least: int = 1) -> tuple[list[Path], int]:
    """The files whose headers are an image's, and the size to keep them at. Raises InputError."""
    with ThreadPoolExecutor() as pool:
        sides = {file: side for file, side in zip(files, pool.map(short_side, files)) if side}
    if not sides:
        raise _none(len(files), folder)
    smallest = min(sides, key=sides.get)
    if sides[smallest] < at_least:
        raise InputError(
            f"{smallest} is {sides[smallest]} pixels on its short side, smaller than a crop of {at_least}; "
            "take it out, or give a smaller --size."
        )
    return list(sides), min(size, median_low(sides.values()))


def decode_all(files: list[Path], folder: Path, size: int, of: int) -> tuple[list[Path], Tensor]:
    """The files that are whole, and their images (N, 3, size, size) uint8. Prints how many `of` all are left out."""
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(partial(decode, size=size), files)
        bar = tqdm(decoded, f"reading {folder.name}", len(files), leave=False)
        kept = {file: pixels for file, pixels in zip(files, bar) if pixels is not None}
    if not kept:
        raise _none(of, folder)
    _say_left_out(of - len(kept), of, folder)
    return list(kept), torch.from_numpy(np.stack(list(kept.values()))).permute(0, 3, 1, 2).contiguous()


def _none(of: int, folder: Path) -> InputError:
    return InputError(
        f"None of the {of} files in {folder} is an image that can be read: whole, of 8 or 16 bits a channel, and not "
        "too large for Pillow."
    )


def _say_left_out(bad: int, of: int, folder: Path) -> None:
    if bad:
        print(f"{bad} of {of} files in {folder} are not images that can be read; left out.")


TESTED = ("test", "val")  # names of a part to test on


def _root(folder: Path, split: str) -> Path:
    """The part of the folder that holds a split: of its own, or the one that both are taken from."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    parts = ("train",) if split == "train" else (*TESTED, "train")
    return next((folder / part for part in parts if (folder / part).is_dir()), folder)


def _counts(path: Path, root: Path) -> bool:
    """False for what a system or an editor hid there."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)


def list_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in the order of their names."""
    root = _root(folder, split)
    try:
        files = sorted(file for file in root.rglob("*") if file.is_file() and _counts(file, root))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be listed ({error.strerror}); was {root} being moved?") from None
    if root == folder:  # beside a part to test on, the rest is what is learnt from
        files = [file for file in files if file.parent == root or file.relative_to(root).parts[0] not in TESTED]
    if not files:
        raise InputError(f"The folder {root} is empty; put images in it, or class folders of images.")
    if _root(folder, "train") == _root(folder, "test"):
        files = [file for i, file in enumerate(files) if (i % 10 == 9) == (split != "train")] or files
    return files


def read_labels(files: list[Path], folder: Path, split: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """(N,) labels and the names of the classes, the folders under the training part; none if there are none."""
    root, learnt = _root(folder, split), _root(folder, "train")
    inside = [path for path in learnt.iterdir() if path.is_dir() and _counts(path, learnt) and any(path.iterdir())]
    classes = tuple(sorted(path.name for path in inside if learnt != folder or path.name not in TESTED))
    names = [file.relative_to(root).parts[0] for file in files]
    alone = split == "train" and len(set(names)) < 2  # one class, or one of which files can be read
    if len(classes) < 2 or alone or not set(names) <= set(classes):
        return None, ()
    return torch.tensor([classes.index(name) for name in names]), classes
