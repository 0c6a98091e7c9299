"""Record the attention maps of an encoder at several steps of its training.

Most changes happen early, so the steps are spaced logarithmically. A history is a small file that a notebook shows
without training.

Shapes: T steps, n images, a map (h, w) per head.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from minissl.errors import InputError
from minissl.evaluation.attention import dense_attention
from minissl.models.outputs import Encoder
from minissl.training import checkpoint


class AttentionHistory(NamedTuple):
    """Attention maps and the steps at which they were recorded.

    Attributes:
        maps: (T, n, heads, h, w) uint8, each map scaled so that its maximum is 255.
        steps: number of training steps done before each of the T maps.
        info: further JSON values, such as the command, the images and the head.
    """

    maps: Tensor  # (T, n, heads, h, w) uint8, each map scaled so that its maximum is 255
    steps: list[int]  # T, number of steps done
    info: dict[str, Any]  # further JSON values: the command, the images, the head


def log_spaced_steps(steps: int, n: int) -> list[int]:
    """Return at most n distinct steps from 1 to `steps`, spaced logarithmically.

    Raises:
        InputError: for n below 2.
    """
    if n < 2:
        raise InputError(f"A history of {n} steps shows no change; give 2 or more.")
    return sorted({round(steps ** (i / (n - 1))) for i in range(n)})


def attention_snapshot(encoder: Encoder, images: Tensor, image_size: int, stride: int = 2, layer: int = -1) -> Tensor:
    """Compute the attention maps of every head, in evaluation mode. The encoder's mode is restored afterwards.

    Args:
        encoder: on the device of the images.
        images: (n, 3, H, W), uint8 or float in [0, 1].
        image_size: side in pixels of the encoder's input, as in its training; a multiple of stride.
        stride: as for `dense_attention`; the maps are averaged over stride x stride pixels.
        layer: index of the transformer block: 0 is the first, -1 the last.

    Returns:
        (n, heads, image_size / stride, image_size / stride) uint8 on the CPU, each map scaled to a maximum of 255.
    """
    training = encoder.training
    maps = F.avg_pool2d(dense_attention(encoder.eval(), images, image_size, stride, layer), stride)
    encoder.train(training)
    return (maps / maps.amax((-2, -1), keepdim=True) * 255).round().byte().cpu()


class SnapshotRecorder:
    """Call a snapshot function after some of the training steps.

    It is passed to `training.trainer.learn` as `evaluate`, with `eval_every=1`, because it counts its calls.

    Args:
        snapshot: function without arguments that returns maps (n, heads, h, w) uint8, such as `attention_snapshot`.
        steps: numbers of the steps after which it is called, in ascending order; the first step is 1.

    Attributes:
        maps: the snapshots so far, one per step.
    """

    def __init__(self, snapshot: Callable[[], Tensor], steps: Sequence[int]):
        self.snapshot, self.steps = snapshot, list(steps)
        self.step, self.maps = 0, list[Tensor]()

    def __call__(self) -> dict[str, float]:
        """Count a step, and record a snapshot if it is one of `steps`. Returns no metrics."""
        self.step += 1
        if self.step in self.steps:
            self.maps.append(self.snapshot())
        return {}


def save_history(history: AttentionHistory, path: Path) -> None:
    """Write a history as one safetensors file, with its steps in the header.

    Raises:
        InputError: if the file cannot be written.
    """
    checkpoint.save_tensors(path, {"maps": history.maps}, {"steps": history.steps, "info": history.info})


def load_history(path: Path) -> AttentionHistory:
    """Read a history that `save_history` wrote.

    Raises:
        InputError: for a missing or damaged file, or one that is not a history.
    """
    tensors, header = checkpoint.load_tensors(path)
    if "maps" not in tensors or "steps" not in header:
        command = "python -m tests.benchmarks.attention_history"
        raise InputError(f"{path} is not an attention history; record one with: {command}")
    return AttentionHistory(tensors["maps"], header["steps"], header["info"])
