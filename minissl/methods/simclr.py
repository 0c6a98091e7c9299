"""SimCLR: two views of one image agree, views of different images part.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020 (arXiv:2002.05709). Of 2B views
each has to find its partner among the 2B - 1 others. What the two views share is learnt, what the augmentation changes
is not; so the augmentation is the lesson.

Shapes: B images, two views each, stored view by view: row = view * B + image; D the encoder's width, P of the space in
which views are compared.
"""

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.method import Batch, class_token
from minissl.parallel import gather_rows, rank
from minissl.views import simclr


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """For each of the 2B views i, partner p: -log of e^(cos(i, p) / T) over the sum of e^(cos(i, j) / T), all j but i.

    The mean, eq. 1. With several processes the others' views are negatives too.

    Args:
        z1: (B, P), of any length.
        z2: (B, P), the i-th is the other view of the same image.
        temperature: T; low ones listen to the hardest negatives.

    Returns:
        A scalar; ln(2B - 1) when all views look alike. The authors' code adds the two views' means, twice this.
    """
    z1, z2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    others = torch.cat([gather_rows(z1), gather_rows(z2)])  # (2 W B, P)
    logits = torch.cat([z1, z2]) @ others.mT / temperature  # (2B, 2 W B)
    own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)  # (B,) where our first views stand
    first, second = own, own + len(others) // 2
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter(1, torch.cat([first, second])[:, None], True)
    return F.cross_entropy(logits.masked_fill(itself, -torch.inf), torch.cat([second, first]))


class ProjectionHead(nn.Module):
    """Linear layers with batch norms, (B, D) to (B, P): what the loss compares, and what is thrown away afterwards.

    Args:
        dim: D.
        hidden: width of the layers between.
        out: P.
        layers: how many there are; 2 in SimCLR, 3 in its second version (arXiv:2006.10029).
    """

    def __init__(self, dim: int, hidden: int, out: int = 128, layers: int = 2):
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1) + [out]
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        parts.pop()  # no ReLU at the end
        parts[-1].bias.requires_grad_(False)  # and no shift
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SimCLR(nn.Module):
    """Contrastive learning of two views.

    Args:
        encoder: images -> Tokens, with its width as `dim`.
        size: pixels of a view.
        scale: share of the image's area a view is cut from.
        strength: of the colour jitter.
        blur: how likely a view is blurred.
        temperature: of the softmax over all views of the batch.
        hidden: width of the projection head; 0 takes the encoder's.
        projection: P.
        layers: of the projection head.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # What learns in minutes on two cores; the paper's ResNet-50 saw batches of 4,096 on 128 TPU cores.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",
            "encoder.init_std": 0.088,
            "image_size": 64,
            "size": 32,
            "scale": (0.2, 1.0),  # from 0.08 in the paper: so little of 32 pixels shows nothing
            "strength": 0.5,  # the paper's for CIFAR-10
            "blur": 0.0,  # the paper's for CIFAR-10
            "temperature": 0.2,  # 0.5 in the paper, for CIFAR-10 and hundreds of epochs
            "batch_size": 256,
            "lr": 2e-3,
            "final_weight_decay": 0.04,
            "clip": 0.0,
            "minutes": 8.0,
        },
        # The paper's ResNet-50 on one GPU.
        "gpu": {
            "encoder.name": "resnet50",
            "image_size": 256,
            "temperature": 0.1,
            "batch_size": 512,  # 4,096 in the paper
            "optimizer": "lars",
            "lr": 1.7,  # the paper's rule for small batches, 0.075 * sqrt(batch size)
            "weight_decay": 1e-6,
            "final_weight_decay": 1e-6,
            "clip": 0.0,
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: nn.Module,
        *,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        strength: float = 1.0,
        blur: float = 0.5,
        temperature: float = 0.5,
        hidden: int = 0,
        projection: int = 128,
        layers: int = 2,
    ):
        super().__init__()
        self.encoder = encoder
        self.projector = ProjectionHead(encoder.dim, hidden or encoder.dim, projection, layers)
        self.views = {"size": size, "scale": scale, "strength": strength, "blur": blur}
        self.temperature = temperature

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        views = simclr(batch.images, **self.views)  # (2B, 3, S, S)
        z1, z2 = self.projector(class_token(self.encoder, views)).float().chunk(2)  # (B, P) each
        return {"loss": nt_xent(z1, z2, self.temperature), "partners": F.cosine_similarity(z1, z2).mean().detach()}

    def guesses(self, batch_size: int) -> dict[str, int]:
        return {"loss": 2 * batch_size - 1}  # the other views

    def after_step(self, progress: float) -> None:
        """Nothing moves by itself."""
