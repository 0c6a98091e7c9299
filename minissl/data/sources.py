"""Where images come from, by name: the embedded world, real data sets, or "folder:PATH" for a folder of one's own.

Every source gives the same thing: uint8 images of one size, labels if there are any.
"""

from functools import partial
from pathlib import Path

import torch

from minissl.data import downloads
from minissl.data.folder import load_folder
from minissl.data.images import Images
from minissl.data.scenes import Scenes
from minissl.errors import InputError

NAMES = ("scenes", "digits", "cifar10", "stl10", "stl10-unlabelled", "imagenette", "pets")


def load(name: str, split: str, size: int, seed: int = 0, at_least: int = 1) -> Images:
    """A data set's split.

    Args:
        name: one of NAMES, or "folder:PATH".
        split: "train" or "test".
        size: pixels a side the images are kept at; smaller ones are kept at theirs.
        seed: of the world, for scenes.
        at_least: pixels an image of a folder must have on its short side.

    Raises:
        InputError: for an unknown name, a folder that is not there or holds no readable image, too little memory, a
            data set that is neither here nor can be fetched.
    """
    if name.startswith("folder:"):
        return load_folder(Path(name.removeprefix("folder:")).expanduser(), split, size, at_least)
    if name == "scenes":
        scenes = Scenes(split, size, seed=seed)
        return Images(scenes.images, scenes.labels, scenes.classes, scenes.masks)
    loaders = {
        "digits": load_digits,
        "cifar10": downloads.load_cifar10,
        "stl10": downloads.load_stl10,
        "stl10-unlabelled": partial(downloads.load_stl10, unlabelled=True),
        "imagenette": downloads.load_imagenette,
        "pets": downloads.load_pets,
    }
    if name not in loaders:
        raise InputError(f"There is no data set {name!r}; choose {', '.join(NAMES)} or folder:PATH.")
    return loaders[name](split, size)


def load_digits(split: str, size: int) -> Images:
    """scikit-learn's 1,797 scanned digits, 8 x 8 grey, enlarged; every fifth is for testing."""
    from sklearn.datasets import load_digits as digits

    found = digits()
    grey = torch.from_numpy(found.images).float()[:, None] / 16  # (N, 1, 8, 8)
    grey = torch.nn.functional.interpolate(grey, size=(size, size), mode="bicubic").clamp(0, 1)
    images = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    rows = (torch.arange(len(images)) % 5 == 0) == (split == "test")
    return Images(images[rows], torch.from_numpy(found.target)[rows].long(), tuple("0123456789"))
