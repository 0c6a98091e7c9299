"""What a method is shown: images, and the views drawn of them.

Shapes: B images; k views of each, stored view by view: row = view * B + image.
"""

from matplotlib.figure import Figure
from torch import Tensor

from minissl.augment import denormalize
from minissl.errors import InputError
from minissl.visualize.grid import picture_grid


def views_figure(images: Tensor, *views: Tensor, title: str = "Views") -> Figure:
    """A row for each image: itself, then its views.

    Use it as `views_figure(images, simclr(images, 32))` or, with two sizes, `views_figure(images, *multi_crop(...))`.

    Args:
        images: (B, 3, H, W) uint8.
        views: (k B, 3, S, S) float each, normalised as an encoder gets them; k may be 0.
        title: over the figure.

    Raises:
        InputError: where the views are not a whole number for each image.
    """
    columns = [("image", images)]
    for group in views:
        if len(group) % len(images):
            raise InputError(f"{len(group)} views of {len(images)} images: not a whole number for each.")
        columns += [(f"{group.shape[-1]} px", view) for view in denormalize(group).split(len(images)) if len(view)]
    return picture_grid(columns, title)
