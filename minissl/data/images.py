"""A set of images in memory, and what is known of them.

Shapes: N images of S x S pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64 indices into `classes`, or None.
        classes: names.
        masks: (N, S, S) uint8, 0 where the background is, or None.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def some(self, n: int) -> "Images":
        """At most n of them, evenly spaced: a folder's images come class by class, and all classes should be there."""
        rows = torch.arange(min(n, len(self))) * len(self) // min(n, len(self))
        parts = {name: getattr(self, name) for name in ("images", "labels", "masks")}
        return replace(self, **{name: None if part is None else part[rows] for name, part in parts.items()})

    def to(self, device: torch.device) -> "Images":
        """The images and labels on a device; masks stay, they are only looked at."""
        return replace(
            self, images=self.images.to(device), labels=None if self.labels is None else self.labels.to(device)
        )
