"""Photographs with captions that people wrote: Flickr8k and COCO, in the folders they are published as.

    flickr8k:PATH   Images/ or Flicker8k_Dataset/ beside captions.txt (a table: image,caption) or Flickr8k.token.txt
                    (name#number, a tab, the caption); beside that Flickr_8k.trainImages.txt, dev and test, all or none
    coco:PATH       train2017/ and val2017/ beside annotations/captions_train2017.json and captions_val2017.json

Shapes: N images of S x S pixels.
"""

import csv
import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from minissl.data.folder import read_images
from minissl.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Captioned:
    """Images and what people say of them.

    Attributes:
        images: (N, 3, S, S) uint8.
        captions: of each image, all of its captions, at least one.
    """

    images: Tensor
    captions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int) -> "Captioned":
        """The first n images, or all if there are fewer."""
        return Captioned(self.images[:n], self.captions[:n])


def load_captions(name: str, split: str, size: int, most: int | None = None) -> Captioned:
    """Images with their captions; an image that is missing or cannot be read is left out, and how many is printed.

    Args:
        name: "flickr8k:PATH" or "coco:PATH".
        split: "train", "val" or "test". Without its split files Flickr8k keeps every tenth image, by name, for the
            last two; COCO has one part for both.
        size: pixels a side to keep, short side resized and the middle cut out; smaller images are kept at theirs.
        most: images to read, the first of them; all if None.

    Raises:
        InputError: for an unknown name or split, a file that is missing, a broken line of a file of captions; if no
            image can be read; too little memory.
    """
    kind, _, path = name.partition(":")
    if kind not in ("flickr8k", "coco") or not path:
        raise InputError(f"There is no set of captions {name!r}; choose flickr8k:PATH or coco:PATH.")
    if split not in SPLITS:
        raise InputError(f"{kind} has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    folder = Path(path).expanduser()
    captions = (flickr8k if kind == "flickr8k" else coco)(folder, split)
    captions = dict(islice(captions.items(), most))
    if not captions:
        raise InputError(f"The {split} part of {folder} has no captions.")
    files, images = read_images(list(captions), folder, size)
    return Captioned(images, tuple(tuple(captions[file]) for file in files))


def flickr8k(folder: Path, split: str) -> dict[Path, list[str]]:
    """The captions of each image file of a split of Flickr8k. Raises InputError, see `load_captions`."""
    images = _first(folder, "Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
    listed = _first(folder, "captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
    captions = _from_table(listed) if listed.name == "captions.txt" else _from_tokens(listed)
    part = f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    if any(listed.parent.glob("Flickr_8k.*Images.txt")):  # one without the others would let the parts overlap
        names = [name.strip() for _, name in _lines(_first(listed.parent, part)) if name.strip()]
    else:
        names = [name for i, name in enumerate(sorted(captions)) if (i % 10 == 9) == (split != "train")]
    return {images / name: captions[name] for name in names if name in captions}


def coco(folder: Path, split: str) -> dict[Path, list[str]]:
    """The captions of each image file of a split of COCO 2017. Raises InputError, see `load_captions`."""
    part = "train2017" if split == "train" else "val2017"
    listed, images = _first(folder, f"annotations/captions_{part}.json"), _first(folder, part)
    try:
        content = json.loads(listed.read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"{listed} is no text in UTF-8 (byte {error.start:,}).") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{listed}, line {error.lineno}: this is not JSON ({error.msg}).") from None
    captions: dict[Path, list[str]] = {}
    try:
        files = {image["id"]: images / image["file_name"] for image in content["images"]}
        for note in content["annotations"]:
            captions.setdefault(files[note["image_id"]], []).append(note["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{listed} is not COCO's list of captions: something in it is missing ({error}).") from None
    return captions


def _from_table(file: Path) -> dict[str, list[str]]:
    """Captions by image, from a table with a heading: image,caption."""
    captions: dict[str, list[str]] = {}
    rows, number = csv.reader((line for _, line in _lines(file)), strict=True), 1
    try:
        for row in rows:
            name, caption = row[0].strip() if row else "", ",".join(row[1:]).strip()  # commas need not be quoted
            if row and (not name or not caption or "\n" in caption):  # a quote that is not closed takes more lines
                raise csv.Error
            if row and (name, caption) != ("image", "caption"):
                captions.setdefault(name, []).append(caption)
            number = rows.line_num + 1
    except csv.Error:
        raise InputError(f"{file}, line {number}: this is not the name of an image, a comma and a caption.") from None
    return captions


def _from_tokens(file: Path) -> dict[str, list[str]]:
    """Captions by image, from lines of name#number, a tab, and the caption."""
    captions: dict[str, list[str]] = {}
    for number, line in _lines(file):
        found = re.fullmatch(r"(.+)#\d+\t(.*\S)\s*", line)
        if not found and line.strip():
            raise InputError(f"{file}, line {number}: this is not image#number, a tab and a caption.")
        if found:
            captions.setdefault(found[1], []).append(found[2].strip())
    return captions


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a text, each with its number and its end. Raises InputError for what is no UTF-8."""
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        try:
            found.append((number, line.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError:
            raise InputError(f"{file}, line {number}: this is no text in UTF-8.") from None
    return found


def _first(folder: Path, *names: str) -> Path:
    """The first of some files or folders that exists. Raises InputError if none does."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; it should hold {' or '.join(names)}.")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise InputError(f"{folder} has no {' or '.join(names)}.")
