"""Real data sets from their authors' addresses: fetched once, checked, unpacked, and then whole or not there at all.

A download that was cut goes on where it stopped. Its checksum is compared before anything is unpacked, and it is
unpacked beside its place and moved there in one step. Without a network, put the archive, or the folder it unpacks to,
under data/downloads by hand.

Shapes: N images of S x S pixels.
"""

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from minissl.data.folder import load_folder
from minissl.data.images import Images
from minissl.errors import InputError

ROOT = Path("data") / "downloads"


class Archive(NamedTuple):
    """A file to fetch, and the folder under the root that it gives."""

    url: str
    size: int  # bytes
    md5: str
    folder: str  # what is in place when it is unpacked
    into: str = "."  # where to unpack it

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[1]


ARCHIVES = {
    "cifar10": (
        Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", 170_498_071,
                "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"),
    ),
    "stl10": (
        Archive("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", 2_640_397_119,
                "91f7769df0f17e558f3565bffb0c7dfb", "stl10_binary"),
    ),
    "imagenette": (
        Archive("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", 341_663_724,
                "3df6f0d01a2c9592104656642f5e78a3", "imagenette2-320"),
    ),
    "pets": (
        Archive("https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz", 791_918_971,
                "5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet/images", "oxford-iiit-pet"),
        Archive("https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz", 19_173_078,
                "95a8c909bbe2e81eed6a22bccdf3f68f", "oxford-iiit-pet/annotations", "oxford-iiit-pet"),
    ),
}  # fmt: skip


def obtain(name: str, root: Path = ROOT) -> None:
    """Have the folders of a data set in place under `root`. Raises InputError if that cannot be."""
    for archive in ARCHIVES[name]:
        if not (root / archive.folder).is_dir():
            fetch(archive, root)
            unpack(archive, root)


def fetch(archive: Archive, root: Path) -> None:
    """Have the archive itself, whole, in `root`; a part that is there is gone on with."""
    path = root / archive.file
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        root.mkdir(parents=True, exist_ok=True)
        try:
            _download(archive, partial)
        except (OSError, urllib.error.URLError, TimeoutError) as error:
            raise InputError(
                f"{archive.file} ({archive.size / 1e6:,.0f} MB, md5 {archive.md5}) could not be fetched from "
                f"{archive.url} ({error}); run the same again to go on, or put the file into {root} by hand."
            ) from None
        if partial.stat().st_size < archive.size:
            raise InputError(
                f"{archive.file} was cut at {partial.stat().st_size:,} of {archive.size:,} bytes; run the same again "
                f"to go on, or put the whole file from {archive.url} into {root} by hand."
            )
        _check(partial, archive)
        partial.replace(path)
    else:
        _check(path, archive)


def _download(archive: Archive, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if have >= archive.size:
        return
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        goes_on = answer.status == 206  # a server that does not know ranges sends all of it again
        with (
            open(partial, "ab" if goes_on else "wb") as file,
            tqdm(total=archive.size, initial=have * goes_on, unit="B", unit_scale=True, desc=archive.file) as bar,
        ):
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))


def _check(path: Path, archive: Archive) -> None:
    """Raises InputError, and takes a download away, if it is not the file its authors published."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest() if hasattr(hashlib, "file_digest") else _md5(file)
    if found != archive.md5:
        if path.suffix == ".partial":
            path.unlink()
        raise InputError(
            f"{archive.file} has the checksum {found} and not {archive.md5}, so it is not the file its authors "
            f"published; fetch {archive.url} again and put it into {path.parent}."
        )


def _md5(file) -> str:
    """For Python 3.10."""
    digest = hashlib.md5()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def unpack(archive: Archive, root: Path) -> None:
    """Unpack beside the place, then move there in one step. Raises InputError if that fails; nothing is left then."""
    beside = root / f".{archive.file}.unpacking"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with tarfile.open(root / archive.file) as tar:
            tar.extractall(beside, filter="data")
        target = root / archive.folder
        target.parent.mkdir(parents=True, exist_ok=True)
        (beside / Path(archive.folder).relative_to(archive.into)).replace(target)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{root / archive.file} could not be unpacked ({error}); delete it and try again.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _resized(pictures: Iterable[Image.Image], size: int, filter: Image.Resampling) -> np.ndarray:
    """(N, size, size, ...) uint8: short side resized, middle cut out."""
    return np.stack([np.asarray(ImageOps.fit(picture, (size, size), filter)) for picture in pictures])


def _images(pixels: np.ndarray, size: int) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, S, S) uint8; smaller pictures stay as they are."""
    if pixels.shape[1] > size:
        pixels = _resized((Image.fromarray(p) for p in pixels), size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _open(kind: type, root: Path, **options):
    """One of torchvision's data sets, which checks its files' checksums before it reads them."""
    try:
        return kind(root, download=False, **options)
    except RuntimeError as error:
        raise InputError(f"The files of {kind.__name__} in {root} are damaged ({error}); delete them.") from None


def load_cifar10(split: str, size: int, root: Path = ROOT) -> Images:
    from torchvision.datasets import CIFAR10

    obtain("cifar10", root)
    found = _open(CIFAR10, root, train=split == "train")
    return Images(_images(found.data, size), torch.tensor(found.targets), tuple(found.classes))


def load_stl10(split: str, size: int, root: Path = ROOT, unlabelled: bool = False) -> Images:
    """STL-10; with `unlabelled` its 100,000 images without labels are the training part."""
    from torchvision.datasets import STL10

    obtain("stl10", root)
    unlabelled = unlabelled and split == "train"
    found = _open(STL10, root, split="unlabeled" if unlabelled else split)
    labels = None if unlabelled else torch.from_numpy(found.labels).long()
    return Images(_images(found.data.transpose(0, 2, 3, 1), size), labels, tuple(found.classes))


def load_imagenette(split: str, size: int, root: Path = ROOT) -> Images:
    obtain("imagenette", root)
    found = load_folder(root / "imagenette2-320", split, size)
    names = ("tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
             "gas pump", "golf ball", "parachute")  # fmt: skip
    return Images(found.images, found.labels, names)


def load_pets(split: str, size: int, root: Path = ROOT) -> Images:
    """The Oxford-IIIT pets, with masks: 1 the animal and its border, 0 the rest."""
    from torchvision.datasets import OxfordIIITPet

    obtain("pets", root)
    options = {"split": "trainval" if split == "train" else "test", "target_types": ["category", "segmentation"]}
    found, pictures, labels, masks = _open(OxfordIIITPet, root, **options), [], [], []
    for picture, (label, trimap) in tqdm(found, "reading pets", leave=False):
        pictures.append(_resized([picture.convert("RGB")], size, Image.Resampling.BICUBIC)[0])
        masks.append(_resized([trimap], size, Image.Resampling.NEAREST)[0] != 2)
        labels.append(label)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(labels), tuple(found.classes), torch.from_numpy(np.stack(masks)).byte())
