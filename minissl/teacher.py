"""The teacher: a frozen copy that follows its student as a moving average, and schedules of progress.

He et al., Momentum Contrast, 2019 (arXiv:1911.05722); Grill et al., BYOL, 2020 (arXiv:2006.07733).
Time is `progress` in [0, 1], the share of the run that is done.
"""

import copy
import math

import torch
from torch import nn
from torch.func import functional_call

from minissl.positions import Stretch
from minissl.transformer import DropPath


class Teacher(nn.Module):
    """A copy of a network that gets no gradient, leaves no path out and sees positions as they are.

    It follows the mode of the method around it, so that batch norms, where there are any, see the teacher's own batch
    while training, as in DINO's code.

    Args:
        student: the network to copy; it is not changed.
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
            if isinstance(getattr(module, "stretch", None), Stretch):
                module.stretch = Stretch()

    @property
    def spares(self) -> bool:
        return getattr(self.network, "spares", False)

    @torch.no_grad()
    def forward(self, *inputs, **options):
        return self.network(*inputs, **options)

    def leaking(self, student: nn.Module, *inputs):
        """What `forward` gives, but its gradient goes on into the student's weights, as if the two were one network."""
        theirs = dict(student.named_parameters())
        leaky = {name: p + (theirs[name] - theirs[name].detach()) for name, p in self.network.named_parameters()}
        return functional_call(self.network, leaky, inputs)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """theta_t <- m theta_t + (1 - m) theta_s, over parameters; buffers are the teacher's own."""
        torch._foreach_lerp_(list(self.network.parameters()), list(student.parameters()), 1 - momentum)


@torch.no_grad()
def copy_buffers(to: nn.Module, of: nn.Module) -> None:
    """Running statistics, of a network that learns to one that only follows its parameters."""
    for ours, theirs in zip(to.buffers(), of.buffers()):
        ours.copy_(theirs)


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine: slow, fast, slow."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def linear(start: float, end: float, progress: float, until: float = 1.0) -> float:
    """From `start` to `end` along a line, reached when progress is `until`, and `end` from then on."""
    return end if progress >= until else start + (end - start) * max(progress, 0.0) / until


def warmup_cosine(start: float, peak: float, end: float, progress: float, warmup: float) -> float:
    """A line from `start` up to `peak` during the first `warmup` of the run, then a cosine down to `end`."""
    if progress < warmup:
        return linear(start, peak, progress, until=warmup)
    return cosine(peak, end, (progress - warmup) / max(1 - warmup, 1e-12))
