"""Lay out images and maps in a grid, as every figure of images of the course does.

Figures are made without pyplot's global state, so that they work in scripts, notebooks and tests alike.

Shapes: B images of H x W pixels, T frames.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, hex2color
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from minissl.data.transforms.functional import to_float
from minissl.evaluation.features import resize

MASK_COLORS = ("#e03131", "#1c7ed6", "#fcc419", "#5f0f7a", "#b2f2e6", "#000000")  # distinct with color blindness too


def to_array(image: Tensor) -> NDArray[Any]:
    """Convert an image (3, H, W), uint8 or float in [0, 1], to (H, W, 3) for matplotlib."""
    array: NDArray[Any] = image.permute(1, 2, 0).cpu().numpy()
    return array


def enlarge(images: Tensor, size: int) -> Tensor:
    """Resize images (B, 3, H, W), uint8 or float in [0, 1], to size x size by bicubic. Returns float in [0, 1]."""
    return to_float(images) if images.shape[-2:] == (size, size) else resize(images, (size, size))


def image_grid(
    columns: Sequence[tuple[str, Sequence[Tensor] | Tensor]],
    title: str,
    colormap: str = "inferno",
    limits: tuple[float | None, float | None] = (None, None),
    side: float = 1.35,
    map_label: str = "",
) -> Figure:
    """Draw a grid with one titled column for each (title, images) pair. All maps share one color scale.

    Args:
        columns: each holds images (3, H, W) or maps (H, W); none has more than the first.
        title: of the figure.
        colormap: of maps.
        limits: the values of its first and last color; None is the lowest or highest value of all maps.
        side: of an image, in inches.
        map_label: quantity and unit of the maps; draws a color bar. Without one there is no color bar.
    """
    num_rows = len(columns[0][1])
    figure = Figure(
        figsize=(side * len(columns) + (0.8 if map_label else 0), side * num_rows + 0.7), layout="constrained"
    )
    axes = figure.subplots(num_rows, len(columns), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    scale = ScalarMappable(_shared_scale([maps for _, images in columns for maps in images], limits), colormap)
    for column, (name, images) in enumerate(columns):
        axes[0, column].set_title(name, fontsize=9)
        for axis, image in zip(axes[:, column], images):
            if image.ndim == 3:
                axis.imshow(to_array(image))
            else:
                axis.imshow(image.cpu().numpy(), cmap=scale.cmap, norm=scale.norm, interpolation="nearest")
    if map_label:
        figure.colorbar(scale, ax=axes, shrink=0.8, label=map_label)
    figure.suptitle(title, fontsize=11)
    return figure


def _shared_scale(images: Sequence[Tensor], limits: tuple[float | None, float | None]) -> Normalize:
    """Return the color scale of all maps (H, W) among the images."""
    low, high = limits
    values = [image[~image.isnan()] for image in images if image.ndim == 2]  # NaN is drawn as missing
    values = [of_map for of_map in values if len(of_map)]
    if values and low is None:
        low = min(float(of_map.min()) for of_map in values)
    if values and high is None:
        high = max(float(of_map.max()) for of_map in values)
    return Normalize(low, high)


def overlay_masks(frames: Tensor, masks: Tensor) -> Tensor:
    """Overlay every object of a clip with a color of its own.

    Args:
        frames: (T, 3, H, W), uint8 or float in [0, 1].
        masks: (T, H, W) integers, object ids; the background, 0, and DAVIS's void, 255, are left unchanged.

    Returns:
        (T, 3, H, W) float in [0, 1].
    """
    frames = to_float(frames)
    colors = frames.new_tensor([hex2color(color) for color in MASK_COLORS])  # (6, 3)
    on_object = (masks > 0) & (masks != 255)
    paint = colors[(masks.long() - 1).clamp_min(0) % len(MASK_COLORS)].movedim(-1, 1)  # (T, 3, H, W)
    return torch.where(on_object[:, None], 0.35 * frames + 0.65 * paint, frames)


def top_images_figure(images: Tensor, scores: Tensor, title: str, n: int = 8) -> Figure:
    """Draw the n images (N, 3, H, W) with the highest scores (N,), best first, each below its score."""
    best = scores.topk(min(n, len(images))).indices
    return image_grid([(f"{scores[i]:.2f}", [images[i]]) for i in best.tolist()], title)
