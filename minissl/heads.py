"""The head of DINO and its children: from an encoder's vector to scores of prototypes.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021 (arXiv:2104.14294), appendix C; DINOv3
(Siméoni et al., 2025, arXiv:2508.10104) leaves out one of its two normalisations. Shapes: D the encoder's width, K
prototypes.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """A three-layer MLP, a point on the sphere, and its cosine with each of K prototypes (appendix C).

    Args:
        dim: the encoder's width D.
        prototypes: K.
        hidden: width of the two hidden layers.
        bottleneck: dimensions of the sphere.
        batch_norm: normalise every layer over the batch, teacher and student each by its own statistics.
        cosines: False, as in DINOv3, takes the prototypes as they are: a plain last layer, whose logits have no bound.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        cosines: bool = True,
    ):
        super().__init__()
        self.cosines = cosines

        def norm() -> nn.Module:
            return nn.BatchNorm1d(hidden, track_running_stats=False) if batch_norm else nn.Identity()

        self.mlp = nn.Sequential(
            *(nn.Linear(dim, hidden), norm(), nn.GELU()),
            *(nn.Linear(hidden, hidden), norm(), nn.GELU()),
            nn.Linear(hidden, bottleneck),
            nn.BatchNorm1d(bottleneck, affine=False, track_running_stats=False) if batch_norm else nn.Identity(),
        )
        for layer in (self.mlp[0], self.mlp[3], self.mlp[6]):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        if not cosines:
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)

    def forward(self, x: Tensor, freeze_last: bool = False) -> Tensor:
        """(..., D) to logits (..., K), cosines in [-1, 1]; `freeze_last` lets no gradient reach the prototypes."""
        x = F.normalize(self.mlp(x), dim=-1)  # (..., bottleneck)
        weight = self.last_layer.weight.detach() if freeze_last else self.last_layer.weight
        return x @ (F.normalize(weight, dim=-1) if self.cosines else weight).mT
