"""Photographs with captions written by people: Flickr8k and COCO, in the folders in which they are published::

    flickr8k:PATH   Images/ or Flicker8k_Dataset/ next to captions.txt (a table: image,caption) or Flickr8k.token.txt
                    (name#number, a tab, the caption); optionally all three of Flickr_8k.trainImages.txt, dev and test
    coco:PATH       train2017/ and val2017/ next to annotations/captions_train2017.json and captions_val2017.json

Hodosh et al., Framing Image Description as a Ranking Task, 2013; Chen et al., Microsoft COCO Captions, 2015
(arXiv:1504.00325).

Shapes: N images of S x S pixels.
"""

import csv
import json
import re
from itertools import islice
from pathlib import Path

from minissl.data.folder import read_images
from minissl.data.images import Images
from minissl.errors import InputError, suggestion

SPLITS = ("train", "val", "test")
CAPTION_SETS = ("flickr8k", "coco")


def load_captions(name: str, split: str, image_size: int, max_images: int | None = None) -> Images:
    """Load images with their captions. Missing and unreadable images are left out, and their number is printed.

    Args:
        name: "flickr8k:PATH" or "coco:PATH".
        split: "train", "val" or "test". Without its split files, Flickr8k keeps every tenth image, by name, for
            the last two; COCO has one part for both.
        image_size: S; if most images are smaller, the median of their short sides is used.
        max_images: number of images to read, the first ones; None reads all.

    Returns:
        Images with at least one caption each, without labels.

    Raises:
        InputError: for an unknown name or split, a missing file, a malformed line of a caption file, no readable image,
            or too little memory.
    """
    kind, _, path = name.partition(":")
    if kind not in CAPTION_SETS or not path:
        hint = suggestion(kind, CAPTION_SETS)
        raise InputError(f"Unknown caption data set {name!r}{hint}; choose flickr8k:PATH or coco:PATH.")
    if split not in SPLITS:
        raise InputError(f"{kind} has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    folder = Path(path).expanduser()
    captions = (flickr8k if kind == "flickr8k" else coco)(folder, split)
    captions = dict(islice(captions.items(), max_images))
    if not captions:
        raise InputError(f"The {split} split of {folder} has no captions; check its caption file.")
    files, images = read_images(list(captions), folder, image_size)
    return Images(images, captions=tuple(tuple(captions[file]) for file in files), name=name)


def flickr8k(folder: Path, split: str) -> dict[Path, list[str]]:
    """List the captions of each image file of a split of Flickr8k. Raises InputError, see `load_captions`."""
    images = _first(folder, "Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
    caption_file = _first(folder, "captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
    captions = _read_table(caption_file) if caption_file.name == "captions.txt" else _read_tokens(caption_file)
    part = f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    if any(caption_file.parent.glob("Flickr_8k.*Images.txt")):  # with one of the files missing, splits would overlap
        names = [name.strip() for _, name in _lines(_first(caption_file.parent, part)) if name.strip()]
    else:
        names = [name for i, name in enumerate(sorted(captions)) if (i % 10 == 9) == (split != "train")]
    return {images / name: captions[name] for name in names if name in captions}


def coco(folder: Path, split: str) -> dict[Path, list[str]]:
    """List the captions of each image file of a split of COCO 2017. Raises InputError, see `load_captions`."""
    part = "train2017" if split == "train" else "val2017"
    caption_file, images = _first(folder, f"annotations/captions_{part}.json"), _first(folder, part)
    try:
        content = json.loads(caption_file.read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"{caption_file} is not UTF-8 text (byte {error.start:,}); download it again.") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{caption_file}, line {error.lineno}: this is not JSON ({error.msg}); download the file again."
        ) from None
    captions: dict[Path, list[str]] = {}
    try:
        files = {image["id"]: images / image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            captions.setdefault(files[annotation["image_id"]], []).append(annotation["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{caption_file} is not a COCO caption file ({error}); download it again.") from None
    return captions


def _read_table(file: Path) -> dict[str, list[str]]:
    """Read captions by image from a table with the header image,caption."""
    captions: dict[str, list[str]] = {}
    rows, line_number = csv.reader((line for _, line in _lines(file)), strict=True), 1
    try:
        for row in rows:
            name, caption = row[0].strip() if row else "", ",".join(row[1:]).strip()  # commas may be unquoted
            if row and (not name or not caption or "\n" in caption):  # an unclosed quote spans lines
                raise csv.Error
            if row and (name, caption) != ("image", "caption"):
                captions.setdefault(name, []).append(caption)
            line_number = rows.line_num + 1
    except csv.Error:
        raise InputError(f"{file}, line {line_number}: expected the name of an image, a comma and a caption.") from None
    return captions


def _read_tokens(file: Path) -> dict[str, list[str]]:
    """Read captions by image from lines of name#number, a tab, and the caption."""
    captions: dict[str, list[str]] = {}
    for number, line in _lines(file):
        match = re.fullmatch(r"(.+)#\d+\t(.*\S)\s*", line)
        if not match and line.strip():
            raise InputError(f"{file}, line {number}: expected image#number, a tab and a caption.")
        if match:
            captions.setdefault(match[1], []).append(match[2].strip())
    return captions


def _lines(file: Path) -> list[tuple[int, str]]:
    """Return the numbered lines of a text file with their line ends. Raises InputError if it is not UTF-8."""
    lines = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        try:
            lines.append((number, line.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError:
            raise InputError(f"{file}, line {number}: this is not UTF-8 text; save the file as UTF-8.") from None
    return lines


def _first(folder: Path, *names: str) -> Path:
    """Return the first of several files or folders that exists. Raises InputError if none does."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give one that holds {' or '.join(names)}.")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise InputError(f"{folder} has no {' or '.join(names)}; restore it.")
