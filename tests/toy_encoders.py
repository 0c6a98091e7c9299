"""Encoders without weights, whose outputs are known, for tests of evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.models.outputs import Encoder, Tokens


class MeanColorEncoder(Encoder):
    """Patches of 4 x 4 pixels; a patch token is the mean color of its pixels, and a constant 1."""

    embed_dim, patch_size = 4, 4

    def forward(self, images: Tensor) -> Tokens:
        patches = F.avg_pool2d(images, 4).permute(0, 2, 3, 1)  # (B, h, w, 3)
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)
        return Tokens(patches.mean((1, 2)), patches)


class ConstantEncoder(MeanColorEncoder):
    """All tokens are equal."""

    def forward(self, images: Tensor) -> Tokens:
        return Tokens(*(torch.ones_like(tokens) for tokens in super().forward(images)))


class BrightnessAttention(MeanColorEncoder):
    """Attends to bright patches."""

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        return F.avg_pool2d(images.mean(1, keepdim=True), 4).sub(-2.2).pow(8)


class UniformAttention(MeanColorEncoder):
    """Attends to all of 4 x 4 patches alike."""

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        return torch.ones(len(images), 1, 4, 4)


class LeftRightAttention(MeanColorEncoder):
    """Two heads on a grid of 2 x 2: the first attends to the left, the second to the right."""

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        left = torch.tensor([[0.9, 0.1], [0.9, 0.1]]) / 2
        return torch.stack([left, left.flip(1)]).expand(len(images), 2, 2, 2)
