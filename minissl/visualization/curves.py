"""Draw the training curves of a run."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

NON_LOSS_KEYS = {"step", "lr", "images_per_second"}
LABELS = {  # of metrics whose key does not say their unit
    "knn": "k-NN accuracy (0 to 1)",
    "accuracy": "accuracy (0 to 1)",
    "rank_me": "RankMe (dimensions)",
    "teacher_entropy": "teacher entropy (nats)",
}


def curves_figure(
    log: Sequence[dict[str, float]], num_prototypes: int | None = None, random_knn: float | None = None
) -> Figure:
    """Draw the loss terms and evaluations of a run over its steps, one panel each.

    Args:
        log: the lines of log.jsonl.
        num_prototypes: K; draws ln K, the entropy and the loss of uniform outputs: a collapse, or the chance level.
        random_knn: k-NN accuracy of the random init, 0 to 1, drawn as a line.
    """
    names = [name for name in dict.fromkeys(name for line in log for name in line) if name not in NON_LOSS_KEYS]
    figure = Figure(figsize=(3.4 * max(len(names), 1), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names):
        points = [(line["step"], line[name]) for line in log if name in line]
        values = [value for _, value in points]
        axis.plot(*zip(*points), marker="o" if len(points) < 30 else None, markersize=3, color="#1f4e79")
        axis.set_ylabel(LABELS.get(name, name.replace("_", " ")), fontsize=9)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=min(0, *values))
        if num_prototypes and ("loss" in name or "entropy" in name):
            level = math.log(num_prototypes)
            _draw_level(axis, level, f"ln {num_prototypes}: uniform", "#c0504d", above=True)
            axis.set_ylim(top=max(1.12 * level, axis.get_ylim()[1]))
        if random_knn is not None and name == "knn":
            _draw_level(axis, random_knn, "random init", "#7f7f7f", above=False)
            axis.set_ylim(top=1.1 * max(random_knn, *values))
    figure.suptitle("Training curves", fontsize=11)
    return figure


def _draw_level(axis: Axes, level: float, name: str, color: str, above: bool) -> None:
    """Draw a dashed horizontal line with its name above or below it."""
    axis.axhline(level, color=color, linestyle="--", linewidth=1)
    axis.annotate(
        name,
        (0.98, level),
        (0, 0 if above else -2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        ha="right",
        va="bottom" if above else "top",
        color=color,
    )
