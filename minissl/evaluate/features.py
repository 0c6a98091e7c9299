"""Features of whole data sets, and how many of their dimensions are in use.

Shapes: N images, D the encoder's width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.augment import normalize
from minissl.method import Tokens

POOLS = ("cls", "both")


def pooled(tokens: Tokens, pool: str) -> Tensor:
    """One vector an image: the class token (B, D), or "both", it and the mean of the patches, (B, 2D).

    DINOv2's linear classifier (arXiv:2304.07193, appendix B.3) reads both; some tasks train the patches alone.
    """
    return tokens.cls if pool == "cls" else torch.cat([tokens.cls, tokens.patches.mean(dim=(1, 2))], dim=-1)


@torch.no_grad()
def extract(
    encoder: nn.Module, images: Tensor, size: int | None = None, batch_size: int = 256, pool: str = "cls"
) -> Tensor:
    """The encoder's vectors for images, in evaluation mode.

    Args:
        encoder: images -> Tokens, on the device of the images.
        images: (N, 3, H, W) uint8.
        size: pixels a side to bring them to first; as they are if None.
        batch_size: images at a time.
        pool: what is read of an image's tokens, one of POOLS; see `pooled`.

    Returns:
        (N, D) float32, or (N, 2D), on the device of the images; not normalised.
    """
    training = encoder.training
    encoder.eval()
    out = []
    for batch in images.split(batch_size):
        batch = batch.float() / 255
        if size and batch.shape[-1] != size:
            batch = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        out.append(pooled(encoder(normalize(batch)), pool).float())
    encoder.train(training)
    return torch.cat(out)


def rank_me(features: Tensor) -> float:
    """How many dimensions features (N, D) really use: exp of the entropy of their singular values, 1 to min(N, D).

    Garrido et al., RankMe, 2022 (arXiv:2210.02885), eq. 1. Needs no labels; 1 means collapse.
    """
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))
