"""The output of every encoder, and the base class of encoders.

Shapes: B images of H x W pixels, D the encoder's width, (h, w) its grid of patches.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """Output of an encoder for B images."""

    cls: Tensor  # (B, D)        class token: one representation per image
    patches: Tensor  # (B, h, w, D)  one representation per patch, on its grid


class Encoder(nn.Module, ABC):
    """Map normalized images (B, 3, H, W) float32 to `Tokens`.

    Attributes:
        embed_dim: D.
        patch_size: side in pixels of the image region that one patch token stands for.
        supports_masking: whether `forward` takes `masks` and `mask_token`, as masked image modeling needs.
        config: arguments of `create_encoder` that build it again; None for an encoder built in another way.
    """

    embed_dim: int
    patch_size: int
    supports_masking: bool = False
    config: dict[str, Any] | None = None

    @abstractmethod
    def forward(self, images: Tensor) -> Tokens:
        """Encode normalized images (B, 3, H, W)."""

    def cls_tokens(self, images: Tensor) -> Tensor:
        """Return the class tokens (B, D) alone; an encoder may skip work that only patch tokens need."""
        return self(images).cls

    @torch.no_grad()
    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Return maps (B, heads, h, w) of where the representation of the image comes from; each sums to at most 1.

        An encoder without attention averages its patches: here the map is the norm of each patch over their sum.
        `layer` is for encoders that have attention.
        """
        norms = self(images).patches.norm(dim=-1)[:, None]  # (B, 1, h, w)
        return norms / norms.sum(dim=(-2, -1), keepdim=True)
