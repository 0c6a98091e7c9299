"""SimCLR: contrast two augmented views of each image with the views of other images.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020 (arXiv:2002.05709). Among the
2B - 1 other views of a batch, each view is matched to its positive, the other view of the same image; all others are
negatives. The representation becomes invariant to the augmentation, so the choice of augmentation matters most.

Shapes: B images on each of W processes, two views each, stored view by view: row = view * B + image; D the encoder's
width, P dimensions of the projection.
"""

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.multi_view import simclr_views
from minissl.distributed import gather_rows, rank
from minissl.methods.base import Batch, Method
from minissl.methods.losses import cosine_similarities
from minissl.models.outputs import Encoder


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Compute NT-Xent, the normalized temperature-scaled cross-entropy (equation 1), averaged over all 2B views.

    For each view i with positive p: -log of e^(cos(i, p) / T) over the sum of e^(cos(i, j) / T) of all j other than i.

    Args:
        z1: (B, P) float; L2-normalized here.
        z2: (B, P) float, likewise; row i is the other view of image i.
        temperature: T; lower values weight the hardest negatives more.

    Returns:
        A scalar; ln(2 W B - 1) at chance level. With several processes, the others' views are negatives too. The
        authors' code adds the means of the two views, which is twice this.
    """
    candidates = torch.cat([gather_rows(z1), gather_rows(z2)])  # (2 W B, P)
    logits = cosine_similarities(torch.cat([z1, z2]), candidates) / temperature  # (2B, 2 W B)
    first = torch.arange(len(z1), device=z1.device) + rank() * len(z1)  # (B,) index of each first view
    second = first + len(candidates) // 2
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, torch.cat([first, second])[:, None], True)
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), torch.cat([second, first]))


class ProjectionHead(nn.Module):
    """Map representations (B, D) to projections (B, P) by an MLP with batch norm; it is discarded after training.

    The last batch norm has no shift, and no ReLU follows it.

    Args:
        dim: D.
        hidden_dim: width of the hidden layers.
        projection_dim: P.
        num_layers: number of linear layers; 2 in SimCLR, 3 in SimCLRv2 (arXiv:2006.10029).
    """

    def __init__(self, dim: int, hidden_dim: int, projection_dim: int = 128, num_layers: int = 2):
        super().__init__()
        widths = [dim] + [hidden_dim] * (num_layers - 1) + [projection_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            norm = nn.BatchNorm1d(after)
            layers += [nn.Linear(before, after, bias=False), norm, nn.ReLU()]
        norm.bias.requires_grad_(False)  # the last norm has no shift,
        self.layers = nn.Sequential(*layers[:-1])  # and no ReLU follows it

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SimCLR(Method):
    """Train an encoder by contrasting two augmented views of each image with those of other images.

    Args:
        encoder: maps normalized images to Tokens; its class token is projected.
        crop_size: side of a view in pixels.
        crop_scale: range of a crop's area, as a fraction of the image's.
        jitter_strength: s of the color jitter: 0.8 s for brightness, contrast and saturation, 0.2 s for hue.
        blur_prob: probability of a Gaussian blur.
        temperature: T of the loss.
        hidden_dim: width of the projection head's hidden layers; 0 takes the encoder's width D.
        projection_dim: P.
        projection_layers: number of linear layers of the projection head.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Trains in minutes on two CPU cores; the paper's ResNet-50 had batches of 4,096 on 128 TPU cores.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",  # a linear patch embedding learns next to nothing in this time
            "encoder.init_std": 0.088,  # 1 / sqrt(128): a narrow ViT learns faster from larger weights
            "image_size": 64,
            "crop_size": 32,
            "crop_scale": (0.2, 1.0),  # from 0.08 in the paper: so small a part of 32 pixels shows no object
            "jitter_strength": 0.5,  # the paper's for CIFAR-10
            "blur_prob": 0.0,  # the paper's for CIFAR-10
            "temperature": 0.2,  # 0.5 in the paper, for CIFAR-10 and hundreds of epochs
            "batch_size": 256,
            "lr": 2e-3,
            "final_weight_decay": 0.04,  # constant
            "clip_grad": 0.0,  # none in the paper
            "minutes": 8.0,
        },
        # The paper's ResNet-50 on one GPU.
        "gpu": {
            "encoder.name": "resnet50",
            "image_size": 256,
            "temperature": 0.1,  # the paper's for ImageNet
            "batch_size": 512,  # 4,096 in the paper
            "optimizer": "lars",  # the paper's
            "lr": 1.7,  # the paper's rule for small batches, 0.075 * sqrt(batch size)
            "weight_decay": 1e-6,  # the paper's, constant
            "final_weight_decay": 1e-6,
            "clip_grad": 0.0,  # none in the paper
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: Encoder,
        *,
        crop_size: int = 224,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        jitter_strength: float = 1.0,
        blur_prob: float = 0.5,
        temperature: float = 0.5,
        hidden_dim: int = 0,
        projection_dim: int = 128,
        projection_layers: int = 2,
    ):
        super().__init__()
        self.encoder: Encoder = encoder
        dim = encoder.embed_dim
        self.projector = ProjectionHead(dim, hidden_dim or dim, projection_dim, projection_layers)
        self.crop_size, self.crop_scale = crop_size, crop_scale
        self.jitter_strength, self.blur_prob, self.temperature = jitter_strength, blur_prob, temperature

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute `nt_xent` of two views of each image; "positive_similarity" is the mean cosine of the two."""
        views = simclr_views(batch.images, self.crop_size, self.crop_scale, self.jitter_strength, self.blur_prob)
        z1, z2 = self.projector(self.encoder.cls_tokens(views)).float().chunk(2)  # (B, P) each
        similarity = F.cosine_similarity(z1, z2).mean().detach()
        return {"loss": nt_xent(z1, z2, self.temperature), "positive_similarity": similarity}

    def num_candidates(self, batch_size: int) -> dict[str, int]:
        return {"loss": 2 * batch_size - 1}  # the other views of the batch
