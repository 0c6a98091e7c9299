"""SimSiam as a user writes it in an own file: the contract test covers it like minissl's methods.

Chen and He, Exploring Simple Siamese Representation Learning, 2020 (arXiv:2011.10566).

Shapes: B images, D the encoder's width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.multi_view import simclr_views
from minissl.methods.base import Batch, Method
from minissl.models.outputs import Encoder


class SimSiam(Method):
    """Prediction of one view's projection from the other's, with a stop-gradient in place of negatives.

    Args:
        encoder: maps normalized images to Tokens.
        crop_size: side of a view in pixels.
        hidden_dim: width of the predictor.
    """

    def __init__(self, encoder: Encoder, *, crop_size: int = 32, hidden_dim: int = 64):
        super().__init__()
        self.encoder: Encoder = encoder
        self.crop_size, dim = crop_size, encoder.embed_dim
        self.projector = nn.Linear(dim, dim)
        self.predictor = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        z = self.projector(self.encoder.cls_tokens(simclr_views(batch.images, self.crop_size)))  # (2B, D)
        p1, p2 = self.predictor(z).float().chunk(2)
        z1, z2 = z.detach().float().chunk(2)
        similarity = F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()
        return {"loss": -similarity / 2}
