"""The collapse lab: DINO without some of the components that prevent collapse.

Caron et al., DINO, 2021 (arXiv:2104.14294), section 5.3 and figure 7, removes centering and sharpening. Here the EMA
teacher and the stop-gradient are removed, too. An experiment is the method itself with other options, so
`minissl train dino` gives the same. Everything is small, so that a collapse takes seconds on a CPU. Nothing else
prevents it: the head has no batch norm, and there is no KoLeo loss.

Shapes: N images, D the encoder's width, K prototypes.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minissl.data.images import ImageDataset
from minissl.evaluation import collapse_type, extract_features, measure_collapse
from minissl.methods.dino import DINO
from minissl.models.factory import create_encoder
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision
from minissl.training.logger import read_log

COMPONENTS: dict[str, dict[str, Any]] = {  # the options that remove each
    "centering": {"center_momentum": 1.0},  # the center stays at 0
    "sharpening": {"teacher_temp": 0.1, "warmup_teacher_temp": 0.1},  # the student's temperature
    "EMA": {"teacher_momentum": 0.0},  # the teacher is the student of the step before
    "stop-gradient": {"stop_gradient": False},
}
MAIN_ABLATIONS: tuple[tuple[str, ...], ...] = ((), ("centering",), ("sharpening",), ("centering", "sharpening"))
ENCODER_OPTIONS: dict[str, Any] = {
    "name": "nano",
    "patch_size": 8,
    "image_size": 32,
    "stem": "deep_conv",
    "init_std": 0.088,
}
METHOD_OPTIONS: dict[str, Any] = {
    # With a higher temperature, larger crops or a wider head, some seeds without centering end with two prototypes.
    "crop_size": 32,
    "local_crop_size": 16,
    "num_local_crops": 2,
    "global_crops_scale": (0.2, 1.0),
    "local_crops_scale": (0.05, 0.3),
    "num_prototypes": 64,
    "hidden_dim": 64,
    "bottleneck_dim": 16,
    "teacher_momentum": 0.99,
    "teacher_temp": 0.01,
    "warmup_teacher_temp": 0.01,
}
TRAIN_CONFIG = TrainConfig(batch_size=64, lr=1e-3)


class CollapseRun(NamedTuple):
    """The record of one training."""

    removed: tuple[str, ...]  # of COMPONENTS
    seed: int  # of weights, batches and views
    collapse_type: str  # at the end, as `evaluation.collapse_type` says
    lines: list[dict[str, float]]  # one per step: "step", the loss terms, and at some steps `evaluate_collapse`
    targets: Tensor  # (n, K) float, the teacher's target distributions of some test images at the end


def create_dino(removed: Collection[str] = (), seed: int = 0, **options: Any) -> DINO:
    """Build a small DINO without some of `COMPONENTS`; `options` override the lab's own."""
    torch.manual_seed(seed)
    without = {name: value for component in removed for name, value in COMPONENTS[component].items()}
    return DINO(create_encoder(**ENCODER_OPTIONS), **METHOD_OPTIONS | without | options)


@torch.no_grad()
def teacher_targets(method: DINO, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's features (N, D) of uint8 images (N, 3, H, W), and its target distributions (N, K)."""
    features = extract_features(method.encoder, images, METHOD_OPTIONS["crop_size"])
    targets = method.target_probs(features)
    assert targets is not None  # DINO has prototypes
    return features, targets


def evaluate_collapse(method: DINO, train_set: ImageDataset, test_set: ImageDataset) -> dict[str, float]:
    """Compute the quantities of `evaluation.measure_collapse`.

    Args:
        method: as `create_dino` builds it.
        train_set: labeled images in which k-NN searches.
        test_set: N labeled images of the same classes.
    """
    images = test_set.get_batch(torch.arange(len(test_set))).images
    features, targets = teacher_targets(method, images)
    flipped_features, _ = teacher_targets(method, images.flip(-1))
    train_features = extract_features(method.encoder, train_set, METHOD_OPTIONS["crop_size"])
    assert train_set.labels is not None
    assert test_set.labels is not None
    return measure_collapse(features, flipped_features, targets, test_set.labels, train_features, train_set.labels)


def run_experiment(
    train_set: ImageDataset,
    test_set: ImageDataset,
    removed: Collection[str] = (),
    steps: int = 120,
    seed: int = 0,
    num_evaluations: int = 12,
    **options: Any,
) -> CollapseRun:
    """Train DINO without some of its components, and measure collapse during the training.

    Args:
        train_set: the training images; k-NN searches in 1,000 of them.
        test_set: the images on which it is evaluated.
        removed: of `COMPONENTS`.
        steps: number of training steps.
        seed: of weights, batches and views.
        num_evaluations: number of evaluations; the last is at the end.
        options: of DINO, in place of the lab's own.
    """
    method, gallery = create_dino(removed, seed, **options), train_set.subsample(1000)
    config = replace(TRAIN_CONFIG, precision=choose_precision("auto", train_set.device), seed=seed)
    evaluate = partial(evaluate_collapse, method, gallery, test_set)
    history = trainer.learn(
        method, train_set, config, steps, evaluate=evaluate, eval_every=max(1, steps // num_evaluations)
    )
    lines = [{"step": i} | line for i, line in enumerate(history, 1)]
    last = next(line for line in reversed(lines) if "entropy" in line)
    _, targets = teacher_targets(method, test_set.subset(torch.arange(min(48, len(test_set)))).images)
    kind = collapse_type(last["entropy"], last["entropy_of_mean"], targets.shape[1])
    return CollapseRun(tuple(removed), seed, kind, lines, targets)


def save_runs(runs: Iterable[CollapseRun], path: Path) -> None:
    """Write one line of JSON per run: every tenth step and those with an evaluation, the targets in percent.

    Raises:
        InputError: if the file cannot be written.
    """
    records = []
    for run in runs:
        lines = [line for line in run.lines if "knn" in line or line["step"] % 10 == 1]
        lines = [{name: round(value, 4) for name, value in line.items()} for line in lines]
        records.append(run._asdict() | {"lines": lines, "targets": (100 * run.targets).round().int().tolist()})
    checkpoint.write_atomic(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())


def load_runs(path: Path) -> list[CollapseRun]:
    """Read what `save_runs` wrote; an empty list if there is no such file."""
    records: list[dict[str, Any]] = read_log(path)
    return [
        CollapseRun(
            tuple(record["removed"]),
            record["seed"],
            record["collapse_type"],
            record["lines"],
            torch.tensor(record["targets"]) / 100,
        )
        for record in records
    ]
