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
import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

from minissl.data.images import Images, decode, short_side
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
    files = _list(folder, split)
    with ThreadPoolExecutor() as pool:
        sides = {file: side for file, side in zip(files, pool.map(short_side, files)) if side}
    if not sides:
        raise InputError(f"None of the {len(files)} files in {folder} is an image that can be read.")
    smallest = min(sides, key=sides.get)
    if sides[smallest] < at_least:
        raise InputError(
            f"{smallest} is {sides[smallest]} pixels on its short side, smaller than a crop of {at_least}; "
            "take it out, or give a smaller --size."
        )
    size = min(size, median_low(sides.values()))
    need, free = len(sides) * 3 * size * size, psutil.virtual_memory().available
    if need > 0.7 * free:
        print(
            f"The images would take {need / 1e9:.1f} of {free / 1e9:.1f} GB of memory: they are decoded as they come."
        )
        return Files(tuple(sides), size, *_labels(list(sides), folder, split), max(1, (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(partial(decode, size=size), sides)
        bar = tqdm(decoded, f"reading {folder.name}", len(sides), leave=False)
        kept = {file: pixels for file, pixels in zip(sides, bar) if pixels is not None}
    if not kept:
        raise InputError(f"None of the {len(files)} files in {folder} is an image that can be read.")
    if len(kept) < len(files):
        print(f"{len(files) - len(kept)} of {len(files)} files in {folder} are not images that can be read; left out.")
    images = torch.from_numpy(np.stack(list(kept.values()))).permute(0, 3, 1, 2).contiguous()
    return Images(images, *_labels(list(kept), folder, split))


def _root(folder: Path, split: str) -> Path:
    """The part of the folder that holds a split, or the folder itself if it has no parts."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    parts = ("train",) if split == "train" else ("test", "val")
    return next((folder / part for part in parts if (folder / part).is_dir()), folder)


def _list(folder: Path, split: str) -> list[Path]:
    """The files of a split in the order of their names."""
    root = _root(folder, split)
    files = sorted(file for file in root.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise InputError(f"The folder {root} is empty; put images in it, or class folders of images.")
    if root == folder or _root(folder, "train") == _root(folder, "test"):
        files = [file for i, file in enumerate(files) if (i % 10 == 9) == (split != "train")] or files
    return files


def _labels(files: list[Path], folder: Path, split: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """(N,) labels and the names of the classes, the folders under the training part; none if there are none."""
    root = _root(folder, split)
    classes = tuple(sorted(path.name for path in _root(folder, "train").iterdir() if path.is_dir()))
    names = [file.relative_to(root).parts[0] for file in files]
    if len(classes) < 2 or not set(names) <= set(classes):
        return None, ()
    return torch.tensor([classes.index(name) for name in names]), classes
