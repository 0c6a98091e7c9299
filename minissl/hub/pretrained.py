"""Load and save trained encoders and methods.

An encoder comes from a run's folder, a file exported from a run, the checkpoints shipped with minissl, an official file
of DINO, DINOv2, DINOv3 or CLIP (`hub.official`, `hub.openai_clip`), or from timm. Exported files are safetensors; the
header holds the arguments that build the network again. Loading a file never executes anything in it.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.errors import InputError, suggestion
from minissl.hub import official, openai_clip
from minissl.methods import list_methods
from minissl.methods.base import Method
from minissl.methods.registry import create_method
from minissl.models.factory import create_encoder
from minissl.models.outputs import Encoder
from minissl.models.wrappers import timm_image_size
from minissl.training import checkpoint

CHECKPOINT_DIR = Path(__file__).parents[2] / "data" / "checkpoints"


def save_encoder(encoder: Encoder, path: Path, config: dict[str, Any] | None = None) -> None:
    """Write an encoder to a file that `load_encoder` reads.

    Args:
        encoder: made by `create_encoder`, or a copy of such a one.
        path: a safetensors file.
        config: arguments of `create_encoder`; None takes `encoder.config`.

    Raises:
        InputError: if no config is known, or the file cannot be written.
    """
    checkpoint.save_tensors(path, encoder.state_dict(), {"encoder": _encoder_config(encoder, config)})


def save_method(method: Method, path: Path) -> None:
    """Write a whole method, in half precision, to a file that `load_method` reads.

    Args:
        method: made by `create_method` around an encoder made by `create_encoder`.
        path: a safetensors file.

    Raises:
        InputError: if the method is not one of `list_methods()`, or the file cannot be written.
    """
    name = method.config["name"] if method.config else type(method).__name__
    if method.config is None or name not in list_methods():
        raise InputError(
            f"The method {name} is not part of minissl, so that a file could not build it again; save its encoder with "
            "save_encoder, or its state with training.checkpoint.save_tensors."
        )
    tensors = {key: t.half() if t.is_floating_point() else t for key, t in method.state_dict().items()}
    info = {"method": name, "options": method.config["options"], "encoder": _encoder_config(method.encoder)}
    checkpoint.save_tensors(path, tensors, info)


def load_encoder(name_or_path: str | Path, path: str | Path | None = None) -> Encoder:
    """Load a trained encoder, in evaluation mode and without gradients.

    Args:
        name_or_path: a run's folder; an exported file; a checkpoint shipped with minissl, such as "scenes/clip"; one of
            `official.OFFICIAL_ENCODERS`, such as "dinov2_vits14", or a file of one; or "timm:NAME".
        path: file of an official encoder, or of a timm model in timm's format. Without it, official encoders are not
            loaded, and timm downloads its weights once.

    Raises:
        InputError: if there is no such encoder, or the file is damaged.
    """
    name = str(name_or_path)
    if name in official.OFFICIAL_ENCODERS:
        if path is None:
            raise official.missing_weights_error(name, "load_encoder")
        return official.load_official(path, name)
    if name.startswith("timm:"):
        return _load_timm(name, path)
    if path is not None:
        raise InputError(f"A path is for official encoders and timm:NAME only, not for {name}; leave it out.")
    if Path(name).is_file() and not checkpoint.is_minissl_file(Path(name)):
        return official.load_official(name)
    tensors, info = _read(name)
    if "method" in info:
        return _build_method(name, tensors, info).encoder
    if "encoder" not in info:
        raise InputError(f"{name} holds no encoder; give a run's folder or its encoder.safetensors.")
    encoder = _build_encoder(name, info)
    _load_state(name, encoder, tensors)
    return encoder.eval().requires_grad_(False)


def load_method(name_or_path: str | Path, path: str | Path | None = None, merges: str | Path | None = None) -> Method:
    """Load a whole method, with heads, teacher and text encoder, in evaluation mode and without gradients.

    Args:
        name_or_path: an exported file; a checkpoint shipped with minissl, such as "scenes/clip"; an official CLIP, such
            as "clip_vitb32"; or a file of one.
        path: file of an official CLIP.
        merges: file of CLIP's tokenizer, one of `openai_clip.MERGES_FILES`, or its folder; None: beside the weights.

    Raises:
        InputError: if there is no such file, or it holds an encoder only.
    """
    name = str(name_or_path)
    if name in official.OFFICIAL_ENCODERS:
        if path is None:
            raise official.missing_weights_error(name, "load_method")
        return openai_clip.load_openai_clip(path, merges, name)
    if path is not None:
        raise InputError(f"A path is for official encoders only, not for {name}; leave it out.")
    if Path(name).is_file() and not checkpoint.is_minissl_file(Path(name)):
        return openai_clip.load_openai_clip(name, merges)
    tensors, info = _read(name)
    if "method" not in info:
        raise InputError(f"{name} holds no method; write a file that does with: minissl export DIR FILE.safetensors")
    return _build_method(name, tensors, info)


def init_from_run(folder: Path, method: Method) -> None:
    """Initialize a method with the whole state of another run, teacher and heads included.

    Crop sizes may differ, as in a final phase at high resolution: learned position embeddings are resampled to the new
    grid. Modules that this method lacks, such as the head of a loss term with weight 0, are ignored.

    Args:
        folder: of a run; its last checkpoint is used.
        method: changed in place.

    Raises:
        InputError: if the run is of another method or another encoder.
    """
    tensors, _ = checkpoint.load_latest_tensors(folder / "checkpoint.safetensors")
    state = {name.removeprefix("method."): t for name, t in tensors.items() if name.startswith("method.")}
    _resize_pos_embeds(state, method.state_dict())
    try:
        missing, unexpected = method.load_state_dict(state, strict=False)
        fits = not missing and not any("encoder." in name for name in unexpected)  # an encoder must fit completely
    except RuntimeError:  # the same names with other shapes
        fits = False
    if not fits:
        raise InputError(
            f"{folder} holds another method or another encoder; give the options it was trained with, "
            "of which only sizes, rates and loss weights may differ."
        )


def load_weights(encoder: Encoder, name_or_path: str | Path) -> None:
    """Initialize an encoder with the weights of one that `load_encoder` knows; position embeddings are resampled.

    Args:
        encoder: changed in place.
        name_or_path: as for `load_encoder`.

    Raises:
        InputError: if there is no such encoder, or it has another architecture.
    """
    state = load_encoder(name_or_path).state_dict()
    _resize_pos_embeds(state, encoder.state_dict())
    try:
        encoder.load_state_dict(state)
    except RuntimeError:
        raise InputError(
            f"{name_or_path} holds another encoder; give the --encoder options it was trained with."
        ) from None


def _resize_pos_embeds(state: dict[str, Tensor], target_state: dict[str, Tensor]) -> None:
    """Interpolate learned position embeddings to the grid of `target_state`, in place."""
    for name, target in target_state.items():
        if name.endswith("pos_embed") and name in state and state[name].shape != target.shape:
            side, new = (math.isqrt(x.shape[1] - 1) for x in (state[name], target))
            grid = state[name][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
            grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=new < side)
            state[name] = torch.cat([state[name][:, :1], grid.flatten(2).mT], dim=1)


def _encoder_config(encoder: Encoder, config: dict[str, Any] | None = None) -> dict[str, Any]:
    config = config or encoder.config
    if config is None:
        raise InputError(
            f"This {type(encoder).__name__} was not made by create_encoder, so that a file could not build it again; "
            "build it with create_encoder, or save its state with torch.save."
        )
    return config | {"weights": "none"}


def _read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, in single precision, and the header of a run's folder, a file, or a shipped checkpoint."""
    path = Path(name)
    if path.is_dir():
        path = path / "encoder.safetensors"
    elif name.startswith("scenes/") and not path.exists():
        path = CHECKPOINT_DIR / f"{path.name}.safetensors"
    if not path.exists():
        shipped = [f"scenes/{file.stem}" for file in sorted(CHECKPOINT_DIR.glob("*.safetensors"))]
        hint = suggestion(name, [*shipped, *official.OFFICIAL_ENCODERS])
        raise InputError(
            f"There is no checkpoint {name}{hint}; give a run's folder, an exported file, an official encoder, "
            f"timm:NAME or one of {', '.join(shipped)}."
        )
    tensors, info = checkpoint.load_tensors(path)
    return {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}, info


