"""dino.txt: words for an encoder that learnt without any, down to its patches.

Jose et al., DINOv2 Meets Text, 2024 (arXiv:2412.16334), as DINOv3 (Siméoni et al., 2025, arXiv:2508.10104) uses it. The
encoder stays as it is. A few blocks on its tokens, and a text encoder from nothing, learn as in CLIP that an image and
its caption agree, where the image is its class token and the mean of its patches, side by side. What agrees with the
mean of patches can be asked of each patch: which of them does a word mean?

Shapes: B images and captions, a grid (h, w), width D, E dimensions of the space that images and sentences share.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minissl.method import Tokens
from minissl.methods.clip import CLIP
from minissl.transformer import Block


class DINOtxt(CLIP):
    """A frozen encoder and a text encoder that learn to agree.

    Args:
        encoder: images -> Tokens, trained before (--encoder.weights RUN); it gets no gradient.
        head_depth: blocks on its tokens.
        head_heads: of each of them.
    """

    frozen: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": CLIP.presets["cpu"]
        | {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",
            "encoder.positions": "rotary",  # these four as of DINOv3's preset
            "encoder.registers": 4,
            "head_depth": 1,  # 2 in the paper, on 12 to 24
            "minutes": 7.0,
        },
        "gpu": CLIP.presets["gpu"],
    }

    def __init__(self, encoder: nn.Module, *, head_depth: int = 2, head_heads: int = 4, **options: Any):
        super().__init__(encoder.requires_grad_(False), **options)
        self.head = nn.Sequential(
            *(Block(encoder.dim, head_heads) for _ in range(head_depth)), nn.LayerNorm(encoder.dim)
        )
        for layer in [m for m in self.head.modules() if isinstance(m, nn.Linear)]:
            nn.init.trunc_normal_(layer.weight, std=encoder.dim**-0.5)
            nn.init.zeros_(layer.bias)
        self.visual_projection = nn.Linear(2 * encoder.dim, self.visual_projection.out_features, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=encoder.dim**-0.5)

    def train(self, mode: bool = True) -> "DINOtxt":
        """As any module; but the encoder is in evaluation mode always."""
        super().train(mode)
        self.encoder.eval()
        return self

    def tokens(self, images: Tensor) -> Tokens:
        """Normalised images (B, 3, H, W) to what the head makes of the encoder's tokens."""
        with torch.no_grad():
            cls, patches = self.encoder(images)
        x = self.head(torch.cat([cls[:, None], patches.flatten(1, 2)], dim=1))  # (B, 1 + N, D)
        return Tokens(x[:, 0], x[:, 1:].unflatten(1, patches.shape[1:3]))

    def embed_images(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to vectors (B, E), of any length."""
        cls, patches = self.tokens(images)
        return self.visual_projection(torch.cat([cls, patches.mean(dim=(1, 2))], dim=-1))

    def embed_patches(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to what each patch adds to its image's vector, (B, h, w, E)."""
        patches = self.tokens(images).patches
        return patches @ self.visual_projection.weight[:, patches.shape[-1] :].mT
