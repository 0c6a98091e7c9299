"""Draw similarities of patches within an image, of patches of two images, and of images.

Caron et al., DINO, 2021 (arXiv:2104.14294), section 4.1, retrieve the nearest images; Siméoni et al., DINOv3, 2025
(arXiv:2508.10104), show the cosines of one patch with all others; Oquab et al., DINOv2, 2023 (arXiv:2304.07193), match
patches of two images.

Shapes: a grid (h, w) of patch tokens of D dimensions, N images of H x W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from minissl.data.transforms.functional import to_float
from minissl.evaluation.features import dense_patches
from minissl.models.outputs import Encoder
from minissl.visualization.attention import HIT, WRONG
from minissl.visualization.grid import image_grid, to_array


def patch_similarity(patches: Tensor, row: int, column: int) -> Tensor:
    """Compute the cosine of one patch with every patch of (h, w, D): (h, w), -1 to 1."""
    unit = F.normalize(patches, dim=-1)
    return unit @ unit[row, column]


def similarity_figure(encoder: Encoder, image: Tensor, image_size: int, points: Sequence[tuple[int, int]]) -> Figure:
    """Draw an image with marked points, and a map of cosine similarities with the patch at each.

    Args:
        encoder: in evaluation mode, on the device of the image.
        image: (3, H, W), uint8 or float in [0, 1].
        image_size: side in pixels of the encoder's input; twice that of its training shows outlines, see
            `evaluation.dense_patches`.
        points: (row, column) in pixels of the image.
    """
    patches = dense_patches(encoder, image[None], image_size)[0]  # (h, w, D)
    (height, width), (h, w) = image.shape[-2:], patches.shape[:2]
    maps = [patch_similarity(patches, row * h // height, column * w // width) for row, column in points]
    columns = [("image", [image]), *((f"point {i + 1}", [one]) for i, one in enumerate(maps))]
    title = "Cosine similarity with the patch at each point"
    figure = image_grid(columns, title, limits=(None, 1), side=2, map_label="cosine similarity")
    for i, (row, column) in enumerate(points):
        _mark(figure.axes[0], row, column, str(i + 1))
        _mark(figure.axes[i + 1], (row + 0.5) * h / height - 0.5, (column + 0.5) * w / width - 0.5)
    return figure


def _mark(axis: Axes, row: float, column: float, name: str = "") -> None:
    """Draw a ring that is visible on light and dark, with a name in it."""
    axis.plot(
        column, row, marker="o", markersize=11, markerfacecolor="white" if name else "none", markeredgecolor="black"
    )
    if not name:
        axis.plot(column, row, marker="o", markersize=9, markerfacecolor="none", markeredgecolor="white")
    axis.text(column, row, name, ha="center", va="center_baseline", fontsize=7)


def neighbors_figure(
    images: Tensor, features: Tensor, queries: Sequence[int], n: int = 6, gallery: tuple[Tensor, Tensor] | None = None
) -> Figure:
    """Draw some images, and the n nearest neighbors of each, with their cosine similarity below them.

    Args:
        images: (N, 3, H, W), uint8 or float in [0, 1].
        features: (N, D).
        queries: indices of the query images.
        n: number of neighbors.
        gallery: other images (M, 3, H, W) and their features (M, D) to search; None searches the other images of the
            same set.
    """
    indices = list(queries)
    others, other_features = (images, features) if gallery is None else gallery
    cosines = F.normalize(features[indices].float(), dim=-1) @ F.normalize(other_features.float(), dim=-1).mT
    if gallery is None:
        cosines[range(len(indices)), indices] = -2  # excludes the query itself; cosines are (queries, M)
    values, nearest = cosines.topk(min(n, len(others) - (gallery is None)))
    columns = [("query", images[indices])]
    columns += [("nearest" if i == 0 else f"{i + 1}", others[nearest[:, i]]) for i in range(nearest.shape[1])]
    figure = image_grid(columns, "Nearest neighbors and their cosine similarity")
    width = len(columns)
    for k, value in enumerate(values.flatten().tolist()):
        axis = figure.axes[k // (width - 1) * width + 1 + k % (width - 1)]
        axis.text(0.5, -0.03, f"{value:.2f}", transform=axis.transAxes, ha="center", va="top", fontsize=8)
    return figure


def matches_figure(
    a: Tensor,
    b: Tensor,
    matches: Mapping[str, Sequence[Tensor]],
    correct: Mapping[str, Sequence[Tensor]],
    grid: tuple[int, int],
    title: str = "Matches of patches in two images",
) -> Figure:
    """Draw pairs of images with lines between matched patches: a row per pair, a column per set of features.

    Args:
        a: (n, 3, H, W), uint8 or float in [0, 1], the first images of n pairs.
        b: (n, 3, H, W), the second ones.
        matches: name of the features -> for each pair (M, 2) int64, indices of patches in `a` and in `b`, row by row.
        correct: name -> for each pair (M,) bool.
        grid: (h, w) of the patches.
        title: of the figure.
    """
    a, b, gap = to_float(a), to_float(b), a.shape[-1] // 8  # pixels between the two images
    figure = Figure(figsize=(3.6 * len(matches), 1.75 * len(a) + 0.8), layout="constrained")
    axes = figure.subplots(len(a), len(matches), squeeze=False)
    for column, name in zip(axes.T, matches):
        column[0].set_title(name, fontsize=10)
        for axis, first, second, indices, is_correct in zip(column, a, b, matches[name], correct[name]):
            white = torch.ones(3, first.shape[-2], gap, device=first.device)
            axis.imshow(to_array(torch.cat([first, white, second], dim=-1)))
            axis.set_axis_off()
            _draw_matches(axis, indices, is_correct, (a.shape[-2], a.shape[-1]), grid, gap)
    names = {"correct": HIT, "incorrect": WRONG}
    handles = [Line2D([], [], color=color, marker="o", markersize=3, label=name) for name, (_, color) in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_matches(
    axis: Axes, indices: Tensor, is_correct: Tensor, size: tuple[int, int], grid: tuple[int, int], gap: int
) -> None:
    """Draw a line between the centers of each pair of patches (M, 2)."""
    (height, width), (h, w) = size, grid
    y, x = (indices // w + 0.5) * height / h - 0.5, (indices % w + 0.5) * width / w - 0.5  # (M, 2)
    x = x + torch.tensor([0, width + gap])
    for xs, ys, good in zip(x.tolist(), y.tolist(), is_correct.tolist()):
        axis.plot(xs, ys, color=(HIT if good else WRONG)[1], linewidth=1.4, marker="o", markersize=3)
