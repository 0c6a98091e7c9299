"""Draw metrics: lines and bars with their standard deviation over seeds, points, matrices and tables."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from minissl.visualization.grid import to_array

# Distinct with color blindness too; lines have a marker of their own besides.
COLORS = ("#1f4e79", "#c0504d", "#7f7f7f", "#56b4e9", "#000000", "#d99a2b")
MARKERS = "osD^vP"
LIGHT = "#9db8d2"


def lines_figure(x: Sequence[float], lines: Mapping[str, Tensor], x_name: str, y_name: str, title: str) -> Figure:
    """Draw lines of means, with error bars of one standard deviation (divisor n) over seeds.

    Args:
        x: n positive numbers, on a logarithmic axis.
        lines: name -> (n, seeds).
        x_name: quantity and unit of the x axis.
        y_name: quantity and unit of the y axis.
        title: of the figure.
    """
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for color, marker, (name, values) in zip(COLORS, MARKERS, lines.items()):
        mean, std = values.mean(dim=1), values.std(dim=1, correction=0)
        axis.errorbar(x, mean, std, label=name, color=color, marker=marker, markersize=4, capsize=3)
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.minorticks_off()
    axis.set(xlabel=x_name, ylabel=y_name, title=title)
    axis.grid(alpha=0.25)
    num_seeds = max(values.shape[1] for values in lines.values())
    legend_title = f"mean ± std. dev., {num_seeds} seeds" if num_seeds > 1 else None
    axis.legend(fontsize=9, title=legend_title, title_fontsize=8)
    return figure


def bars_figure(
    rows: Mapping[str, Mapping[str, float]],
    title: str,
    chance: Mapping[str, float] | None = None,
    y_name: str = "accuracy (%)",
    max_value: float = 1.0,
    width: float = 1.5,
) -> Figure:
    """Draw groups of bars: a group for each target, and in it a bar for each row.

    Args:
        rows: name -> target -> fraction, 0 to 1.
        title: of the figure.
        chance: target -> chance level, 0 to 1, drawn as a dotted line over its group.
        y_name: quantity of the y axis, in percent.
        max_value: the fraction at the top of the figure.
        width: of a group, in inches.
    """
    targets = list(next(iter(rows.values())))
    figure = Figure(figsize=(1.6 + width * len(targets), 3.2), layout="constrained")
    axis, bar_width = figure.subplots(), 0.8 / len(rows)
    for i, (color, (name, row)) in enumerate(zip(cycle(COLORS), rows.items())):
        x = [j + (i - (len(rows) - 1) / 2) * bar_width for j in range(len(targets))]
        bars = axis.bar(x, [100 * row[target] for target in targets], 0.92 * bar_width, color=color, label=name)
        if i >= len(COLORS):
            _hatch(bars)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    for j, target in enumerate(targets if chance else ()):
        assert chance is not None
        label = None if j else "chance level"  # once in the legend
        axis.plot((j - 0.45, j + 0.45), [100 * chance[target]] * 2, "k:", linewidth=1, label=label)
    axis.set_xticks(range(len(targets)), targets)
    axis.set(ylabel=y_name, title=title, ylim=(0, 112 * max_value))
    num_columns = len(rows) + bool(chance)
    axis.legend(fontsize=8, ncols=num_columns, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    return figure


def _hatch(bars: BarContainer) -> None:
    """Hatch bars whose color was used before."""
    for bar in bars:
        bar.set(hatch="//", edgecolor="white")


def seeds_figure(panels: Mapping[str, Mapping[str, Tensor]], title: str) -> Figure:
    """Draw horizontal bars of means, with one standard deviation (divisor n) over seeds and a dot per seed.

    Args:
        panels: quantity and unit -> row -> (seeds,); all panels have the same rows.
        title: of the figure.
    """
    names = list(next(iter(panels.values())))
    figure = Figure(figsize=(1.4 + 2.3 * len(panels), 0.3 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, rows) in zip(axes, panels.items()):
        means = [float(x.mean()) for x in rows.values()]
        stds = [float(x.std(correction=0)) for x in rows.values()]
        axis.barh(range(len(names)), means, 0.7, xerr=stds, color=LIGHT, ecolor="black", capsize=2)
        for y, x in enumerate(rows.values()):
            axis.plot(x.tolist(), [y] * len(x), "o", markersize=3, color=COLORS[0], alpha=0.7)
        axis.set_xlabel(name, fontsize=9)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles = [
        Patch(color=LIGHT, label="mean"),
        Line2D([], [], color="black", label="std. dev."),
        Line2D([], [], color=COLORS[0], marker="o", markersize=3, linestyle="none", label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def points_figure(
    panels: Mapping[str, Tensor],
    arrows: Mapping[str, Tensor] | None = None,
    title: str = "Features on the unit circle",
    arrow_label: str = "negative gradient",
) -> Figure:
    """Draw numbered points on and around the unit circle, in panels side by side.

    Args:
        panels: title -> (n, 2).
        arrows: title -> (n, 2), an arrow from each point.
        title: of the figure.
        arrow_label: what the arrows are.
    """
    figure = Figure(figsize=(2.5 * len(panels), 3.1), layout="constrained")
    angle = torch.linspace(0, 2 * math.pi, 200)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, points) in zip(axes, panels.items()):
        axis.plot(angle.cos().tolist(), angle.sin().tolist(), color="#c0c0c0", linewidth=1)
        axis.plot(*points.T.tolist(), "o", markersize=8, color=COLORS[0])
        for i, (x, y) in enumerate(points.tolist(), 1):
            axis.text(0.8 * x, 0.8 * y, str(i), ha="center", va="center", fontsize=9)
        if arrows and name in arrows:
            vectors = [*points.T.tolist(), *arrows[name].T.tolist()]
            axis.quiver(*vectors, angles="xy", scale_units="xy", scale=1, color=COLORS[1], width=0.012, zorder=3)
        axis.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        axis.set_xlabel("dimension 1", fontsize=9)
        axis.set_title(name, fontsize=10)
    axes[0].set_ylabel("dimension 2", fontsize=9)
    if arrows:
        arrow = Patch(color=COLORS[1], label=f"arrow: {arrow_label}")
        figure.legend(handles=[arrow], loc="outside lower center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def matrices_figure(
    matrices: Mapping[str, Tensor], rows: str, columns: str, title: str = "", value_label: str = ""
) -> Figure:
    """Draw matrices side by side, on one color scale with a color bar.

    Args:
        matrices: title -> (n, m).
        rows: what the rows are.
        columns: what the columns are.
        title: of the figure.
        value_label: quantity and unit of the values.
    """
    figure = Figure(figsize=(2.7 * len(matrices) + 0.4, 3.0), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    low = min(float(matrix.min()) for matrix in matrices.values())
    high = max(float(matrix.max()) for matrix in matrices.values())
    for axis, (name, matrix) in zip(axes, matrices.items()):
        image = axis.imshow(matrix.cpu().numpy(), vmin=low, vmax=high, cmap="viridis")
        axis.set_title(name, fontsize=10)
        axis.set(xticks=[], yticks=[], xlabel=columns)
    axes[0].set_ylabel(rows)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label=value_label)
    figure.suptitle(title, fontsize=11)
    return figure


def results_table_figure(
    rows: Mapping[str, Mapping[str, Sequence[float]]], columns: Mapping[str, str], title: str, digits: int = 0
) -> Figure:
    """Draw a table of means over seeds, colored by column from its lowest to its highest value; the highest is bold.

    Args:
        rows: name -> key of the column -> one value per seed; a row may lack columns.
        columns: key -> heading.
        title: of the figure: metric, data set, budget and unit.
        digits: decimals of the means.
    """
    means = torch.full((len(rows), len(columns)), torch.nan)
    for i, row in enumerate(rows.values()):
        for j, key in enumerate(columns):
            if key in row:
                means[i, j] = statistics.mean(row[key])
    low, high = (torch.stack([f(x[~x.isnan()]) for x in means.T]) for f in (torch.min, torch.max))
    figure = Figure(figsize=(1.8 + 0.86 * len(columns), 1.3 + 0.34 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(((means - low) / (high - low).clamp_min(1e-9)).numpy(), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for (i, j), mean in np.ndenumerate(means.numpy()):
        weight = "bold" if mean == high[j] else "normal"
        axis.text(j, i, "-" if math.isnan(mean) else f"{mean:.{digits}f}", ha="center", va="center", weight=weight)
    axis.set_xticks(range(len(columns)), [name.replace(", ", "\n") for name in columns.values()], fontsize=8)
    axis.set_yticks(range(len(rows)), rows)
    axis.xaxis.tick_top()
    axis.set_xlabel("dark: high in its column; bold: highest", fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def text_ranking_figure(
    images: Tensor,
    texts: Sequence[str],
    probs: Tensor,
    topk: int = 4,
    title: str = "The most probable sentences for each image",
) -> Figure:
    """Draw each image beside its most probable sentences.

    Args:
        images: (n, 3, H, W), uint8 or float in [0, 1].
        texts: T sentences.
        probs: (n, T) probabilities, 0 to 1.
        topk: number of sentences per image.
        title: of the figure.
    """
    figure = Figure(figsize=(9.5, 1.25 * len(images) + 0.8), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, width_ratios=(1, 5))
    for (left, right), image, row in zip(axes, images, probs):
        left.imshow(to_array(image))
        left.set_axis_off()
        _draw_ranking(right, texts, row, topk)
    axes[-1, 1].set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes[-1, 1].set_xlabel("probability", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_ranking(axis: Axes, texts: Sequence[str], probs: Tensor, topk: int) -> None:
    """Draw the most probable of T sentences as bars with the sentence on them."""
    values, order = probs.topk(min(topk, len(texts)))
    axis.barh(range(len(values)), values.tolist(), color=LIGHT)
    for y, i in enumerate(order.tolist()):
        axis.text(0.01, y, texts[i], va="center", fontsize=9)
    axis.set(xlim=(0, 1), yticks=[], xticks=[])
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
