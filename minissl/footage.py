"""Clip after clip: encode the frames, follow the objects of the first one, say how well and how fast.

The clips are a folder's in the layout of DAVIS, or drawn. Shapes: T frames of H x W pixels.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minissl import checkpoint, pretrained
from minissl.data.davis import VOID, list_clips, load_clip
from minissl.data.video import Clip, Clips
from minissl.encoders import Pixels
from minissl.errors import InputError
from minissl.evaluate import follow, frame_patches, j_and_f, patch_of
from minissl.evaluate.track import check_options
from minissl.machine import choose_device, wait_for

DRAWN = "clips"  # in place of a folder


def track(
    encoder: str,
    folder: str,
    *,
    split: str | None = None,
    size: int | None = None,
    count: int | None = None,
    frames: int | None = None,
    patch_size: int = 8,
    context: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    device: str | None = None,
    out: Path | None = None,
) -> dict:
    """Follow the objects of the first frame through clips, and measure it as DAVIS does.

    Args:
        encoder: a run's folder, an exported file, a name as in scenes/dino, or pixels, for no network at all.
        folder: of clips in the layout of DAVIS, or clips, for 20 that are drawn.
        split: the folder's list of clips, as in val; all clips if not given; of drawn ones train, val or test.
        size: pixels of the short side the encoder sees, rounded up to whole patches; 480 if not given, drawn ones 128.
        count: no more clips than so many, the first ones.
        frames: no more frames of a clip than so many, the first ones; drawn ones have 24 if not given.
        patch_size: of pixels; an encoder has its own.
        context: frames asked besides the first, the last so many.
        radius: how far a patch may have come, in patches.
        topk: how many patches a patch believes.
        temperature: lower listens more to the most similar.
        device: cuda, mps or cpu; chosen if not given.
        out: a folder for the masks that were found, as DAVIS stores them, and metrics.json.

    Returns:
        What metrics.json holds: "J", "F" and "J&F", means over the objects of all clips; and "clips", each one's.

    Raises:
        InputError: for an encoder, a folder or a clip that is not there or cannot be read, or options out of range.
    """
    check_options(context, radius, topk, temperature, "circle", "nearest")
    _check(size=(size, 1), count=(count, 1), frames=(frames, 3), patch_size=(patch_size, 1))
    network = (Pixels(patch_size) if encoder == "pixels" else pretrained.load(encoder)).to(choose_device(device))
    patch, wanted = patch_of(network), size or (128 if folder == DRAWN else 480)
    rows, options = {}, {"context": context, "radius": radius, "topk": topk, "temperature": temperature}
    _check_out(out)
    clips = _clips(folder, split, -(-wanted // patch) * patch, count, frames)
    print(f"{'clip':24}{'J':>7}{'F':>7}{'J&F':>7}{'frames/s':>10}", flush=True)
    for name, clip in _measurable(clips):
        found, speed = _follow(network, clip, fitting(clip.frames.shape[-2:], wanted, patch), options)
        rows[name] = j_and_f(found, clip.masks, VOID) | {"frames_per_second": speed, "frames": len(found)}
        print(_line(name, rows[name]), flush=True)
        if out is not None:
            _write_masks(out / name, found)
    if not rows:
        raise InputError(f"No clip of {folder} shows an object in its first frame and has two more frames.")
    means = _mean(rows)
    print(_line("mean", means))
    asked = {"encoder": encoder, "data": folder, "split": split, "size": wanted, "patch": patch} | options
    if out is not None:
        checkpoint.write_json(out / "metrics.json", asked | means | {"clips": rows})
        print(f"Written: {out}")
    return asked | means | {"clips": rows}


def fitting(shape: tuple[int, int], size: int, patch: int) -> tuple[int, int]:
    """Height and width of a frame that is brought to `size` pixels on the short side; both rounded up to patches."""
    return tuple(-(-side * size // (min(shape) * patch)) * patch for side in shape)


def _check_out(out: Path | None) -> None:
    """Raises InputError for a file, and for the folder of a run."""
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out.")
    if out is not None:
        checkpoint.keep_off(out)


def _check(**options: tuple[int | None, int]) -> None:
    """Raises InputError for an option (value, least) that is too small."""
    for name, (value, least) in options.items():
        if value is not None and value < least:
            raise InputError(f"--{name} {value} is too small; give {least} or more.")


def _clips(folder: str, split: str | None, size: int, count: int | None, frames: int | None) -> Iterator:
    """Names and clips, each read or drawn when it is asked for; the list is there at once, or InputError."""
    if folder == DRAWN:
        drawn = Clips(split or "test", size, frames or 24, count or 20)
        return ((f"{i:05}", drawn[i]) for i in range(len(drawn)))
    names = list_clips(Path(folder), split)[:count]
    return ((name, Clip(*(part[:frames] for part in load_clip(Path(folder), name)))) for name in names)


def _measurable(clips: Iterator) -> Iterator:
    """Those in which an object is there to be followed; the others are named and left out."""
    for name, clip in clips:
        if len(clip.frames) > 2 and ((clip.masks[0] > 0) & (clip.masks[0] != VOID)).any():
            yield name, clip
        else:
            print(f"{name:24}left out: its first frame shows no object, or fewer than two frames follow", flush=True)


def _follow(network: nn.Module, clip: Clip, size: tuple[int, int], options: dict) -> tuple[Tensor, float]:
    """The masks that were found (T, H, W), and frames a second, encoding included."""
    device = next(iter(network.parameters()), torch.empty(0)).device
    first = clip.masks[0].masked_fill(clip.masks[0] == VOID, 0).to(device)
    begin = time.perf_counter()
    found = torch.stack(list(follow(frame_patches(network, clip.frames.to(device), size), first, **options)))
    wait_for(device)
    return found.cpu(), len(found) / (time.perf_counter() - begin)


def _mean(rows: dict[str, dict]) -> dict[str, float]:
    """As DAVIS has it, over all objects alike; speed over all frames."""
    objects = [of for row in rows.values() for of in row["objects"].values()]
    means = {name: sum(of[name] for of in objects) / len(objects) for name in ("J", "F", "J&F")}
    seconds = sum(row["frames"] / row["frames_per_second"] for row in rows.values())
    return means | {"frames_per_second": sum(row["frames"] for row in rows.values()) / seconds}


def _line(name: str, row: dict[str, float]) -> str:
    scores = "".join(f"{100 * row[key]:7.1f}" for key in ("J", "F", "J&F"))
    return f"{name:24}{scores}{row['frames_per_second']:10.2f}"


def _write_masks(folder: Path, masks: Tensor) -> None:
    """Palette images 00000.png and so on. Raises InputError if they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for t, mask in enumerate(masks.byte().numpy()):
            image = Image.fromarray(mask)
            image.putpalette(palette())
            image.save(folder / f"{t:05}.png")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from None


def palette() -> list[int]:
    """The colours of DAVIS and PASCAL VOC, 256 x 3: the bits of a number, dealt in turn to red, green and blue."""
    numbers, colors = np.arange(256), np.zeros((256, 3), dtype=int)
    for bit in range(8):
        colors[:, bit % 3] |= (numbers >> bit & 1) << (7 - bit // 3)
    return colors.flatten().tolist()
