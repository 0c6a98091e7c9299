"""Compute what losses of several papers share: cosine similarities, Sinkhorn-Knopp assignment, the KoLeo regularizer.

DINOv2 (Oquab et al., 2023, arXiv:2304.07193) uses both. minissl's CPU preset of DINO uses them too, because in a few
hundred steps DINO's centering does not prevent collapse.

Shapes: N rows of K logits; B features of D dimensions; W processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.distributed import gather_rows, log_softmax_over_rows, rank


def cosine_similarities(x: Tensor, y: Tensor) -> Tensor:
    """Compute the cosines (N, M) of rows x (N, D) and y (M, D), which are normalized here.

    In float32 at least: divided by the temperature of a contrastive loss, bfloat16's two digits would cost the gradient
    a few percent.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.to(dtype), dim=-1) @ F.normalize(y.to(dtype), dim=-1).mT


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Compute target distributions that use all prototypes about equally, by normalizing columns and rows in turn.

    Cuturi, Sinkhorn Distances, 2013 (arXiv:1306.0895), used in place of centering as in SwAV (Caron et al., 2020,
    arXiv:2006.09882) and DINOv2. It runs on logarithms, so that no exponential of a logit overflows and no prototype's
    sum underflows to 0. With several processes, columns are normalized over the rows of all.

    Args:
        logits: (N, K) of the teacher, N at least 2: the targets of a single row are uniform.
        temperature: T of the teacher; logits are divided by it.
        iterations: number of alternations; each ends with the rows.

    Returns:
        Probabilities (N, K) without a gradient; each row sums to 1, and each column to about N / K.
    """
    log_probs = logits / temperature
    for _ in range(iterations):
        log_probs = log_softmax_over_rows(log_probs)  # equal mass for every prototype
        log_probs = log_probs.log_softmax(dim=1)  # mass 1 for every image
    return log_probs.exp()


def koleo_loss(x: Tensor) -> Tensor:
    """Compute minus the mean logarithm of the distance to the nearest neighbor, which spreads features over the sphere.

    Sablayrolles et al., Spreading Vectors for Similarity Search, 2018 (arXiv:1806.03198), in DINOv2's form. With
    several processes, neighbors are searched among the rows of all.

    Args:
        x: features (B, D), B at least 2; they are L2-normalized here.

    Returns:
        A scalar, at least -ln 2, computed in float32. Equal features have a loss of about 17 and no useful gradient.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() if x.dtype != torch.float64 else x
        x = F.normalize(x, dim=-1, eps=1e-8)
        candidates = gather_rows(x)  # (W B, D)
        with torch.no_grad():
            own = torch.arange(len(x), device=x.device)[:, None] + rank() * len(x)  # (B, 1)
            nearest = (x @ candidates.mT).scatter_(1, own, -1).argmax(dim=-1)  # (B,)
        return -((x - candidates[nearest] + 1e-8).norm(dim=-1) + 1e-8).log().mean()
