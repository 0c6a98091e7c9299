"""Rows of pictures, as every figure of the course lays them out.

Figures are made without pyplot's global state, so that they work in scripts, notebooks and tests alike.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hex2color
from matplotlib.figure import Figure
from torch import Tensor

OBJECTS = ("#e03131", "#1c7ed6", "#fcc419", "#5f0f7a", "#b2f2e6", "#000000")  # told apart by a colour-blind reader too


def to_array(image: Tensor) -> np.ndarray:
    """(3, H, W) uint8 or float in [0, 1] to (H, W, 3) for matplotlib."""
    return image.permute(1, 2, 0).cpu().numpy()


def enlarge(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) to float in [0, 1], (B, 3, size, size), bicubic."""
    images = images.float() / 255
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def picture_grid(
    columns: Sequence[tuple[str, Sequence]],
    title: str,
    colormap: str = "inferno",
    limits: tuple[float | None, float | None] = (None, None),
    side: float = 1.35,
) -> Figure:
    """A figure with a titled column for each (title, pictures).

    Args:
        columns: pictures are (3, H, W) or (H, W) tensors; no column has more than the first.
        title: over the figure.
        colormap: of pictures (H, W).
        limits: the values that have its first and its last colour; each picture's own lowest or highest where None.
        side: of a picture, in inches.
    """
    rows, (low, high) = len(columns[0][1]), limits
    figure = Figure(figsize=(side * len(columns), side * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (name, pictures) in enumerate(columns):
        axes[0, column].set_title(name, fontsize=9)
        for axis, picture in zip(axes[:, column], pictures):
            if picture.ndim == 3:
                axis.imshow(to_array(picture))
            else:
                shown = picture.cpu().numpy()
                axis.imshow(shown, cmap=colormap, interpolation="nearest", vmin=low, vmax=high)
    figure.suptitle(title, fontsize=11)
    return figure


def overlay(frames: Tensor, masks: Tensor) -> Tensor:
    """Frames (T, 3, H, W) uint8 with every object in a colour of its own, float in [0, 1].

    Args:
        frames: as they are.
        masks: (T, H, W) integers, numbers of objects; 0 and 255, DAVIS's void, are left as they are.
    """
    colors = frames.new_tensor([hex2color(color) for color in OBJECTS], dtype=torch.float)  # (6, 3)
    shown = (masks > 0) & (masks != 255)
    paint = colors[(masks.long() - 1).clamp_min(0) % len(OBJECTS)].movedim(-1, 1)  # (T, 3, H, W)
    return torch.where(shown[:, None], 0.35 * frames / 255 + 0.65 * paint, frames / 255)


def found_figure(images: Tensor, scores: Tensor, title: str, n: int = 8) -> Figure:
    """The n images (N, 3, H, W) uint8 with the highest scores (N,), best first."""
    best = scores.topk(min(n, len(images))).indices
    return picture_grid([(f"{scores[i]:.2f}", [images[i]]) for i in best.tolist()], title)
