"""Real data sets that are downloaded once: CIFAR-10, STL-10, Imagenette and the Oxford-IIIT Pets.

Each function gives a split as `Images`. Its files lie under `root` as torchvision lays them out, so that a folder of
torchvision's serves too; `fetch.fetch` brings what is missing. Nothing is unpickled.

Shapes: N images of S x S pixels, S the size asked for or the files' own if that is smaller.
"""

import pickletools
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minissl.data.fetch import Archive, choose, fetch, inside
from minissl.data.folder import load_folder, read_images
from minissl.data.images import Images, need_memory, read_mask
from minissl.errors import InputError

DOWNLOADS = Path("data") / "downloads"

CIFAR10 = (  # either will do; the first holds plain bytes
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
IMAGENETTE = {  # by the pixels of the short side, from small to large
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
PETS = (  # photographs, and what is known of them
    Archive(f"{OXFORD}/images.tar.gz", 791_918_971, "5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet/images"),
    Archive(
        f"{OXFORD}/annotations.tar.gz", 19_173_078, "95a8c909bbe2e81eed6a22bccdf3f68f", "oxford-iiit-pet/annotations"
    ),
)


def cifar10(split: str, size: int, *, root: Path = DOWNLOADS, archives: Sequence[Archive] = CIFAR10) -> Images:
    """50,000 train and 10,000 test photographs of ten things, 32 x 32 (Krizhevsky, 2009).

    Args:
        split: "train" or "test".
        size: pixels a side to keep, 32 at most.
        root: the folder of downloads.
        archives: the binary version and the Python version, either of which is used if it is there.

    Raises:
        InputError: see `fetch.fetch`.
    """
    _need_split("cifar10", split)
    archive = choose(archives, root)
    folder = fetch(archive, root)
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    if folder.name.endswith("-py"):
        parts = [_python_batch(inside(archive, folder, name)) for name in names]
    else:
        parts = [_binary_batch(inside(archive, folder, f"{name}.bin")) for name in names]
    labels, images = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    return Images(_shrink(images.view(-1, 3, 32, 32), size), labels.long(), CIFAR10_CLASSES)


def stl10(split: str, size: int, *, root: Path = DOWNLOADS, archive: Archive = STL10) -> Images:
    """5,000 train, 8,000 test and 100,000 unlabelled photographs, 96 x 96 (Coates et al., 2011).

    Args:
        split: "train", "test", or "unlabelled", which is what the set was made for; the last has no labels.
        size: pixels a side to keep, 96 at most.
        root: the folder of downloads.
        archive: the published file.

    Raises:
        InputError: see `fetch.fetch`; too little memory (the unlabelled take 2.8 GB at 96 pixels).
    """
    _need_split("stl10", split, ("train", "test", "unlabelled"))
    folder = fetch(archive, root)
    name = {"unlabelled": "unlabeled"}.get(split, split)
    columns = torch.from_numpy(_rows(inside(archive, folder, f"{name}_X.bin"), 3 * 96 * 96)).view(-1, 3, 96, 96)
    images = _shrink(columns.mT, size)  # they are stored column by column
    if split == "unlabelled":
        return Images(images)
    labels = torch.from_numpy(_rows(inside(archive, folder, f"{name}_y.bin"), 1))[:, 0].long() - 1
    return Images(images, labels, STL10_CLASSES)


def stl10_unlabelled(split: str, size: int, *, root: Path = DOWNLOADS, archive: Archive = STL10) -> Images:
    """STL-10 as it was meant: "train" is the unlabelled part, "test" the labelled test part."""
    _need_split("stl10-unlabelled", split)
    return stl10("unlabelled" if split == "train" else "test", size, root=root, archive=archive)


def imagenette(split: str, size: int, *, root: Path = DOWNLOADS, archives: dict[int, Archive] = IMAGENETTE) -> Images:
    """9,469 train and 3,925 test photographs of ten classes of ImageNet that are easy to tell apart (Howard, 2019).

    Args:
        split: "train" or "test", the published "val".
        size: pixels a side to keep.
        root: the folder of downloads.
        archives: by the pixels of the short side. The smallest that is large enough is downloaded; one that is there
            is used, and one that is smaller than `size` rather than none.

    Raises:
        InputError: see `fetch.fetch`; too little memory.
    """
    _need_split("imagenette", split)
    order = sorted(archives, key=lambda side: (side < size, abs(side - size)))
    found = load_folder(fetch(choose([archives[side] for side in order], root), root), split, size)
    return replace(found, classes=tuple(IMAGENETTE_CLASSES.get(name, name) for name in found.classes))


def pets(split: str, size: int, *, root: Path = DOWNLOADS, archives: Sequence[Archive] = PETS) -> Images:
    """3,680 train and 3,669 test photographs of cats and dogs of 37 breeds, with masks (Parkhi et al., 2012).

    The masks are 1 on the animal, 2 on its outline, where the annotators were not sure, and 0 elsewhere.

    Args:
        split: "train", the published "trainval", or "test".
        size: pixels a side to keep.
        root: the folder of downloads.
        archives: the images and the annotations.

    Raises:
        InputError: see `fetch.fetch`; a line of the list that is broken, a mask that is missing; too little memory.
    """
    _need_split("pets", split)
    folder, known = (fetch(archive, root) for archive in archives)
    list_ = inside(archives[1], known, "test.txt" if split == "test" else "trainval.txt")
    breeds: dict[str, int] = {}
    for number, line in enumerate(list_.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) != 4 or not words[1].isdigit():
            raise InputError(f"{list_}, line {number}: {line!r} is not an image, its breed, its species and a number.")
        breeds[words[0]] = int(words[1]) - 1
    files, images = read_images([folder / f"{name}.jpg" for name in breeds], folder, size)
    masks = torch.stack([read_mask(known / "trimaps" / f"{file.stem}.png", images.shape[-1], file) for file in files])
    masks = torch.tensor([0, 1, 0, 2], dtype=torch.uint8)[masks.clamp_max(3).long()]  # published: 1 animal, 2 not, 3 ?
    names = {breed: name.rsplit("_", 1)[0].replace("_", " ").title() for name, breed in breeds.items()}
    labels = torch.tensor([breeds[file.stem] for file in files])
    return Images(images, labels, tuple(names.get(i, "") for i in range(max(names) + 1)), masks)


def _need_split(name: str, split: str, splits: Sequence[str] = ("train", "test")) -> None:
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; choose one of {', '.join(splits)}.")


def _rows(file: Path, width: int) -> np.ndarray:
    """A file of bytes as (n, width) uint8, read when looked at. Raises InputError if the last row is not whole."""
    size = file.stat().st_size
    if not size or size % width:
        raise InputError(f"{file} is cut short; delete {file.parent} to have it unpacked again.")
    return np.memmap(file, np.uint8, "c").reshape(-1, width)  # copied on write, as torch wants to be allowed to


def _binary_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and pixels (n, 3072) of a batch of CIFAR-10's binary version."""
    rows = _rows(file, 1 + 3 * 32 * 32)
    return rows[:, 0], rows[:, 1:]


def _python_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and pixels (n, 3072) of a batch of CIFAR-10's Python version.

    It is a pickle, and is read without running it: of its opcodes, the small numbers after the word "labels" are the
    labels and the one long string is the pixels, with a flag before it that tells how numpy ordered them.
    """
    with open(file, "rb") as content:
        codes = [(code.name, value) for code, value, _ in pickletools.genops(content)]
    start = codes.index(("SHORT_BINSTRING", "labels")) + 1
    labels = [n for code, n in takewhile(lambda c: not isinstance(c[1], str), codes[start:]) if code == "BININT1"]
    at = max(range(len(codes)), key=lambda i: len(codes[i][1]) if codes[i][0] == "BINSTRING" else 0)
    order = "F" if codes[at - 1][0] == "NEWTRUE" else "C"
    pixels = np.frombuffer(codes[at][1].encode("latin-1"), np.uint8)
    return np.array(labels, np.uint8), pixels.reshape(len(labels), -1, order=order)


def _shrink(images: Tensor, size: int) -> Tensor:
    """(N, 3, S, S) uint8 brought to `size` if they are larger, into memory of their own."""
    size = min(size, images.shape[-1])
    need_memory(len(images) * 3 * size * size)
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for few, room in zip(images.split(1000), out.split(1000)):  # of a file mapped into memory, a part at a time
        same = few.shape[-1] == size
        room.copy_(few if same else interpolate(few, size=(size, size), mode="bicubic", antialias=True))
    return out
