"""A film of attention: where an encoder looks at the same images, moment by moment of its training.

Most happens early, so the moments lie closer there. A film is a small file that a chapter plays without training.

Shapes: T moments, n images, a map (h, w) per head.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from minissl import checkpoint
from minissl.errors import InputError
from minissl.evaluate import fine_attention


class Film(NamedTuple):
    """What was seen, and when."""

    maps: Tensor  # (T, n, heads, h, w) uint8, each map from 0 to its own maximum at 255
    steps: list[int]  # T, how many steps were done
    about: dict[str, Any]  # what else is known, as JSON


def moments(steps: int, n: int) -> list[int]:
    """At most n steps from 1 to the last, each about as many times the one before: 1, 2, 4, ... and the last."""
    if n < 2:
        raise InputError(f"A film of {n} moments shows nothing move; give 2 or more.")
    return sorted({round(steps ** (i / (n - 1))) for i in range(n)})


def snapshot(encoder: nn.Module, images: Tensor, size: int, stride: int = 2, layer: int | None = None) -> Tensor:
    """Where every head looks now, in evaluation mode.

    Args:
        encoder: with `attention(images) -> (B, heads, h, w)`, on the device of the images.
        images: (n, 3, H, W) uint8.
        size: pixels a side the encoder sees, as in its training; a multiple of stride.
        stride: as for `evaluate.fine_attention`, which changes only every so many pixels; one is kept of each.
        layer: which block, of an encoder that has several; the last if None.

    Returns:
        (n, heads, size / stride, size / stride) uint8 on the CPU, each map scaled by its own maximum.
    """
    training = encoder.training
    maps = F.avg_pool2d(fine_attention(encoder.eval(), images, size, stride, layer), stride)
    encoder.train(training)
    return (maps / maps.amax((-2, -1), keepdim=True) * 255).round().byte().cpu()


class Camera:
    """Takes its picture at some of the steps it is called after, and nothing at the others.

    Args:
        look: () -> (n, heads, h, w) uint8.
        steps: when, in rising order.
    """

    def __init__(self, look: Callable[[], Tensor], steps: list[int]):
        self.look, self.steps, self.step, self.maps = look, steps, 0, []

    def __call__(self) -> dict[str, float]:
        self.step += 1
        if self.step in self.steps:
            self.maps.append(self.look())
        return {}


def save(film: Film, path: Path) -> None:
    """Write a film as one safetensors file, the steps in its header. Raises InputError where it cannot be written."""
    checkpoint.save_tensors(path, {"maps": film.maps}, {"steps": film.steps, "about": film.about})


def load(path: Path) -> Film:
    """A film that `save` wrote. Raises InputError for a missing, cut or foreign file."""
    tensors, info = checkpoint.load_tensors(path)
    if "maps" not in tensors or "steps" not in info:
        raise InputError(f"{path} holds no film; record one with: python -m tests.benchmarks.emergence")
    return Film(tensors["maps"], info["steps"], info["about"])
