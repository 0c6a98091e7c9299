"""Photographs that are downloaded once: CIFAR-10, STL-10, Imagenette and the Oxford-IIIT Pets.

Each function loads a split as an `ImageDataset`. Files are laid out under `root` as torchvision does it, so a folder of
torchvision works too; `archives.fetch` downloads what is missing. Nothing is unpickled.

Shapes: N images of S x S pixels; S is the given size, or that of the files if it is smaller.
"""

import pickletools
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minissl.data.archives import Archive, archive_member, choose_archive, fetch
from minissl.data.folder import load_folder, read_images
from minissl.data.images import ImageDataset, Images, check_memory, read_mask
from minissl.errors import InputError

DOWNLOAD_DIR = Path("data") / "downloads"

CIFAR10 = (  # two versions of the same images; the first holds plain bytes
    Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171, "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
    ),
    Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        170_498_071, "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
)  # fmt: skip
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

STL10 = Archive(
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    2_640_397_119, "91f7769df0f17e558f3565bffb0c7dfb", "stl10_binary",
    {
        "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
        "train_y.bin": "5a34089d4802c674881badbb80307741",
        "unlabeled_X.bin": "5242ba1fed5e4be9e1e742405eb56ca4",
        "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
        "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    },
)  # fmt: skip
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas"
IMAGENETTE = {  # by the short side in pixels, from small to large
    160: Archive(f"{FASTAI}/imagenette2-160.tgz", 99_003_388, "e793b78cc4c9e9a4ccc0c1155377a412", "imagenette2-160"),
    320: Archive(f"{FASTAI}/imagenette2-320.tgz", 341_663_724, "3df6f0d01a2c9592104656642f5e78a3", "imagenette2-320"),
    500: Archive(f"{FASTAI}/imagenette2.tgz", 1_557_161_267, "fe2fc210e6bb7c5664d602c3cd71e612", "imagenette2"),
}
IMAGENETTE_CLASSES = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
PETS = (  # photographs, annotations
    Archive(f"{OXFORD}/images.tar.gz", 791_918_971, "5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet/images"),
    Archive(
        f"{OXFORD}/annotations.tar.gz", 19_173_078, "95a8c909bbe2e81eed6a22bccdf3f68f", "oxford-iiit-pet/annotations"
    ),
)


def cifar10(split: str, size: int, *, root: Path = DOWNLOAD_DIR, archives: Sequence[Archive] = CIFAR10) -> Images:
    """Load CIFAR-10: 50,000 train and 10,000 test photographs of ten classes, 32 x 32 (Krizhevsky, 2009).

    Args:
        split: "train" or "test".
        size: S, at most 32.
        root: folder of downloads.
        archives: the binary and the Python version; one that is already there is preferred.

    Raises:
        InputError: for an unknown split; see also `archives.fetch`.
    """
    _check_split("cifar10", split)
    archive = choose_archive(archives, root)
    folder = fetch(archive, root)
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    if folder.name.endswith("-py"):
        parts = [_python_batch(archive_member(archive, folder, name)) for name in names]
    else:
        parts = [_binary_batch(archive_member(archive, folder, f"{name}.bin")) for name in names]
    labels, images = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    return Images(_shrink(images.view(-1, 3, 32, 32), size), labels.long(), CIFAR10_CLASSES)


def stl10(split: str, size: int, *, root: Path = DOWNLOAD_DIR, archive: Archive = STL10) -> Images:
    """Load STL-10: 5,000 train, 8,000 test and 100,000 unlabeled photographs, 96 x 96 (Coates et al., 2011).

    Args:
        split: "train", "test" or "unlabeled"; the last has no labels.
        size: S, at most 96.
        root: folder of downloads.
        archive: the published file.

    Raises:
        InputError: for an unknown split, or too little memory (the unlabeled split takes 2.8 GB at 96 pixels); see also
            `archives.fetch`.
    """
    _check_split("stl10", split, ("train", "test", "unlabeled"))
    folder = fetch(archive, root)
    columns = torch.from_numpy(_rows(archive_member(archive, folder, f"{split}_X.bin"), 3 * 96 * 96))
    images = _shrink(columns.view(-1, 3, 96, 96).mT, size)  # images are stored column by column
    if split == "unlabeled":
        return Images(images)
    labels = torch.from_numpy(_rows(archive_member(archive, folder, f"{split}_y.bin"), 1))[:, 0].long() - 1
    return Images(images, labels, STL10_CLASSES)


def stl10_unlabeled(split: str, size: int, *, root: Path = DOWNLOAD_DIR, archive: Archive = STL10) -> Images:
    """Load STL-10 for self-supervised pretraining: "train" is its unlabeled split, "test" its labeled test split."""
    _check_split("stl10-unlabeled", split)
    return stl10("unlabeled" if split == "train" else "test", size, root=root, archive=archive)


def imagenette(
    split: str, size: int, *, root: Path = DOWNLOAD_DIR, archives: Mapping[int, Archive] = IMAGENETTE
) -> ImageDataset:
    """Load Imagenette: 9,469 train and 3,925 test photographs of ten distinct ImageNet classes (Howard, 2019).

    Args:
        split: "train", or "test", which is published as "val".
        size: S.
        root: folder of downloads.
        archives: by the short side in pixels. One that is already there is preferred, even if it is smaller than S;
            else the smallest that is large enough is downloaded.

    Raises:
        InputError: for an unknown split, or too little memory; see also `archives.fetch`.
    """
    _check_split("imagenette", split)
    order = sorted(archives, key=lambda side: (side < size, abs(side - size)))
    dataset = load_folder(fetch(choose_archive([archives[side] for side in order], root), root), split, size)
    dataset.classes = tuple(IMAGENETTE_CLASSES.get(name, name) for name in dataset.classes)
    return dataset


def pets(split: str, size: int, *, root: Path = DOWNLOAD_DIR, archives: Sequence[Archive] = PETS) -> Images:
    """Load the Oxford-IIIT Pets: 3,680 train and 3,669 test photographs of 37 breeds (Parkhi et al., 2012).

    Masks are 1 on the animal, 2 on its outline, where the annotators were uncertain, and 0 elsewhere.

    Args:
        split: "train", which is published as "trainval", or "test".
        size: S.
        root: folder of downloads.
        archives: images and annotations.

    Raises:
        InputError: for an unknown split, a malformed line of the list of images, a missing mask, or too little memory;
            see also `archives.fetch`.
    """
    _check_split("pets", split)
    image_dir, annotation_dir = (fetch(archive, root) for archive in archives)
    list_file = archive_member(archives[1], annotation_dir, "test.txt" if split == "test" else "trainval.txt")
    breeds: dict[str, int] = {}
    for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) != 4 or not words[1].isdigit():
            raise InputError(
                f"{list_file}, line {number}: expected an image, its breed, its species and a number, not {line!r}."
            )
        breeds[words[0]] = int(words[1]) - 1
    files, images = read_images([image_dir / f"{name}.jpg" for name in breeds], image_dir, size)
    trimaps = annotation_dir / "trimaps"
    masks = torch.stack([read_mask(trimaps / f"{file.stem}.png", images.shape[-1], file) for file in files])
    # Published values: 1 animal, 2 background, 3 uncertain.
    masks = torch.tensor([0, 1, 0, 2], dtype=torch.uint8)[masks.clamp_max(3).long()]
    names = {breed: name.rsplit("_", 1)[0].replace("_", " ").title() for name, breed in breeds.items()}
    labels = torch.tensor([breeds[file.stem] for file in files])
    return Images(images, labels, tuple(names.get(i, "") for i in range(max(names) + 1)), masks)


