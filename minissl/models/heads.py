"""Projection head of the DINO family: from a representation to logits over prototypes.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021 (arXiv:2104.14294), appendix C. DINOv3
(Siméoni et al., 2025, arXiv:2508.10104) omits the normalization of the prototypes.

Shapes: D the encoder's width, K prototypes.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """Three-layer MLP with an L2-normalized bottleneck, followed by cosine similarities with K prototypes.

    Args:
        dim: D.
        num_prototypes: K.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: dimension of the normalized bottleneck.
        use_bn: apply batch norm after each layer; teacher and student each use their own batch statistics.
        normalize_prototypes: normalize the prototypes, so that logits are cosines. With False, as in DINOv3, the last
            layer is linear and logits are unbounded.
    """

    def __init__(
        self,
        dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn: bool = False,
        normalize_prototypes: bool = True,
    ):
        super().__init__()
        self.normalize_prototypes = normalize_prototypes

        def norm() -> nn.Module:
            return nn.BatchNorm1d(hidden_dim, track_running_stats=False) if use_bn else nn.Identity()

        linear = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, bottleneck_dim)
        self.mlp = nn.Sequential(
            *(linear[0], norm(), nn.GELU()),
            *(linear[1], norm(), nn.GELU()),
            linear[2],
            nn.BatchNorm1d(bottleneck_dim, affine=False, track_running_stats=False) if use_bn else nn.Identity(),
        )
        for layer in linear:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        if not normalize_prototypes:
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)

    def forward(self, x: Tensor, freeze_last_layer: bool = False) -> Tensor:
        """Compute logits (..., K) of features (..., D); cosines in [-1, 1] if the prototypes are normalized.

        Args:
            x: features (..., D).
            freeze_last_layer: stop the gradient of the prototypes.
        """
        x = F.normalize(self.mlp(x), dim=-1)  # (..., bottleneck)
        weight = self.last_layer.weight.detach() if freeze_last_layer else self.last_layer.weight
        return x @ (F.normalize(weight, dim=-1) if self.normalize_prototypes else weight).mT
