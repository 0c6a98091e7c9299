"""Real videos with masks, in the layout of DAVIS 2017 (Pont-Tuset et al., 2017, arXiv:1704.00675).

    JPEGImages/480p/CLIP/00000.jpg      frames; the folder 480p is optional here and below
    Annotations/480p/CLIP/00000.png     masks, palette images whose values are the numbers of the objects
    ImageSets/2017/val.txt              optional: names of clips, one per line

Use the masks of DAVIS 2017, where 255 is void. In DAVIS 2016 it is the object.

Shapes: T frames of H x W pixels.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minissl.data.images import UNREADABLE
from minissl.data.synthetic.clips import Clip
from minissl.errors import InputError

VOID = 255  # in a mask: pixels that are ignored in the evaluation


def list_clips(root: Path, split: str | None = None) -> list[str]:
    """Return the names of the clips of a split, in the order of its list; of all clips, sorted, without a split.

    Args:
        root: folder that holds JPEGImages and Annotations.
        split: name of a list, such as "train" or "val", in ImageSets/2017 or another folder of ImageSets.

    Raises:
        InputError: if there is no folder of frames or no such list, or if it is empty.
    """
    frames = _subfolder(root, "JPEGImages")
    if split is None:
        source, names = frames, sorted(folder.name for folder in frames.iterdir() if folder.is_dir())
    else:
        source = _split_file(Path(root) / "ImageSets", split)
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{source} is not UTF-8 text; write one name of a clip per line.") from None
        names = list(dict.fromkeys(_clip_name(line.split()[0]) for line in lines if line.strip()))
    if not names:
        raise InputError(f"{source} holds no clips; add one folder of frames (in a list: one line) per clip.")
    return names


def load_clip(root: Path, name: str, size: int | None = None) -> Clip:
    """Load a clip with a mask for each frame.

    Args:
        root: folder that holds JPEGImages and Annotations.
        name: name of the clip.
        size: pixels of the short side, without cropping; None keeps the size of the files.

    Returns:
        Frames (T, 3, H, W) uint8 and masks (T, H, W) uint8: 0 on the background, the number of an object, which is the
        same in all frames, or VOID.

    Raises:
        InputError: if a folder, frame or mask is missing or cannot be read, a mask differs in size from its frame, or
            frames differ in size.
    """
    folder, masks = (_subfolder(root, part) / name for part in ("JPEGImages", "Annotations"))
    for part in (folder, masks):
        if not part.is_dir():
            raise InputError(f"There is no folder {part}; a clip needs frames in JPEGImages and masks in Annotations.")
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise InputError(f"{folder} holds no frames; add 00000.jpg, 00001.jpg and so on.")
    pairs = [_read_pair(file, masks / f"{file.stem}.png", size) for file in files]
    for file, (frame, _) in zip(files, pairs):
        if frame.shape != pairs[0][0].shape:
            raise InputError(f"{file} differs in size from {files[0]}; all frames of a clip need the same size.")
    return Clip(*(torch.stack(part) for part in zip(*pairs)))


def _split_file(lists: Path, split: str) -> Path:
    """Return ImageSets/2017/SPLIT.txt, or the first one of another folder. Raises InputError if there is none."""
    candidates = [lists / "2017" / f"{split}.txt", *sorted(lists.glob(f"*/{split}.txt"))]
    for file in candidates:
        if file.is_file():
            return file
    raise InputError(f"There is no list {candidates[0]}; leave the split out to use all clips.")


def _clip_name(entry: str) -> str:
    """Return the clip of an entry of a list: a name, or, as in 2016, a frame /JPEGImages/480p/CLIP/00000.jpg."""
    path = PurePosixPath(entry)
    return path.parent.name if path.suffix else path.name


def _subfolder(root: Path, part: str) -> Path:
    """Return `root`/`part`/480p or `root`/`part`. Raises InputError if neither exists."""
    for folder in (Path(root) / part / "480p", Path(root) / part):
        if folder.is_dir():
            return folder
    raise InputError(f"There is no folder {folder}; a DAVIS folder holds JPEGImages and Annotations.")


def _read_pair(file: Path, mask_file: Path, size: int | None) -> tuple[Tensor, Tensor]:
    """Read a frame (3, H, W) and its mask (H, W), both uint8. Raises InputError."""
    frame, mask = _open(file), _open(mask_file)
    if mask.mode not in ("P", "L"):
        raise InputError(f"The mask {mask_file} holds colors, not numbers of objects; save it as a palette image.")
    if mask.size != frame.size:
        raise InputError(
            f"The mask {mask_file} has {_size(mask)} pixels, but its frame has {_size(frame)}; resize one of them."
        )
    scale = 1 if size is None else size / min(frame.size)
    width, height = (max(round(scale * side), 1) for side in frame.size)
    frame = frame.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    mask = mask.resize((width, height), Image.Resampling.NEAREST)  # interpolation would mix object numbers
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1), torch.from_numpy(np.array(mask))


def _open(file: Path) -> Image.Image:
    """Open and decode an image. Raises InputError."""
    if not file.is_file():
        raise InputError(f"There is no file {file}; each frame needs a mask of the same name.")
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except UNREADABLE:
        raise InputError(f"{file} cannot be read as an image; restore it.") from None


def _size(image: Image.Image) -> str:
    return " x ".join(str(side) for side in image.size)
