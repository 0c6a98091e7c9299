"""dino.txt: align a frozen self-supervised encoder with text, for images and patches.

Jose et al., DINOv2 Meets Text, 2024 (arXiv:2412.16334), as used in DINOv3 (Siméoni et al., 2025, arXiv:2508.10104). The
encoder is frozen. A few transformer blocks on its tokens and a text encoder are trained from scratch with CLIP's loss.
The image embedding is the class token concatenated with the mean patch token, so that each patch can be compared with
text too, which gives open-vocabulary segmentation. Here a linear layer, absent from the authors' code, projects it to E
dimensions.

Shapes: B images and captions, a grid (h, w) of N patches, width D, E dimensions of the shared embedding space.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minissl.methods.clip import CLIP
from minissl.models.layers import Block
from minissl.models.outputs import Encoder, Tokens


class DINOtxt(CLIP):
    """Train a text encoder, and a head on a frozen image encoder, contrastively.

    Further options are those of `CLIP`.

    Args:
        encoder: a pretrained one (--encoder.weights RUN), maps normalized images to Tokens; it is frozen.
        head_depth: number of transformer blocks on the encoder's tokens.
        head_num_heads: number of attention heads of each of these blocks.
    """

    requires_pretrained_encoder: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # CLIP's CPU preset, with the encoder of DINOv3's.
        "cpu": CLIP.presets["cpu"]
        | {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",
            "encoder.pos_embed": "rope",
            "encoder.num_registers": 4,
            "head_depth": 1,  # 2 in the paper, on 12 to 24 blocks of the encoder
            "minutes": 7.0,  # the encoder is not trained
        },
        "gpu": CLIP.presets["gpu"],  # never run with a DINOv3 encoder so far
    }

    def __init__(self, encoder: Encoder, *, head_depth: int = 2, head_num_heads: int = 4, **options: Any):
        super().__init__(encoder.requires_grad_(False), **options)
        dim = encoder.embed_dim
        blocks = [Block(dim, head_num_heads) for _ in range(head_depth)]
        self.head = nn.Sequential(*blocks, nn.LayerNorm(dim))
        for layer in [m for m in self.head.modules() if isinstance(m, nn.Linear)]:
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5)
            nn.init.zeros_(layer.bias)
        self.visual_projection = nn.Linear(2 * dim, self.visual_projection.out_features, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=dim**-0.5)

    def train(self, mode: bool = True) -> "DINOtxt":
        """Set the training mode; the frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def tokens(self, images: Tensor) -> Tokens:
        """Encode normalized images (B, 3, H, W) with the frozen encoder and the head to (B, D) and (B, h, w, D)."""
        with torch.no_grad():
            cls, patches = self.encoder(images)
        x = self.head(torch.cat([cls[:, None], patches.flatten(1, 2)], dim=1))  # (B, 1 + N, D)
        return Tokens(x[:, 0], x[:, 1:].unflatten(1, patches.shape[1:3]))

    def embed_images(self, images: Tensor) -> Tensor:
        cls, patches = self.tokens(images)
        return self.visual_projection(torch.cat([cls, patches.mean(dim=(1, 2))], dim=-1))

    def embed_patches(self, images: Tensor) -> Tensor:
        """Embed the patches of normalized images (B, 3, H, W) as (B, h, w, E), which are not L2-normalized.

        An image's embedding is the mean of its patches' embeddings plus the projection of its class token.
        """
        patches = self.tokens(images).patches
        return patches @ self.visual_projection.weight[:, patches.shape[-1] :].mT
