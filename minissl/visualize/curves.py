"""A run in numbers: its curves."""

import math

from matplotlib.figure import Figure

NOT_A_TERM = {"step", "lr", "images_per_second"}


def curves_figure(log: list[dict[str, float]], prototypes: int | None = None, chance: float | None = None) -> Figure:
    """The terms of the loss and what was watched, over the steps; one panel each.

    Args:
        log: the lines of log.jsonl.
        prototypes: K; draws ln K, where all K answers are alike: a teacher collapsed to uniform outputs, a mere guess.
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
            label = {"xycoords": ("axes fraction", "data"), "fontsize": 8, "ha": "right", "color": "#c0504d"}
            axis.annotate(f"ln {prototypes}: all alike", (0.98, math.log(prototypes)), **label, va="bottom")
            axis.set_ylim(top=max(1.12 * math.log(prototypes), axis.get_ylim()[1]))
        if chance is not None and name == "knn":
            axis.axhline(chance, color="#7f7f7f", linestyle="--", linewidth=1)
            label = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8, "ha": "right"}
            axis.annotate("random encoder", (0.98, chance), (0, -2), **label, va="top")
            axis.set_ylim(top=1.1 * max(chance, *(value for _, value in points)))
    return figure
