"""The deterministic input that golden numbers were measured on, and a tiny encoder for tests."""

from typing import Any

import torch
from torch import Tensor, nn

from minissl.models.vit import ViT


def wave(*shape: int, c: float = 0.7, phase: float = 0.0) -> Tensor:
    """Return sin(c n + phase) in float64, where n is the row-major index from 0."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(c * n + phase).view(shape)


def tiny_vit(
    patch_size: int = 4, image_size: int = 16, stem: str = "patch", drop_path: float = 0.0, **options: Any
) -> ViT:
    """Build a ViT of width 32 with two blocks and four heads."""
    return ViT(32, 2, 4, patch_size, image_size, stem, drop_path, **options)


def randomize_weights(model: nn.Module) -> nn.Module:
    """Randomize all parameters, in place: initial values of 0, 1 or 1e-5 would hide errors. Returns it in eval mode."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05 if p.ndim > 1 else 0.5)
    return model.eval()
