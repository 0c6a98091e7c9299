"""The collapse lab: DINO with what keeps it from collapse taken away, piece by piece.

Caron et al., DINO, 2021 (arXiv:2104.14294), section 5.3 and figure 7, where centring and sharpening are left out in
turn; the two others, the moving average and the stop-gradient, are left out too. A lab is the method itself with
options of its own, so that what is seen here can be done by `python -m minissl train dino` as well. All is small, so
that a collapse takes seconds on a CPU, and nothing but the four pieces stands against it: a plain head, no KoLeo.

Shapes: N images, D the encoder's width, K prototypes.
"""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minissl import checkpoint, train
from minissl.data import Images
from minissl.encoders import make_encoder
from minissl.evaluate import alignment, extract, knn, rank_me, spread, uniformity
from minissl.machine import choose_precision
from minissl.methods.dino import DINO, center_and_sharpen
from minissl.record import read_log

PIECES: dict[str, dict[str, Any]] = {  # how each is left out
    "centring": {"center_momentum": 1.0},  # the centre stays at 0
    "sharpening": {"teacher_temperature": 0.1, "warmup_temperature": 0.1},  # the student's
    "EMA": {"momentum": 0.0},  # the teacher is the student of the step before
    "stop-gradient": {"stop_gradient": False},
}
MAIN = ((), ("centring",), ("sharpening",), ("centring", "sharpening"))  # figure 7
ENCODER = {"name": "nano", "patch_size": 8, "img_size": 32, "stem": "conv", "init_std": 0.088}
OPTIONS = {
    **{"size": 32, "local_size": 16, "local_crops": 2, "global_scale": (0.5, 1.0), "local_scale": (0.25, 0.6)},
    # With a head four times as wide, one of three seeds without centring ended with two prototypes instead of one.
    **{"prototypes": 64, "hidden": 64, "bottleneck": 16, "momentum": 0.99},
    **{"teacher_temperature": 0.02, "warmup_temperature": 0.02},
}
LOOP = train.TrainConfig(batch_size=64, lr=1e-3)


def make(without: Collection[str] = (), seed: int = 0, **options: Any) -> DINO:
    """A small DINO without some of PIECES; `options` replace the lab's own."""
    torch.manual_seed(seed)
    left_out = {name: value for piece in without for name, value in PIECES[piece].items()}
    return DINO(make_encoder(**ENCODER), **OPTIONS | left_out | options)


@torch.no_grad()
def answers(method: DINO, images: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's features (N, D) of uint8 images (N, 3, H, W), and its targets (N, K) for them."""
    features = extract(method.encoder, images, OPTIONS["size"])
    return features, center_and_sharpen(method.teacher["head"](features), method.center, method.temperatures["end"])


def measure(method: DINO, data: Images, images: Images) -> dict[str, float]:
    """How far from collapse.

    Args:
        method: as `make` gives it.
        data: what is looked up, with labels.
        images: N others of the same kind.

    Returns:
        `entropy` of a target, the mean over images, and `entropy_of_mean`, of the mean target, both from 0 to ln K;
        their difference is what a target says of its image. `rank_me` (of `width`), `spread`, `alignment` of images
        with their mirror images and `uniformity` of the features; `knn`, the share of right answers by nearest
        neighbours.
    """
    features, targets = answers(method, images.images)
    mirrored, _ = answers(method, images.images.flip(-1))
    looked_up = extract(method.encoder, data.images, OPTIONS["size"])
    right = knn(looked_up, data.labels, features) == images.labels
    return {
        "entropy": float(torch.special.entr(targets).sum(-1).mean()),
        "entropy_of_mean": float(torch.special.entr(targets.mean(dim=0)).sum()),
        "rank_me": rank_me(features),
        "spread": spread(features),
        "alignment": alignment(features, mirrored),
        "uniformity": uniformity(features),
        "width": features.shape[1],
        "knn": float(right.float().mean()),
    }


def verdict(entropy: float, entropy_of_mean: float, prototypes: int) -> str:
    """Which collapse: "uniform", "one-hot", "one answer" (the same for every image, neither even nor sharp), or "none".

    A low entropy alone is no collapse: a sharp teacher that gives every image another prototype has it too. It is one
    when the mean over images is no less sharp, because then the targets say nothing of the image.
    """
    level = math.log(prototypes)
    if entropy_of_mean - entropy > 0.05 * level:
        return "none"
    return "uniform" if entropy > 0.95 * level else "one-hot" if entropy < 0.1 * level else "one answer"


class Cell(NamedTuple):
    """A training, as it is kept.

    Attributes:
        without: which of PIECES were left out.
        seed: of everything drawn.
        verdict: how it ended, see `verdict`.
        lines: a dict a step: `step`, the terms of the loss, and now and then what `measure` saw.
        targets: (n, K) float, 0 to 1: what the teacher says of some images at the end.
    """

    without: tuple[str, ...]
    seed: int
    verdict: str
    lines: list[dict[str, float]]
    targets: Tensor


def run(
    data: Images,
    images: Images,
    without: Collection[str] = (),
    steps: int = 120,
    seed: int = 0,
    looks: int = 12,
    **options: Any,
) -> Cell:
    """Train a cell of the lab, and look at it now and then.

    Args:
        data: what it learns from.
        images: what is looked at.
        without, options: as for `make`.
        steps: length of the run.
        seed: of everything drawn.
        looks: how often it is measured; the last time at the end.
    """
    method, looked_up = make(without, seed, **options), data.some(1000)
    config = replace(LOOP, precision=choose_precision("auto", data.device), seed=seed)
    look = partial(measure, method, looked_up, images)
    history = train.learn(method, data, config, steps, look, every=max(1, steps // looks))
    lines = [{"step": i} | line for i, line in enumerate(history, 1)]
    last = next(line for line in reversed(lines) if "entropy" in line)
    how = verdict(last["entropy"], last["entropy_of_mean"], method.center.shape[-1])
    return Cell(tuple(without), seed, how, lines, answers(method, images.images[:48])[1])


def save(cells: Iterable[Cell], path: Path) -> None:
    """A line of JSON for each cell; of the steps that were not looked at every tenth, the targets in hundredths."""
    kept = []
    for cell in cells:
        lines = [line for line in cell.lines if "knn" in line or line["step"] % 10 == 1]
        lines = [{name: round(value, 4) for name, value in line.items()} for line in lines]
        kept.append(cell._replace(lines=lines, targets=(100 * cell.targets).round().int().tolist())._asdict())
    checkpoint.write(path, "".join(f"{json.dumps(cell)}\n" for cell in kept).encode())


def load(path: Path) -> list[Cell]:
    """What `save` wrote; nothing if there is no such file."""
    cells = [Cell(**cell) for cell in read_log(path)]
    return [c._replace(without=tuple(c.without), targets=torch.tensor(c.targets) / 100) for c in cells]
