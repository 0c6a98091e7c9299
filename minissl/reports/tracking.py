"""Track objects through clips: propagate the first frame's mask, and measure J, F and the speed.

The clips are a folder's in the layout of DAVIS, or synthetic. Pont-Tuset et al., The 2017 DAVIS Challenge on Video
Object Segmentation, 2017 (arXiv:1704.00675).

Shapes: T frames of H x W pixels.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minissl.data.davis import VOID, list_clips, load_clip
from minissl.data.synthetic.clips import Clip, Clips
from minissl.errors import InputError
from minissl.evaluation import frame_patch_features, j_and_f, propagate_stream
from minissl.evaluation.label_propagation import check_propagation_options
from minissl.hub import pretrained
from minissl.models.factory import PixelEncoder
from minissl.models.outputs import Encoder
from minissl.training import checkpoint
from minissl.training.device import choose_device, synchronize

SYNTHETIC = "clips"  # in place of a folder
SIZES = {True: 128, False: 480}  # default short side in pixels of synthetic clips and of a folder's
MIN_FRAMES = 3


def track_clips(
    encoder: str,
    folder: str,
    *,
    split: str | None = None,
    image_size: int | None = None,
    num_clips: int | None = None,
    num_frames: int | None = None,
    patch_size: int = 8,
    context: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    device: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Track the objects of the first frame through clips, and evaluate the masks with the DAVIS metrics.

    Args:
        encoder: a run's folder, an exported file, a name such as scenes/dino, or pixels for raw patches.
        folder: clips in the layout of DAVIS, or clips for 20 synthetic ones.
        split: list of clips in the folder, such as val, by default all clips; of synthetic ones train, val or test.
        image_size: short side in pixels that the encoder sees, rounded up to whole patches; default 480, synthetic 128.
        num_clips: use at most this many clips, the first ones.
        num_frames: use at most this many frames of a clip, the first ones; synthetic clips have 24 by default.
        patch_size: patch size in pixels of the encoder pixels; another encoder has its own.
        context: number of most recent frames that labels come from, besides the first frame.
        radius: largest distance in patches between a patch and the patches that its labels come from.
        topk: number of most similar patches whose labels are averaged.
        temperature: of the softmax over cosine similarities; a lower one weights the most similar patches more.
        device: cuda, mps or cpu; by default the fastest that is available.
        out: folder for the predicted masks in the format of DAVIS, and metrics.json.

    Returns:
        The content of metrics.json: the options; "J", "F" and "J&F" in [0, 1], means over the objects of all clips;
        "frames_per_second"; and "clips", the same of each clip.

    Raises:
        InputError: if an encoder, a folder or a clip is missing or cannot be read, or an option is out of range.
    """
    check_propagation_options(context, radius, topk, temperature, "circle", "nearest")
    _check_minimum(image_size=(image_size, 1), num_clips=(num_clips, 1), patch_size=(patch_size, 1))
    _check_minimum(num_frames=(num_frames, MIN_FRAMES))
    network = PixelEncoder(patch_size) if encoder == "pixels" else pretrained.load_encoder(encoder)
    network = network.to(choose_device(device))
    patch_size, image_size = network.patch_size, image_size or SIZES[folder == SYNTHETIC]
    _check_output_dir(out)
    clips = _load_clips(folder, split, -(-image_size // patch_size) * patch_size, num_clips, num_frames)
    options = {"context": context, "radius": radius, "topk": topk, "temperature": temperature}
    rows = _track_all(network, clips, image_size, options, out)
    if not rows:
        raise InputError(f"No clip of {folder} has an object in its first frame and at least {MIN_FRAMES} frames.")
    metrics: dict[str, Any] = {"encoder": encoder, "data": folder, "split": split}
    metrics |= {"image_size": image_size, "patch_size": patch_size} | options | _mean(rows)
    print(_table_row("mean", metrics))
    metrics["clips"] = rows
    if out is not None:
        checkpoint.write_json(out / "metrics.json", metrics)
        print(f"Written: {out}")
    return metrics


def _track_all(
    network: Encoder, clips: Iterator[tuple[str, Clip]], image_size: int, options: dict[str, Any], out: Path | None
) -> dict[str, dict[str, Any]]:
    """Track and evaluate each clip, print its row of the table and write its masks. Returns metrics by clip."""
    print(f"{'clip':24}{'J (%)':>7}{'F (%)':>7}{'J&F':>7}{'frames/s':>10}", flush=True)
    rows = {}
    for name, clip in _clips_with_objects(clips):
        height, width = clip.frames.shape[-2:]
        masks, speed = _track_clip(
            network, clip, encoder_size((height, width), image_size, network.patch_size), options
        )
        rows[name] = j_and_f(masks, clip.masks, VOID) | {"frames_per_second": speed, "frames": len(masks)}
        print(_table_row(name, rows[name]), flush=True)
        if out is not None:
            _write_masks(out / name, masks)
    return rows


def encoder_size(shape: tuple[int, int], size: int, patch: int) -> tuple[int, int]:
    """Return height and width of a frame (H, W) resized to `size` pixels on its short side, in whole patches."""
    height, width = (-(-side * size // (min(shape) * patch)) * patch for side in shape)
    return height, width


def _check_output_dir(out: Path | None) -> None:
    """Raise InputError for a file, and for the folder of a run."""
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a folder.")
    if out is not None:
        checkpoint.refuse_run_dir(out)


def _check_minimum(**options: tuple[int | None, int]) -> None:
    """Raise InputError for an option (value, minimum) that is too small."""
    for name, (value, minimum) in options.items():
        if value is not None and value < minimum:
            raise InputError(f"--{name} {value} is too small; give {minimum} or more.")


def _load_clips(
    folder: str, split: str | None, size: int, num_clips: int | None, num_frames: int | None
) -> Iterator[tuple[str, Clip]]:
    """List the clips now; read or render each when the iterator reaches it.

    Raises:
        InputError: if the folder or the split does not exist.
    """
    if folder == SYNTHETIC:
        clips = Clips(split or "test", size, num_frames or 24, num_clips or 20)
        return ((f"{i:05}", clips[i]) for i in range(len(clips)))
    names = list_clips(Path(folder), split)[:num_clips]
    return ((name, Clip(*(part[:num_frames] for part in load_clip(Path(folder), name)))) for name in names)


def _clips_with_objects(clips: Iterator[tuple[str, Clip]]) -> Iterator[tuple[str, Clip]]:
    """Yield the clips that have an object in the first frame and enough frames; print the names of the others."""
    for name, clip in clips:
        if len(clip.frames) >= MIN_FRAMES and ((clip.masks[0] > 0) & (clip.masks[0] != VOID)).any():
            yield name, clip
        else:
            print(f"{name:24}skipped: no object in its first frame, or fewer than {MIN_FRAMES} frames", flush=True)


def _track_clip(network: Encoder, clip: Clip, size: tuple[int, int], options: dict[str, Any]) -> tuple[Tensor, float]:
    """Return the predicted masks (T, H, W), and the speed in frames a second, encoding included."""
    device = next(network.parameters(), torch.empty(0)).device
    first_mask = clip.masks[0].masked_fill(clip.masks[0] == VOID, 0).to(device)
    start = time.perf_counter()
    features = frame_patch_features(network, clip.frames.to(device), size)
    masks = torch.stack(list(propagate_stream(features, first_mask, **options)))
    synchronize(device)
    return masks.cpu(), len(masks) / (time.perf_counter() - start)


def _mean(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Average J, F and J&F over the objects of all clips, as DAVIS does, and the speed over all frames."""
    objects = [metrics for row in rows.values() for metrics in row["objects"].values()]
    means = {name: sum(metrics[name] for metrics in objects) / len(objects) for name in ("J", "F", "J&F")}
    seconds = sum(row["frames"] / row["frames_per_second"] for row in rows.values())
    return means | {"frames_per_second": sum(row["frames"] for row in rows.values()) / seconds}


def _table_row(name: str, metrics: dict[str, Any]) -> str:
    percentages = "".join(f"{100 * metrics[key]:7.1f}" for key in ("J", "F", "J&F"))
    return f"{name:24}{percentages}{metrics['frames_per_second']:10.2f}"


def _write_masks(folder: Path, masks: Tensor) -> None:
    """Write masks (T, H, W) as palette images 00000.png, ... Raises InputError if they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for t, mask in enumerate(masks.byte().numpy()):
            image = Image.fromarray(mask)
            image.putpalette(palette())
            image.save(folder / f"{t:05}.png")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from None


def palette() -> list[int]:
    """Return the 256 colors of DAVIS and PASCAL VOC, flat: an index's bits go to red, green and blue in turn."""
    indices, colors = np.arange(256), np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        colors[:, bit % 3] |= (indices >> bit & 1) << (7 - bit // 3)
    flat: list[int] = colors.flatten().tolist()
    return flat
