"""Encoders that were trained before: a run's folder, or the file it exports.

An exported encoder is a safetensors file whose header says which encoder it is, so that it loads by itself.
"""

from pathlib import Path

from torch import nn

from minissl import checkpoint
from minissl.encoders import make_encoder
from minissl.errors import InputError


def save(encoder: nn.Module, choices: dict, path: Path) -> None:
    """Export an encoder with the arguments of `make_encoder` that make it."""
    checkpoint.save_tensors(path, encoder.state_dict(), {"encoder": choices | {"weights": "none"}})


def load(name_or_path: str | Path) -> nn.Module:
    """An encoder in evaluation mode, without gradients.

    Args:
        name_or_path: a run's folder, or an exported file.

    Raises:
        InputError: if there is no such encoder, or the file is broken.
    """
    path = Path(name_or_path)
    path = path / "encoder.safetensors" if path.is_dir() else path
    tensors, info = checkpoint.load_tensors(path)
    if "encoder" not in info:
        raise InputError(f"{path} holds no encoder; give a run's folder or its encoder.safetensors.")
    encoder = make_encoder(**info["encoder"])
    encoder.load_state_dict(tensors)
    return encoder.eval().requires_grad_(False)
