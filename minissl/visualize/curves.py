"""A run in numbers: its curves, and whether its features use their dimensions.

Shapes: N images, D the encoder's width.
"""

import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from minissl.evaluate.features import rank_me

NOT_A_TERM = {"step", "lr", "images_per_second"}


def curves_figure(log: list[dict[str, float]], prototypes: int | None = None, chance: float | None = None) -> Figure:
    """The terms of the loss and what was watched, over the steps; one panel each.

    Args:
        log: the lines of log.jsonl.
        prototypes: K; draws ln K, what a teacher that has collapsed to uniform outputs would have.
        chance: the random encoder's k-NN, as a line to beat.
    """
    names = [name for name in dict.fromkeys(name for line in log for name in line) if name not in NOT_A_TERM]
    figure = Figure(figsize=(3.4 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names):
        points = [(line["step"], line[name]) for line in log if name in line]
        axis.plot(*zip(*points), marker="o" if len(points) < 30 else None, markersize=3, color="#1f4e79")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=min(0, *(value for _, value in points)))
        if prototypes and ("loss" in name or "entropy" in name):
            axis.axhline(math.log(prototypes), color="#c0504d", linestyle="--", linewidth=1)
            axis.annotate(f"ln {prototypes}: collapse to uniform", (0.02, math.log(prototypes)),
                          xycoords=("axes fraction", "data"), fontsize=8, color="#c0504d", va="bottom")  # fmt: skip
            axis.set_ylim(top=1.12 * math.log(prototypes))
        if chance is not None and name == "knn":
            axis.axhline(chance, color="#7f7f7f", linestyle="--", linewidth=1)
            axis.annotate("random encoder", (0.02, chance), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    return figure


def collapse_figure(features: Tensor, random_features: Tensor) -> Figure:
    """Have the features collapsed? Their singular values, and the cosines between different images.

    Args:
        features: (N, D) of the trained encoder.
        random_features: (N, D) of the same encoder before training.
    """
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, x, color in (("random", random_features, "#7f7f7f"), ("trained", features, "#1f4e79")):
        x = x.float().cpu()
        values = torch.linalg.svdvals(x - x.mean(dim=0))
        left.semilogy(range(1, len(values) + 1), (values / values[0]).clamp_min(1e-7), color=color,
                      label=f"{name}: RankMe {rank_me(x):.0f} of {min(x.shape)}")  # fmt: skip
        unit = F.normalize(x[:1000], dim=-1)
        cosines = (unit @ unit.mT)[~torch.eye(len(unit), dtype=torch.bool)]
        right.hist(cosines.numpy(), bins=60, range=(-1, 1), density=True, alpha=0.6, color=color, label=name)
    left.set_title("singular values of the features", fontsize=10)
    left.set_xlabel("dimension", fontsize=9)
    right.set_title("cosine of two different images (all at 1: collapse)", fontsize=10)
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    return figure
