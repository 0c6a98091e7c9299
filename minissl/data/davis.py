"""Real video with masks, in the layout of DAVIS 2017 (Pont-Tuset et al., arXiv:1704.00675).

    JPEGImages/480p/CLIP/00000.jpg      frames; the level 480p may be missing here and in the next
    Annotations/480p/CLIP/00000.png     masks, a palette image whose numbers are the objects
    ImageSets/2017/val.txt              names of clips, one a line, where it is

In DAVIS 2016 the masks are 0 and 255, where 255 is the object; take those of 2017, where it is the void.

Shapes: T frames of H x W pixels.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minissl.data.images import UNREADABLE
from minissl.data.video import Clip
from minissl.errors import InputError

VOID = 255  # in a mask: belongs to nothing, and is not to be scored


def list_clips(root: Path, split: str | None = None) -> list[str]:
    """The names of the clips under `root`, in the order of the list of a split, or all by name.

    Args:
        root: the folder that holds JPEGImages and Annotations.
        split: the name of a list in ImageSets/2017, or else in another folder of ImageSets, such as "train" or "val".

    Raises:
        InputError: if there is no folder of frames, no such list, or no clip in it.
    """
    frames = _level(root, "JPEGImages")
    if split is None:
        source, names = frames, sorted(folder.name for folder in frames.iterdir() if folder.is_dir())
    else:
        source = _split_file(Path(root) / "ImageSets", split)
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{source} is no text in UTF-8; it should name a clip a line.") from None
        names = list(dict.fromkeys(_clip_of(line.split()[0]) for line in lines if line.strip()))
    if not names:
        raise InputError(f"{source} holds no clips.")
    return names


def load_clip(root: Path, name: str, size: int | None = None) -> Clip:
    """A clip with a mask for each frame.

    Args:
        root: the folder that holds JPEGImages and Annotations.
        name: the clip's.
        size: pixels of the short side; nothing is cut off. The files' own if None.

    Returns:
        frames (T, 3, H, W) uint8, and masks (T, H, W) uint8 with 0 for the background, the number of an object, the
        same in all frames, or VOID.

    Raises:
        InputError: for a clip, a frame's mask or a folder that is missing or cannot be read; a mask of another size
            than its frame; frames of different sizes.
    """
    folder, masks = (_level(root, part) / name for part in ("JPEGImages", "Annotations"))
    for part in (folder, masks):
        if not part.is_dir():
            raise InputError(f"There is no folder {part}.")
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise InputError(f"{folder} holds no frames (00000.jpg and so on).")
    pairs = [_read_pair(file, masks / f"{file.stem}.png", size) for file in files]
    odd = next((file for file, (frame, _) in zip(files, pairs) if frame.shape != pairs[0][0].shape), None)
    if odd:
        raise InputError(f"{odd} is of another size than {files[0]}; the frames of a clip are of one.")
    return Clip(*(torch.stack(part) for part in zip(*pairs)))


def _split_file(lists: Path, split: str) -> Path:
    """ImageSets/2017/SPLIT.txt, or the first other by name. Raises InputError if there is none."""
    found = [lists / "2017" / f"{split}.txt", *sorted(lists.glob(f"*/{split}.txt"))]
    for file in found:
        if file.is_file():
            return file
    raise InputError(f"There is no list {found[0]}; leave the split out to take all clips.")


def _clip_of(entry: str) -> str:
    """The clip of an entry of a list: a name, or as in 2016 a frame, /JPEGImages/480p/CLIP/00000.jpg."""
    path = PurePosixPath(entry)
    return path.parent.name if path.suffix else path.name


def _level(root: Path, part: str) -> Path:
    """JPEGImages/480p or JPEGImages. Raises InputError if neither is there."""
    for folder in (Path(root) / part / "480p", Path(root) / part):
        if folder.is_dir():
            return folder
    raise InputError(f"There is no folder {folder}; a DAVIS folder holds JPEGImages and Annotations.")


def _read_pair(file: Path, mask_file: Path, size: int | None) -> tuple[Tensor, Tensor]:
    """A frame (3, H, W) and its mask (H, W), both uint8. Raises InputError."""
    frame, mask = _open(file), _open(mask_file)
    if mask.mode not in ("P", "L"):
        raise InputError(f"The mask {mask_file} holds colours, not numbers of objects; a palette image is needed.")
    if mask.size != frame.size:
        raise InputError(f"The mask {mask_file} is {_by(mask)} pixels and its frame is {_by(frame)}.")
    scale = 1 if size is None else size / min(frame.size)
    wanted = tuple(max(round(scale * side), 1) for side in frame.size)
    frame = frame.convert("RGB").resize(wanted, Image.Resampling.BICUBIC)
    mask = mask.resize(wanted, Image.Resampling.NEAREST)  # a number between two objects is a third one
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1), torch.from_numpy(np.array(mask))


def _open(file: Path) -> Image.Image:
    """An image, decoded. Raises InputError."""
    if not file.is_file():
        raise InputError(f"There is no {file}; each frame needs a mask of the same name.")
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except UNREADABLE:
        raise InputError(f"{file} cannot be read as an image.") from None


def _by(image: Image.Image) -> str:
    return " x ".join(str(side) for side in image.size)
