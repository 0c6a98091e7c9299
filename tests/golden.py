"""The deterministic input that golden numbers were measured on, and a tiny encoder for tests."""

import torch
from torch import Tensor, nn

from minissl.vit import ViT


def wave(*shape: int, c: float = 0.7, phase: float = 0.0) -> Tensor:
    """sin(c n + phase), n the row-major index from 0, float64."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(c * n + phase).view(shape)


def tiny_vit(patch_size: int = 4, img_size: int = 16, stem: str = "patch", drop_path: float = 0.0) -> ViT:
    """Width 32, two blocks, four heads."""
    return ViT(32, 2, 4, patch_size, img_size, stem, drop_path)


def shake(model: nn.Module) -> nn.Module:
    """Random weights everywhere: what starts at 0, 1 or 1e-5 would hide mistakes."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05 if p.ndim > 1 else 0.5)
    return model.eval()