def _build_encoder(name: str, info: dict[str, Any]) -> Encoder:
    """Build the encoder that a file's header describes, with random weights."""
    config = info["encoder"]
    if config.get("name") == "custom":
        raise InputError(
            f"{name} holds an encoder of your class {config.get('class')}; build it yourself, then call "
            "load_state_dict with the tensors of training.checkpoint.load_tensors."
        )
    try:
        return create_encoder(**config | {"weights": "none"})
    except TypeError as error:  # an option of another version
        raise InputError(f"{name} holds an encoder that this version of minissl cannot build ({error}).") from None


def _build_method(name: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> Method:
    """Build the method that a file's header describes and load its state."""
    if info["method"] not in list_methods():  # the path of a Python file would be executed
        raise InputError(
            f"{name} holds a method {info['method']!r}, which is not one of {', '.join(list_methods())}; build it "
            "yourself, then call load_state_dict with the tensors of training.checkpoint.load_tensors."
        )
    method = create_method(info["method"], _build_encoder(name, info), **info["options"])
    _load_state(name, method, tensors)
    return method.eval().requires_grad_(False)


def _load_state(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(f"{name} holds weights that do not fit its own description; export it again.") from None


def _load_timm(name: str, path: str | Path | None) -> Encoder:
    """Load a timm model with timm's weights, or with those of a file in timm's format."""
    size = timm_image_size(name.removeprefix("timm:"))
    encoder = create_encoder(name, image_size=size, weights="imagenet" if path is None else "none")
    if path is not None:
        tensors = {f"network.{key}": tensor for key, tensor in official.read_weights(Path(path)).items()}
        try:
            missing, _ = encoder.load_state_dict(tensors, strict=False)  # the classifier's weights are not needed
        except RuntimeError:  # the same names with other shapes
            missing = ["a weight of another shape"]
        if missing:
            raise InputError(f"{path} does not hold {name} in timm's format: it lacks {missing[0]}.")
    return encoder.eval().requires_grad_(False)
