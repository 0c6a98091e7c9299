"""The EMA teacher: a frozen copy of a network whose weights are an exponential moving average of the student's.

He et al., Momentum Contrast, 2019 (arXiv:1911.05722); Grill et al., BYOL, 2020 (arXiv:2006.07733).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minissl.models.layers import DropPath
from minissl.models.position_encoding import RopeAugmentation


class EMATeacher(nn.Module):
    """A copy of a network without gradients, drop path or RoPE coordinate augmentation.

    It follows the training mode of the method around it: batch norms use the teacher's own batch statistics while
    training, as in DINO's code.

    Args:
        student: the network to copy; it is not changed.
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
            if isinstance(getattr(module, "rope_augmentation", None), RopeAugmentation):
                module.rope_augmentation = RopeAugmentation()  # type: ignore[assignment]

    @torch.no_grad()
    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.network(*inputs, **options)

    @torch.no_grad()
    def cls_tokens(self, images: Tensor) -> Tensor:
        """Return the class tokens (B, D) of the copied encoder."""
        return self.network.cls_tokens(images)  # type: ignore[operator]

    def forward_with_gradient(self, student: nn.Module, *inputs: Any) -> Any:
        """Compute `forward`, but let the gradient flow into the student's weights, as if both were one network."""
        weights = dict(student.named_parameters())
        shared = {name: p + (weights[name] - weights[name].detach()) for name, p in self.network.named_parameters()}
        return functional_call(self.network, shared, inputs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Set theta_t <- m theta_t + (1 - m) theta_s for all parameters; the buffers are not changed."""
        torch._foreach_lerp_(list(self.network.parameters()), list(student.parameters()), 1 - momentum)


@torch.no_grad()
def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    """Copy running statistics from a trained network to one whose parameters alone are updated from it."""
    for target_buffer, source_buffer in zip(target.buffers(), source.buffers()):
        target_buffer.copy_(source_buffer)
