"""A batch of images, as every method receives it. Shapes: B images of H x W pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images as they are stored, and the annotations the data set has; all tensors on one device."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor | None = None  # (B,) int64
    captions: list[tuple[str, ...]] | None = None  # all captions of each image
    factors: dict[str, Tensor] | None = None  # further labels by name, each (B,) int64

    def to(self, device: torch.device) -> Batch:
        """Copy all tensors to a device, without waiting for the copy."""
        return Batch(*(_to(field, device) for field in self))

    def split(self, parts: int) -> list[Batch]:
        """Split into equal parts along B, in order."""
        n = len(self.images) // parts
        return [Batch(*(_rows(field, i * n, n) for field in self)) for i in range(parts)]


def _rows(field: Any, start: int, n: int) -> Any:
    if isinstance(field, dict):
        return {name: _rows(tensor, start, n) for name, tensor in field.items()}
    return None if field is None else field[start : start + n]


def _to(field: Any, device: torch.device) -> Any:
    if isinstance(field, dict):
        return {name: _to(tensor, device) for name, tensor in field.items()}
    return field.to(device, non_blocking=True) if isinstance(field, Tensor) else field