def _check_split(name: str, split: str, splits: Sequence[str] = ("train", "test")) -> None:
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; choose one of {', '.join(splits)}.")


def _rows(file: Path, width: int) -> np.ndarray:
    """Map a file into memory as (n, width) uint8. Raises InputError if its last row is incomplete."""
    size = file.stat().st_size
    if not size or size % width:
        raise InputError(f"{file} is truncated; delete {file.parent} to unpack it again.")
    return np.memmap(file, np.uint8, "c").reshape(-1, width)  # copy-on-write, since torch needs a writable array


def _binary_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (n,) and pixels (n, 3072) of a batch file of CIFAR-10's binary version, uint8."""
    rows = _rows(file, 1 + 3 * 32 * 32)
    return rows[:, 0], rows[:, 1:]


def _python_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (n,) and pixels (n, 3072) of a batch file of CIFAR-10's Python version, uint8.

    The file is a pickle, which is parsed but never executed. The small integers after the string "labels" are the
    labels. The longest string holds the pixels; the flag before it is numpy's memory order.
    """
    with open(file, "rb") as content:
        opcodes: list[tuple[str, Any]] = [(code.name, value) for code, value, _ in pickletools.genops(content)]
    start = opcodes.index(("SHORT_BINSTRING", "labels")) + 1
    labels = [n for code, n in takewhile(lambda c: not isinstance(c[1], str), opcodes[start:]) if code == "BININT1"]
    at = max(range(len(opcodes)), key=lambda i: len(opcodes[i][1]) if opcodes[i][0] == "BINSTRING" else 0)
    pixels = np.frombuffer(opcodes[at][1].encode("latin-1"), np.uint8)
    fortran_order = opcodes[at - 1][0] == "NEWTRUE"
    return np.array(labels, np.uint8), pixels.reshape(len(labels), -1, order="F" if fortran_order else "C")


def _shrink(images: Tensor, size: int) -> Tensor:
    """Copy images (N, 3, S, S) uint8 into memory, resized to `size` if they are larger (bicubic)."""
    size = min(size, images.shape[-1])
    check_memory(len(images) * 3 * size * size)
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for source, target in zip(images.split(1000), out.split(1000)):  # the file is mapped: read a part at a time
        same = source.shape[-1] == size
        target.copy_(source if same else interpolate(source, size=(size, size), mode="bicubic", antialias=True))
    return out
