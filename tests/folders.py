"""Tiny folders of images, options of a run that takes a second on them, and a machine without free memory."""

from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
from PIL import Image

TINY = (
    "--device cpu --image_size 16 --crop_size 16 --local_crop_size 8 --encoder.patch_size 8 --num_prototypes 32 "
    "--hidden_dim 16 --bottleneck_dim 8 --batch_size 4 --minutes 0 --epochs 1 --threads 1"
).split()


def write_image(path: Path, size: tuple[int, int] = (20, 24), seed: int = 0) -> None:
    """Write an image file of noise, (height, width) pixels, and the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def flat_folder(folder: Path, n: int) -> Path:
    """Write n images without labels; every tenth is in the test split."""
    for i in range(n):
        write_image(folder / f"{i:03}.png", seed=i)
    return folder


def class_folders(folder: Path, **splits: int) -> Path:
    """Write SPLIT/cat/*.png and SPLIT/dog/*.png, the given number of each."""
    for split, n in splits.items():
        for name in ("cat", "dog"):
            for i in range(n):
                write_image(folder / split / name / f"{i:03}.png", seed=i)
    return folder


class _FullMemory:
    available = 1000  # bytes


def small_memory() -> AbstractContextManager[object]:
    """Pretend that 1,000 bytes of memory are free."""
    return patch.object(psutil, "virtual_memory", _FullMemory)
