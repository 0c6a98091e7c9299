"""Numbers as pictures: lines with their spread, bars side by side, points, matrices, and what an image answers to."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from minissl.visualize.grid import to_array

# Told apart by a colour-blind reader too; lines have a marker of their own besides.
COLORS = ("#1f4e79", "#c0504d", "#7f7f7f", "#56b4e9", "#000000", "#d99a2b")
MARKERS = "osD^vP"


def lines_figure(x: Sequence[float], lines: Mapping[str, Tensor], x_name: str, y_name: str, title: str) -> Figure:
    """Lines with the deviation over seeds.

    Args:
        x: n positive numbers, drawn on a logarithmic axis.
        lines: name -> (n, seeds).
        x_name, y_name, title: what they are.
    """
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for color, marker, (name, values) in zip(COLORS, MARKERS, lines.items()):
        mean, spread = values.mean(dim=1), values.std(dim=1, correction=0)
        axis.errorbar(x, mean, spread, label=name, color=color, marker=marker, markersize=4, capsize=3)
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.minorticks_off()
    axis.set(xlabel=x_name, ylabel=y_name, title=title)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
    return figure


def bars_figure(
    rows: Mapping[str, Mapping[str, float]],
    title: str,
    chance: Mapping[str, float] | None = None,
    y_name: str = "right answers (%)",
    highest: float = 1.0,
    width: float = 1.5,
) -> Figure:
    """Groups of bars, a group for each question and a bar in it for each row.

    Args:
        rows: name -> question -> share of right answers, 0 to 1.
        title: what is asked.
        chance: question -> what guessing gives, as a dash over its group.
        y_name: what is shared out, in percent.
        highest: the share at the top of the figure.
        width: of a group, in inches.
    """
    questions = list(next(iter(rows.values())))
    figure = Figure(figsize=(1.6 + width * len(questions), 3.2), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(rows)
    for i, (color, (name, row)) in enumerate(zip(cycle(COLORS), rows.items())):
        places = [q + (i - (len(rows) - 1) / 2) * width for q in range(len(questions))]
        bars = axis.bar(places, [100 * row[q] for q in questions], 0.92 * width, color=color, label=name)
        for bar in bars if i >= len(COLORS) else ():
            bar.set(hatch="//", edgecolor="white")
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    for q, question in enumerate(questions):
        if chance:
            axis.plot((q - 0.45, q + 0.45), [100 * chance[question]] * 2, color="black", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(questions)), questions)
    axis.set(ylabel=y_name, title=title, ylim=(0, 112 * highest))
    axis.legend(fontsize=8, ncols=len(rows), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    return figure


def seeds_figure(panels: Mapping[str, Mapping[str, Tensor]], title: str) -> Figure:
    """Rows of bars, a panel for each number: the mean over seeds, its deviation, and a dot for every seed.

    Args:
        panels: what is measured -> row -> (seeds,); the panels have the same rows.
        title: over the figure.
    """
    names = list(next(iter(panels.values())))
    figure = Figure(figsize=(1.4 + 2.3 * len(panels), 0.3 * len(names) + 1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, rows) in zip(axes, panels.items()):
        means, spreads = ([float(f(x)) for x in rows.values()] for f in (torch.mean, lambda x: x.std(correction=0)))
        axis.barh(range(len(names)), means, 0.7, xerr=spreads, color="#9db8d2", ecolor="black", capsize=2)
        for place, x in enumerate(rows.values()):
            axis.plot(x.tolist(), [place] * len(x), "o", markersize=3, color=COLORS[0], alpha=0.7)
        axis.set_title(name, fontsize=10)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return figure


def points_figure(panels: Mapping[str, Tensor], pushes: Mapping[str, Tensor] | None = None) -> Figure:
    """Points on and about the unit circle, side by side, numbered from 1.

    Args:
        panels: title -> (n, 2).
        pushes: title -> (n, 2), an arrow from each point.
    """
    figure = Figure(figsize=(2.5 * len(panels), 2.8), layout="constrained")
    turn = torch.linspace(0, 2 * math.pi, 200)
    for axis, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axis.plot(turn.cos().tolist(), turn.sin().tolist(), color="#c0c0c0", linewidth=1)
        axis.plot(*points.T.tolist(), "o", markersize=8, color=COLORS[0])
        for i, (x, y) in enumerate(points.tolist(), 1):
            axis.text(0.8 * x, 0.8 * y, str(i), ha="center", va="center", fontsize=9)
        if title in (pushes or {}):
            arrows = [*points.T.tolist(), *pushes[title].T.tolist()]
            axis.quiver(*arrows, angles="xy", scale_units="xy", scale=1, color=COLORS[1], width=0.012, zorder=3)
        axis.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal")
        axis.set_axis_off()
        axis.set_title(title, fontsize=10)
    return figure


def matrices_figure(matrices: Mapping[str, Tensor], rows: str, columns: str) -> Figure:
    """Square matrices side by side, on one scale of colours.

    Args:
        matrices: title -> (n, n).
        rows, columns: what they stand for.
    """
    figure = Figure(figsize=(2.7 * len(matrices), 3.0), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    low, high = (float(f(torch.stack([f(m) for m in matrices.values()]))) for f in (torch.min, torch.max))
    for axis, (title, matrix) in zip(axes, matrices.items()):
        shown = axis.imshow(matrix.cpu().numpy(), vmin=low, vmax=high, cmap="viridis")
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[], xlabel=columns)
    axes[0].set_ylabel(rows)
    figure.colorbar(shown, ax=list(axes), shrink=0.8)
    return figure


def board_figure(
    rows: Mapping[str, Mapping[str, Sequence[float]]], columns: Mapping[str, str], title: str, digits: int = 0
) -> Figure:
    """A table in which each column is coloured from its lowest to its highest number, and the highest is bold.

    Args:
        rows: name -> column -> one number for each seed; a row may lack columns.
        columns: as `rows` calls them -> as they are shown.
        title: over the figure.
        digits: after the point of the means that are written.
    """
    means = torch.full((len(rows), len(columns)), torch.nan)
    for place, row in enumerate(rows.values()):
        for at, key in enumerate(columns):
            if key in row:
                means[place, at] = statistics.mean(row[key])
    low, high = (torch.stack([f(x[~x.isnan()]) for x in means.T]) for f in (torch.min, torch.max))
    figure = Figure(figsize=(1.8 + 0.86 * len(columns), 1.1 + 0.34 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(((means - low) / (high - low).clamp_min(1e-9)).numpy(), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for (place, at), mean in np.ndenumerate(means.numpy()):
        weight = "bold" if mean == high[at] else "normal"
        axis.text(at, place, "-" if math.isnan(mean) else f"{mean:.{digits}f}", ha="center", va="center", weight=weight)
    axis.set_xticks(range(len(columns)), [name.replace(", ", "\n") for name in columns.values()], fontsize=8)
    axis.set_yticks(range(len(rows)), rows)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def answers_figure(images: Tensor, texts: Sequence[str], shares: Tensor, best: int = 4) -> Figure:
    """Each image beside the sentences it answers to most.

    Args:
        images: (n, 3, H, W) uint8.
        texts: T sentences.
        shares: (n, T), 0 to 1.
        best: sentences to show.
    """
    figure = Figure(figsize=(9.5, 1.25 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, width_ratios=(1, 5))
    for (left, right), image, row in zip(axes, images, shares):
        left.imshow(to_array(image))
        left.set_axis_off()
        values, order = row.topk(min(best, len(texts)))
        right.barh(range(len(values)), values.tolist(), color="#9db8d2")
        for place, i in enumerate(order.tolist()):
            right.text(0.01, place, texts[i], va="center", fontsize=9)
        right.set(xlim=(0, 1), yticks=[], xticks=[])
        right.invert_yaxis()
        right.spines[:].set_visible(False)
    return figure
