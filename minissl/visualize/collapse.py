"""Has it collapsed? Features, and a teacher's answers, as pictures.

Shapes: N images, D the encoder's width, K prototypes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from minissl.evaluate.features import rank_me
from minissl.visualize.charts import COLORS


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


def lab_figure(cells: Mapping[str, Any]) -> Figure:
    """Trainings side by side, a column each: what the loss is made of, what the features do, who gets which prototype.

    Args:
        cells: name -> what `lab.run` returns, with `lines`, `targets` (N, K) and `verdict`.
    """
    figure = Figure(figsize=(3.1 * len(cells) + 0.6, 8.2), layout="constrained")
    axes = figure.subplots(4, len(cells), squeeze=False, sharey="row", height_ratios=(1, 1, 0.8, 1.2))
    for (top, middle, low, bottom), (name, cell) in zip(axes.T, cells.items()):
        prototypes = cell.targets.shape[1]
        draw_loss(top, cell.lines, prototypes)
        top.set_title(f"{name}\ncollapse: {cell.verdict}", fontsize=10)
        seen = [line for line in cell.lines if "knn" in line]
        steps, most = [line["step"] for line in seen], seen[0]["width"]
        shares = {"k-NN": [line["knn"] for line in seen], "RankMe / D": [line["rank_me"] / most for line in seen]}
        shares["spread / D^-0.5"] = [line["spread"] * most**0.5 for line in seen]
        draw_lines(middle, steps, shares)
        middle.set_ylim(0, 1)
        draw_lines(low, steps, {name: [line[name] for line in seen] for name in ("alignment", "uniformity")})
        low.set_xlabel("step", fontsize=9)
        bottom.imshow(
            cell.targets.cpu().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
        )
        bottom.set(xlabel=f"{prototypes} prototypes", yticks=[])
    axes[3, 0].set_ylabel("images")
    for axis in axes[:3, 0]:
        axis.legend(fontsize=8)
    return figure


def draw_loss(axis: Any, lines: Sequence[Mapping[str, float]], prototypes: int) -> None:
    """The loss, and what it is the sum of: the teacher's entropy, and how far the student is from it (KL)."""
    level, steps = math.log(prototypes), [line["step"] for line in lines]
    loss, entropy = ([line[name] for line in lines] for name in ("loss", "teacher_entropy"))
    draw_lines(axis, steps, {"loss": loss, "teacher's entropy": entropy, "KL": [a - b for a, b in zip(loss, entropy)]})
    axis.axhline(level, color="black", linestyle=":", linewidth=1)
    axis.annotate(
        f"ln {prototypes}", (0.98, level), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom"
    )
    axis.set_ylim(-0.1, 2 * level)


def draw_lines(axis: Any, steps: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
    """Lines by their names, in the course's colours."""
    for color, (name, values) in zip(COLORS, lines.items()):
        axis.plot(steps, values, color=color, label=name, linewidth=1.5)
    axis.grid(alpha=0.25)
