"""Draw what tells a collapse from learning: features, and a teacher's target distributions.

Shapes: N images, D the encoder's width, K prototypes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minissl.evaluation.features import rank_me
from minissl.visualization.charts import COLORS

Line = Mapping[str, float]


class CollapseRecord(Protocol):
    """What `collapse_lab_figure` draws of a training."""

    @property
    def lines(self) -> Sequence[Line]:
        """One per step: "step", the loss terms, and at some steps those of `evaluation.measure_collapse`."""

    @property
    def targets(self) -> Tensor:
        """(N, K) target distributions at the end."""

    @property
    def collapse_type(self) -> str:
        """As `evaluation.collapse_type` says."""


def collapse_figure(features: Tensor, random_features: Tensor) -> Figure:
    """Draw the singular values of features, and the cosines of different images, beside those of the random init.

    Args:
        features: (N, D) of the trained encoder.
        random_features: (N, D) of the same encoder with random init.
    """
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, x, color in (("random init", random_features, "#7f7f7f"), ("trained", features, "#1f4e79")):
        x = x.float().cpu()
        values = torch.linalg.svdvals(x - x.mean(dim=0))
        label = f"{name}: RankMe {rank_me(x):.0f} of {min(x.shape)}"
        relative = (values / values[0]).clamp_min(1e-7)
        left.semilogy(range(1, len(values) + 1), relative, color=color, label=label)
        unit = F.normalize(x[:1000], dim=-1)
        cosines = (unit @ unit.mT)[~torch.eye(len(unit), dtype=torch.bool)]
        right.hist(cosines.numpy(), bins=60, range=(-1, 1), density=True, alpha=0.6, color=color, label=name)
    left.set_title("singular values of the centered features", fontsize=10)
    left.set_xlabel("index", fontsize=9)
    left.set_ylabel("singular value / largest", fontsize=9)
    right.set_title("similarity of two different images", fontsize=10)
    right.set_xlabel("cosine (all 1: collapse)", fontsize=9)
    right.set_ylabel("density", fontsize=9)
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    figure.suptitle("Collapse of the features", fontsize=11)
    return figure


def collapse_lab_figure(
    runs: Mapping[str, CollapseRecord], title: str = "Collapse of DINO without some of its components"
) -> Figure:
    """Draw trainings side by side, a column each: loss terms, features, and the targets of some images at the end.

    Args:
        runs: name -> record, such as `notebook.collapse_lab.run_experiment` returns.
        title: of the figure.
    """
    figure = Figure(figsize=(3.1 * len(runs) + 1.2, 8.6), layout="constrained")
    axes = figure.subplots(4, len(runs), squeeze=False, sharey="row", height_ratios=(1, 1, 0.8, 1.2))
    for (top, middle, low, bottom), (name, run) in zip(axes.T, runs.items()):
        draw_loss(top, run.lines, run.targets.shape[1])
        top.set_title(f"{name}\ncollapse: {run.collapse_type}", fontsize=10)
        _draw_features(middle, low, [line for line in run.lines if "knn" in line])
        targets = run.targets.cpu().numpy()
        image = bottom.imshow(targets, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        bottom.set(xlabel=f"{run.targets.shape[1]} prototypes", yticks=[])
    names = ("nats", "fraction of the maximum", "alignment, uniformity", "images")
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name, fontsize=9)
    for axis in axes[:3, 0]:
        axis.legend(fontsize=8)
    figure.colorbar(image, ax=axes[3], label="target probability")
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_features(middle: Axes, low: Axes, lines: Sequence[Line]) -> None:
    """Draw the features' quality, as fractions of their maximum, and their alignment and uniformity."""
    steps, dim = [line["step"] for line in lines], lines[0]["embed_dim"]
    fractions = {"k-NN accuracy": [line["knn"] for line in lines]}
    fractions["RankMe / D"] = [line["rank_me"] / dim for line in lines]
    fractions["feature std. / D^-0.5"] = [line["feature_std"] * dim**0.5 for line in lines]
    draw_lines(middle, steps, fractions)
    middle.set_ylim(0, 1)
    draw_lines(low, steps, {name: [line[name] for line in lines] for name in ("alignment", "uniformity")})


def draw_loss(axis: Axes, lines: Sequence[Line], num_prototypes: int) -> None:
    """Draw the loss and its two parts: the teacher's entropy, and the KL divergence from teacher to student."""
    max_entropy, steps = math.log(num_prototypes), [line["step"] for line in lines]
    loss, entropy = ([line[name] for line in lines] for name in ("loss", "teacher_entropy"))
    kl = [a - b for a, b in zip(loss, entropy)]
    draw_lines(axis, steps, {"loss": loss, "teacher entropy": entropy, "KL divergence": kl})
    axis.axhline(max_entropy, color="black", linestyle=":", linewidth=1)
    axis.annotate(
        f"ln {num_prototypes}",
        (0.98, max_entropy),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        ha="right",
        va="bottom",
    )
    axis.set_ylim(-0.1, 2 * max_entropy)


def draw_lines(axis: Axes, steps: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    """Draw named lines over training steps, in the course's colors."""
    for color, (name, values) in zip(COLORS, lines.items()):
        axis.plot(steps, values, color=color, label=name, linewidth=1.5)
    axis.set_xlabel("step", fontsize=9)
    axis.grid(alpha=0.25)
