"""Tiny trainings for tests: a toy method, a tiny DINO by the command line, and what a run leaves behind."""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from minissl.cli import main
from minissl.data import Images
from minissl.methods.base import Method
from minissl.models.outputs import Encoder, Tokens
from minissl.training import run, trainer
from minissl.training.checkpoint import load_tensors, save_tensors
from minissl.training.config import TrainConfig
from minissl.training.plan import Plan
from tests.folders import TINY

STEPS = 12  # of `train_tiny` on 12 images


class ToyEncoder(Encoder):
    """A linear map of the mean color; D = 4."""

    embed_dim, patch_size = 4, 1

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tokens:
        cls = self.linear(images.mean((2, 3)))  # (B, 4)
        return Tokens(cls, cls[:, None, None])


class ToyMethod(Method):
    """Minimize the squared features.

    Args:
        step: call number of the loss at which `event` is applied to it, from 1; None for never.
        event: maps the loss to another.
    """

    def __init__(self, step: int | None = None, event: Callable[[Tensor], Tensor] = lambda loss: loss):
        super().__init__()
        self.encoder = ToyEncoder()
        self.calls, self.step, self.event = 0, step, event

    def loss(self, batch, progress):
        self.calls += 1
        loss = self.encoder(batch.images.float() / 255).cls.square().sum()
        return {"loss": self.event(loss) if self.calls == self.step else loss}


def interrupt(loss: Tensor) -> Tensor:
    """An event: press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)
    return loss


def numbered_images(n: int) -> Images:
    """n images of one pixel, whose value and label are the index."""
    return Images(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 1, 1), torch.arange(n))


def fit_toy(output_dir: Path, method: ToyMethod, save_minutes: float = 0.0) -> None:
    """Train ten steps, saved after each; with another `save_minutes` only at the end. The encoder is exported too."""
    config = TrainConfig(batch_size=4, precision="fp32", save_minutes=save_minutes)

    def export(encoder):
        save_tensors(output_dir / "encoder.safetensors", encoder.state_dict(), {})

    trainer.fit(method, numbered_images(12), config, Plan(10), output_dir, lambda encoder: {"metric": 1.0}, export)


def train_tiny(data: Path, output_dir: Path, *options: str) -> int:
    """Run `minissl train dino` for 4 epochs, saved after each step, without evaluation. Returns the exit code."""
    words = [*TINY, "--epochs", "4", "--eval_minutes", "9", "--save_minutes", "0", "--data", f"folder:{data}"]
    with patch.object(run, "_visualize"), patch.object(run, "_evaluate"):
        return main(["train", "dino", *words, "--out", str(output_dir), *options])


@contextmanager
def at_step(step: int, action: Callable[[], object], steps: int = STEPS) -> Iterator[None]:
    """Call `action` just before a step. The steps of the plan, whose progress is 0.5, are not counted."""
    training_step = trainer.training_step

    def patched(method, optimizer, batch, progress, *others):
        if progress == step / steps:
            action()
        return training_step(method, optimizer, batch, progress, *others)

    with patch.object(trainer, "training_step", patched):
        yield


def interrupted_run(data: Path, output_dir: Path, step: int = 5) -> Path:
    """Run `train_tiny` and press Ctrl-C at a step: the checkpoint is of step + 1. Returns the run directory."""
    with at_step(step, lambda: signal.raise_signal(signal.SIGINT)):
        assert train_tiny(data, output_dir) == 130
    assert saved_step(output_dir) == step + 1
    return output_dir


def saved_step(output_dir: Path) -> int:
    """Return the step of the checkpoint, after checking that all its tensors are finite."""
    tensors, info = load_tensors(output_dir / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values()), "the checkpoint is not finite"
    return info["step"]


def assert_same_bits(one: Path, other: Path) -> None:
    """Assert that two runs have bitwise identical checkpoints and encoders."""
    for name in ("checkpoint.safetensors", "encoder.safetensors"):
        (tensors, _), (expected, _) = load_tensors(one / name), load_tensors(other / name)
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors | expected), name


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a run directory but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def error_sentence(capsys, code: int) -> str:
    """Return the one sentence of a command that failed, after checking its exit code and that there is no traceback."""
    stderr = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in stderr
    (sentence,) = re.findall(r"(?:^|[\r\n]) *minissl: ([^\r\n]*)", stderr)
    return sentence
