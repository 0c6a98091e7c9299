"""Where images come from, by name.

Every source gives the same thing: uint8 images of one size in memory, labels and masks if there are any.
"""

from pathlib import Path

import torch
from torch.nn.functional import interpolate

from minissl.data.captions import load_captions
from minissl.data.downloads import DOWNLOADS, cifar10, imagenette, pets, stl10, stl10_unlabelled
from minissl.data.folder import load_folder
from minissl.data.images import Factor, Images
from minissl.data.scenes import FACTORS, Scenes
from minissl.data.words import prompts
from minissl.errors import InputError

DOWNLOADED = {
    "cifar10": cifar10,
    "stl10": stl10,
    "stl10-unlabelled": stl10_unlabelled,
    "imagenette": imagenette,
    "pets": pets,
}
PARTS = ("compositions", "known", "new")  # of the embedded world
CAPTIONED = ("flickr8k", "coco")
NAMES = f"scenes, scenes:PART, digits, {', '.join(DOWNLOADED)}, folder:PATH, flickr8k:PATH or coco:PATH"


def load(name: str, split: str, size: int, seed: int = 0, at_least: int = 1, root: Path = DOWNLOADS) -> Images:
    """A data set's split.

    Args:
        name: one of NAMES.
        split: "train" or "test".
        size: pixels a side the images are kept at; where the files are smaller they are kept at theirs.
        seed: of the world, for scenes.
        at_least: pixels an image of a folder must have on its short side.
        root: the folder that downloads are in, or are put in.

    Raises:
        InputError: for an unknown name, a folder that is not there or holds no readable image, a data set that can
            not be downloaded, too little memory.
    """
    if name.startswith("folder:"):
        return load_folder(Path(name.removeprefix("folder:")).expanduser(), split, size, at_least)
    if name.split(":")[0] == "scenes":
        return load_scenes(name.removeprefix("scenes").removeprefix(":"), split, size, seed)
    if name.split(":")[0] in CAPTIONED:
        found = load_captions(name, split, size)
        return Images(found.images, captions=found.captions)
    if name == "digits":
        return load_digits(split, size)
    if name in DOWNLOADED:
        return DOWNLOADED[name](split, size, root=root)
    raise InputError(f"There is no data set {name!r}; choose {NAMES}.")


def load_scenes(kind: str, split: str, size: int, seed: int) -> Images:
    """The embedded world.

    Args:
        kind: "" for scenes labelled by their object; "color", "action" or "place" for another factor as the label;
            "compositions" for a training split in which every object misses a colour and an action, and a test split
            of just those; "known" and "new" for the first and the last five objects, labelled 0 to 4.
        split, size, seed: as for `load`.
    """
    if kind not in ("", *PARTS, *FACTORS):
        parts = ", ".join(f"scenes:{part}" for part in (*PARTS, *FACTORS))
        raise InputError(f"There are no scenes:{kind}; choose scenes or one of {parts}.")
    if kind == "compositions":
        split = {"train": "seen", "test": "unseen"}[split]
    scenes = Scenes(split, size, seed=seed)
    factors = {name: Factor(scenes.factors[name], FACTORS[name], prompts(name, FACTORS)) for name in FACTORS}
    images = Images(scenes.images, scenes.labels, scenes.classes, scenes.masks, scenes.captions, factors)
    if kind in ("known", "new"):
        return images.only(range(5) if kind == "known" else range(5, 10))
    return images.known_as(kind) if kind in FACTORS else images


def load_digits(split: str, size: int) -> Images:
    """scikit-learn's 1,797 scanned digits, 8 x 8 grey, enlarged; every fifth is for testing."""
    from sklearn.datasets import load_digits as digits

    found = digits()
    grey = torch.from_numpy(found.images).float()[:, None] / 16  # (N, 1, 8, 8)
    grey = interpolate(grey, size=(size, size), mode="bicubic").clamp(0, 1)
    images = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    rows = (torch.arange(len(images)) % 5 == 0) == (split == "test")
    return Images(images[rows], torch.from_numpy(found.target)[rows].long(), tuple("0123456789"))
