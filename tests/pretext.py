"""Images and steps that the tests of the four pretext tasks share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.data.batch import Batch
from minissl.methods.base import Method
from minissl.methods.registry import create_method
from minissl.training.config import TrainConfig
from minissl.training.sampler import seed_step
from minissl.training.trainer import create_optimizer, training_step
from tests.golden import tiny_vit


def build(name: str, **options) -> Method:
    """Build a pretext method around a tiny ViT, for crops that are whole images of 16 pixels."""
    torch.manual_seed(0)
    return create_method(name, tiny_vit(), crop_size=16, crop_scale=(1.0, 1.0), **options)


def smooth_images(n: int, size: int = 16, seed: int = 0) -> Tensor:
    """Return images (n, 3, size, size) in [0, 1] of smooth colors, darker at the bottom, so that there is structure."""
    colors = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    light = torch.linspace(1, 0.3, size).view(-1, 1)
    return F.interpolate(colors, size=(size, size), mode="bilinear") * light


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def losses_of_training(method: Method, steps: int = 30) -> list[float]:
    """Train on eight images. Returns the loss of each step."""
    config = TrainConfig(lr=3e-3, warmup_fraction=0.0, precision="fp32")
    batch, optimizer, losses = Batch((smooth_images(8) * 255).to(torch.uint8)), create_optimizer(method, config), []
    for step in range(steps):
        seed_step(0, step)
        losses.append(training_step(method, optimizer, batch, 0.1, config)["loss"].item())
    return losses


def is_learned(method: Method) -> bool:
    """Return whether training reduces the loss by a tenth."""
    losses = losses_of_training(method)
    return sum(losses[-5:]) < 0.9 * sum(losses[:5])
