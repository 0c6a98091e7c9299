"""Tiny folders of images, and the options of a run that takes a second on them."""

from pathlib import Path

import numpy as np
from PIL import Image

TINY = (
    "--device cpu --image_size 16 --size 16 --local_size 8 --encoder.patch_size 8 --prototypes 32 --hidden 16 "
    "--bottleneck 8 --batch_size 4 --minutes 0 --epochs 1"
).split()


def picture(path: Path, size: tuple[int, int] = (20, 24), seed: int = 0) -> None:
    """Noise, (height, width) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def flat_folder(folder: Path, n: int) -> Path:
    """n images without labels; every tenth is for testing."""
    for i in range(n):
        picture(folder / f"{i:03}.png", seed=i)
    return folder


def class_folders(folder: Path, **splits: int) -> Path:
    """SPLIT/cat/*.png and SPLIT/dog/*.png, so many of each."""
    for split, n in splits.items():
        for kind in ("cat", "dog"):
            for i in range(n):
                picture(folder / split / kind / f"{i:03}.png", seed=i)
    return folder
