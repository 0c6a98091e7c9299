"""Draw images and their augmented views.

Shapes: B images of H x W pixels; k views of each, stored view by view: index = view * B + image.
"""

from matplotlib.figure import Figure
from torch import Tensor

from minissl.data.transforms.functional import denormalize
from minissl.errors import InputError
from minissl.visualization.grid import image_grid


def views_figure(images: Tensor, *views: Tensor, title: str = "Images and their augmented views") -> Figure:
    """Draw a row for each image: the image, then its views.

    Use it as `views_figure(images, simclr_views(images, 32))` or, with two sizes,
    `views_figure(images, *multi_crop(...))`.

    Args:
        images: (B, 3, H, W), uint8 or float in [0, 1].
        views: (k B, 3, S, S) float each, normalized as inputs of an encoder; k may be 0.
        title: of the figure.

    Raises:
        InputError: if the number of views is not a multiple of B.
    """
    columns: list[tuple[str, Tensor]] = [("image", images)]
    for group in views:
        if len(group) % len(images):
            raise InputError(f"Got {len(group)} views of {len(images)} images; give a multiple, view by view.")
        columns += [(f"{group.shape[-1]} px", view) for view in denormalize(group).split(len(images)) if len(view)]
    return image_grid(columns, title)
