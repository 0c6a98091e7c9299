"""How features lie on the sphere: do two views of an image meet, and do different images spread?

Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere,
2020 (arXiv:2005.10242). Shapes: B images, D dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(a: Tensor, b: Tensor) -> float:
    """The mean squared distance of partners (B, D) and (B, D), normalised here; 0 when they meet, 2 for strangers."""
    return float((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean())


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t distance^2) over all pairs of (B, D); 0 where all are one point, -4 where spread."""
    return float(torch.pdist(F.normalize(x, dim=-1)).square().mul(-t).exp().mean().log())


def spread(x: Tensor) -> float:
    """The deviation of a number of normalised features (B, D), their mean; 0 in collapse, at most D^-0.5.

    Chen and He, SimSiam, 2020 (arXiv:2011.10566), figure 2.
    """
    return float(F.normalize(x, dim=-1).std(dim=0, correction=0).mean())
