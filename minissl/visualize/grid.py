"""Rows of pictures, as every figure of the course lays them out.

Figures are made without pyplot's global state, so that they work in scripts, notebooks and tests alike.
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor


def to_array(image: Tensor) -> np.ndarray:
    """(3, H, W) uint8 or float in [0, 1] to (H, W, 3) for matplotlib."""
    return image.permute(1, 2, 0).cpu().numpy()


def enlarge(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) to float in [0, 1], (B, 3, size, size), bicubic."""
    images = images.float() / 255
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def picture_grid(columns: Sequence[tuple[str, Sequence]], title: str, colormap: str = "inferno") -> Figure:
    """A figure with a titled column for each (title, pictures); pictures are (3, H, W) or (H, W) tensors."""
    rows = len(columns[0][1])
    figure = Figure(figsize=(1.35 * len(columns), 1.35 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns):
        axes[0, column].set_title(name, fontsize=9)
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.set_axis_off()
            if picture.ndim == 3:
                axis.imshow(to_array(picture))
            else:
                axis.imshow(picture.cpu().numpy(), cmap=colormap, interpolation="nearest")
    figure.suptitle(title, fontsize=11)
    return figure


def found_figure(images: Tensor, scores: Tensor, title: str, n: int = 8) -> Figure:
    """The n images (N, 3, H, W) uint8 with the highest scores (N,), best first."""
    best = scores.topk(min(n, len(images))).indices
    return picture_grid([(f"{scores[i]:.2f}", [images[i]]) for i in best.tolist()], title)
