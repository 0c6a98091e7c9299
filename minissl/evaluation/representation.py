"""Measure how features are distributed on the unit hypersphere: alignment, uniformity and standard deviation.

Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere,
2020 (arXiv:2005.10242). All functions L2-normalize the features.

Shapes: B images, D dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(a: Tensor, b: Tensor) -> float:
    """Compute the mean squared distance of positive pairs, rows of (B, D) and (B, D): 0 if equal, 4 at most.

    It is about 2 if the two features of a pair are unrelated.
    """
    return float((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean())


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """Compute ln(mean of exp(-t d^2)), with the distance d of each pair of two different rows of features (B, D).

    It is 0 if all features are equal, else negative, for t > 0. With t = 2 it is about -4 for a uniform distribution on
    the sphere in many dimensions.
    """
    return float(torch.pdist(F.normalize(x, dim=-1)).square().mul(-t).exp().mean().log())


def feature_std(x: Tensor) -> float:
    """Compute the standard deviation (divisor B) of each normalized feature dimension of (B, D), averaged over D.

    Chen and He, SimSiam, 2020 (arXiv:2011.10566), figure 2. It is 0 in a collapse and at most D^-0.5.
    """
    return float(F.normalize(x, dim=-1).std(dim=0, correction=0).mean())
