"""Kept in balance: prototypes that are all used, by Sinkhorn-Knopp, and vectors that are apart, by KoLeo.

DINOv2 (Oquab et al., 2023, arXiv:2304.07193) has both. Our presets for a CPU have them in DINO already, because a few
hundred steps are not enough without. Shapes: N rows of K logits; B vectors of D numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.parallel import gather_rows, log_softmax_rows, rank


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets (N, K) that use all prototypes about equally: columns and rows are brought to equal sums in turn.

    Cuturi, Sinkhorn Distances, 2013 (arXiv:1306.0895), as SwAV and DINOv2 use it in place of the centre. Sums are taken
    of logarithms, so no logit overflows and no prototype is lost.

    Args:
        logits: (N, K), at least 2 rows: a single one can only be uniform.
        temperature: the teacher's.
        iterations: each ends on the rows, so that they sum to 1.
    """
    scores = logits / temperature
    for _ in range(iterations):
        scores = log_softmax_rows(scores)  # every prototype gets as much
        scores = scores.log_softmax(dim=1)  # every image gives 1
    return scores.exp()


def koleo(x: Tensor) -> Tensor:
    """How crowded the vectors are: minus the mean logarithm of the distance to the nearest other one.

    Sablayrolles et al., Spreading Vectors, 2018 (arXiv:1806.03198), in DINOv2's form. DINO has no such term; it is here
    because a few hundred steps do not spread features without it.

    Args:
        x: (B, D), B at least 2; normalised inside. Two equal vectors cost about 17 and have no useful gradient;
            otherwise the scalar is at least -ln 2.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() if x.dtype != torch.float64 else x
        x = F.normalize(x, dim=-1, eps=1e-8)
        others = gather_rows(x)  # (W B, D)
        with torch.no_grad():
            itself = torch.arange(len(x), device=x.device)[:, None] + rank() * len(x)
            nearest = (x @ others.mT).scatter_(1, itself, -1).argmax(dim=-1)  # (B,)
        return -((x - others[nearest] + 1e-8).norm(dim=-1) + 1e-8).log().mean()
