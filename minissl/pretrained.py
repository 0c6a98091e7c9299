"""Networks that were trained before: a run's folder, the file it exports, the project's own in data/checkpoints, or one
of the official DINO, DINOv2, DINOv3 and CLIP, from a file (`official`; CLIP with its words, `official_clip`).

An exported file is safetensors; its header says what it holds, so that it loads by itself.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl import checkpoint, official, official_clip
from minissl.encoders import make_encoder
from minissl.errors import InputError
from minissl.method import find

OWN = Path(__file__).parent.parent / "data" / "checkpoints"


def save(encoder: nn.Module, choices: dict, path: Path) -> None:
    """Export an encoder with the arguments of `make_encoder` that make it."""
    checkpoint.save_tensors(path, encoder.state_dict(), {"encoder": choices | {"weights": "none"}})


def save_method(method: nn.Module, name: str, options: dict[str, Any], choices: dict, path: Path) -> None:
    """Export a whole method, in half precision, with what makes it: its name, its options and its encoder's."""
    tensors = {key: t.half() if t.is_floating_point() else t for key, t in method.state_dict().items()}
    info = {"method": name, "options": options, "encoder": choices | {"weights": "none"}}
    checkpoint.save_tensors(path, tensors, info)


def load(name_or_path: str | Path, path: str | Path | None = None) -> nn.Module:
    """An encoder in evaluation mode, without gradients.

    Args:
        name_or_path: a run's folder, an exported file, one of the project's own, as in "scenes/clip", one of
            `official.NAMES`, as "dinov2_vits14", or a file of such a one.
        path: where the file of an official one is.

    Raises:
        InputError: if there is no such encoder, or the file is broken.
    """
    if name_or_path in official.NAMES:
        if path is None:
            raise official.ask_for(name_or_path)
        return official.load(path, name_or_path)
    if Path(name_or_path).is_file() and not checkpoint.is_ours(Path(name_or_path)):
        return official.load(name_or_path)
    tensors, info = _read(name_or_path)
    if "method" in info:
        return load_method(name_or_path).encoder
    if "encoder" not in info:
        raise InputError(f"{name_or_path} holds no encoder; give a run's folder or its encoder.safetensors.")
    encoder = make_encoder(**info["encoder"])
    encoder.load_state_dict(tensors)
    return encoder.eval().requires_grad_(False)


def load_method(
    name_or_path: str | Path, path: str | Path | None = None, merges: str | Path | None = None
) -> nn.Module:
    """A whole method, with its other networks, in evaluation mode, without gradients.

    Args:
        name_or_path: what `save_method` wrote, one of the project's own, the official CLIP as "clip_vitb32", or a file
            of all of it.
        path: where the file of an official one is.
        merges: what CLIP's words are made of, one of `official_clip.MERGES` or its folder; None: beside the weights.

    Raises:
        InputError: if there is no such file, or it holds an encoder only.
    """
    if name_or_path in official.NAMES:
        if path is None:
            raise official.ask_for(name_or_path, "load_method")
        return official_clip.load(path, merges, name_or_path)
    if Path(name_or_path).is_file() and not checkpoint.is_ours(Path(name_or_path)):
        return official_clip.load(name_or_path, merges)
    tensors, info = _read(name_or_path)
    if "method" not in info:
        raise InputError(f"{name_or_path} holds no method; write one with: python -m minissl export DIR FILE")
    method = find(info["method"])(make_encoder(**info["encoder"]), **info["options"])
    method.load_state_dict(tensors)
    return method.eval().requires_grad_(False)


def begin_from(folder: Path, method: nn.Module) -> None:
    """Put the whole state of another run into a method, as a start: teacher, heads and all.

    Sizes of crops may differ, as for a last phase at high resolution: learned positions are resampled to the new grid.
    A part that this method does without, as the head of a loss whose weight is now 0, is left where it is.

    Raises:
        InputError: if the run is of another method or another encoder.
    """
    tensors, _ = checkpoint.load_newest(folder / "checkpoint.safetensors")
    state = {name.removeprefix("method."): t for name, t in tensors.items() if name.startswith("method.")}
    _fit(state, method.state_dict())
    try:
        missing, left = method.load_state_dict(state, strict=False)
        fits = not missing and not any("encoder." in name for name in left)  # of an encoder, nothing may be left
    except RuntimeError:  # the same names, but other shapes
        fits = False
    if not fits:
        raise InputError(
            f"{folder} holds another method or another encoder; give the options it was trained with, "
            "of which only sizes, rates and weights of terms may differ."
        )


def put(encoder: nn.Module, name_or_path: str | Path) -> None:
    """Give an encoder the weights of one that `load` knows, to go on from; learned positions are fitted to its grid.

    Raises:
        InputError: if it is an encoder of another kind.
    """
    state = load(name_or_path).state_dict()
    _fit(state, encoder.state_dict())
    try:
        encoder.load_state_dict(state)
    except RuntimeError:
        raise InputError(
            f"{name_or_path} holds another encoder; give the --encoder options it was trained with."
        ) from None


def _fit(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Learned positions of one grid for another, in place."""
    for name, own in wanted.items():
        if name.endswith("pos_embed") and name in state and state[name].shape != own.shape:
            side, new = (math.isqrt(x.shape[1] - 1) for x in (state[name], own))
            grid = state[name][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
            grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=new < side)
            state[name] = torch.cat([state[name][:, :1], grid.flatten(2).mT], dim=1)


def _read(name_or_path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    elif str(name_or_path).startswith("scenes/") and not path.exists():
        path = OWN / f"{path.name}.safetensors"
        if not path.exists():
            own = ", ".join(f"scenes/{file.stem}" for file in sorted(OWN.glob("*.safetensors")))
            raise InputError(f"There is no checkpoint {name_or_path}; the project's own are {own}.")
    tensors, info = checkpoint.load_tensors(path)
    return {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}, info
