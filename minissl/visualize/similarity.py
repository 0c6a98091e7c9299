"""What is like what: a patch among the patches of its image or of another, an image among images.

Caron et al., DINO, 2021 (arXiv:2104.14294), find the nearest images so (section 4.1); Siméoni et al., DINOv3, 2025
(arXiv:2508.10104), show the cosines of one patch with all others; Oquab et al., DINOv2, 2023 (arXiv:2304.07193), join
patches of two images by lines. Shapes: a grid (h, w) of patches, D their width; N images.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from minissl.evaluate.features import fine_patches
from minissl.visualize.attention import HIT, WRONG
from minissl.visualize.grid import picture_grid, to_array


def similarity(patches: Tensor, row: int, column: int) -> Tensor:
    """The cosine of one patch with every patch of the image: (h, w, D) to (h, w), -1 to 1."""
    unit = F.normalize(patches, dim=-1)
    return unit @ unit[row, column]


def similarity_figure(encoder: nn.Module, image: Tensor, size: int, points: Sequence[tuple[int, int]]) -> Figure:
    """An image with points in it, and for each point which places are like the place it marks.

    Args:
        encoder: images -> Tokens, in evaluation mode.
        image: (3, H, W) uint8.
        size: pixels a side the encoder sees it at; twice that of its training shows outlines, see `fine_patches`.
        points: (row, column) in pixels of the image.
    """
    patches = fine_patches(encoder, image[None], size)[0]  # (h, w, D)
    (height, width), (h, w) = image.shape[-2:], patches.shape[:2]
    maps = [similarity(patches, row * h // height, column * w // width) for row, column in points]
    low = min(float(found.min()) for found in maps)
    columns = [("image", [image]), *((f"like point {i + 1}", [found]) for i, found in enumerate(maps))]
    title = f"cosine of patches: black {low:.2f}, brightest 1"
    figure = picture_grid(columns, title, limits=(low, 1), side=2)
    for i, (row, column) in enumerate(points):
        _mark(figure.axes[0], row, column, str(i + 1))
        _mark(figure.axes[i + 1], (row + 0.5) * h / height - 0.5, (column + 0.5) * w / width - 0.5)
    return figure


def _mark(axis, row: float, column: float, name: str = "") -> None:
    """A ring that is seen on light and on dark, and a number in it."""
    axis.plot(column, row, marker="o", markersize=11, markerfacecolor="white" if name else "none",
              markeredgecolor="black", markeredgewidth=1)  # fmt: skip
    if not name:
        axis.plot(column, row, marker="o", markersize=9, markerfacecolor="none", markeredgecolor="white")
    axis.text(column, row, name, ha="center", va="center_baseline", fontsize=7)


def neighbors_figure(
    images: Tensor, features: Tensor, queries: Sequence[int], n: int = 6, found_in: tuple[Tensor, Tensor] | None = None
) -> Figure:
    """Some images, and the n most like each by the cosines of their vectors, which stand under them.

    Args:
        images: (N, 3, H, W) uint8.
        features: (N, D), the images' vectors.
        queries: which of them are asked for.
        n: neighbours to show.
        found_in: other images (M, 3, H, W) and their vectors (M, D) to search; if None, the others of the same.
    """
    rows = list(queries)
    others, vectors = (images, features) if found_in is None else found_in
    cosines = F.normalize(features[rows].float(), dim=-1) @ F.normalize(vectors.float(), dim=-1).mT  # (queries, M)
    if found_in is None:
        cosines[range(len(rows)), rows] = -2  # an image is no neighbour of itself
    values, nearest = cosines.topk(min(n, len(others) - (found_in is None)))
    columns = [("image", images[rows])]
    columns += [("nearest" if i == 0 else f"{i + 1}", others[nearest[:, i]]) for i in range(nearest.shape[1])]
    figure = picture_grid(columns, "Nearest neighbours, and their cosines")
    width = len(columns)
    for k, value in enumerate(values.flatten().tolist()):
        axis = figure.axes[k // (width - 1) * width + 1 + k % (width - 1)]
        axis.text(0.5, -0.03, f"{value:.2f}", transform=axis.transAxes, ha="center", va="top", fontsize=8)
    return figure


def matches_figure(
    a: Tensor,
    b: Tensor,
    found: Mapping[str, Sequence[Tensor]],
    right: Mapping[str, Sequence[Tensor]],
    grid: tuple[int, int],
    title: str = "",
) -> Figure:
    """Pairs of images, with lines between places that were found to be alike; a row a pair, a column a way of finding.

    Args:
        a, b: (n, 3, H, W) uint8, pairs.
        found: name -> for each pair (M, 2) int64, numbers of a place in `a` and in `b`, row by row of the grid.
        right: name -> for each pair (M,) bool: blue lines are right, orange ones are wrong.
        grid: (h, w) places.
        title: over the figure.
    """
    (height, width), (h, w), gap = a.shape[-2:], grid, a.shape[-1] // 8
    figure = Figure(figsize=(3.6 * len(found), 1.75 * len(a) + 0.5), layout="constrained")
    axes = figure.subplots(len(a), len(found), squeeze=False)
    for column, name in zip(axes.T, found):
        column[0].set_title(name, fontsize=10)
        for axis, left, beside, places, good in zip(column, a, b, found[name], right[name]):
            axis.imshow(to_array(torch.cat([left, left.new_full((3, height, gap), 255), beside], dim=-1)))
            axis.set_axis_off()
            y, x = (places // w + 0.5) * height / h - 0.5, (places % w + 0.5) * width / w - 0.5  # (M, 2)
            x = x + torch.tensor([0, width + gap])
            for xs, ys, fine in zip(x.tolist(), y.tolist(), good.tolist()):
                axis.plot(xs, ys, color=(HIT if fine else WRONG)[1], linewidth=1.4, marker="o", markersize=3)
    figure.suptitle(title, fontsize=11)
    return figure
