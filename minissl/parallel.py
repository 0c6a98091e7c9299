"""Many processes, one training: the few operations in which they meet; in a single process each does nothing.

`torchrun` starts the processes, and `torch.distributed` holds the group. A loss over all pairs of a batch has to see
the batch of every process, and its gradient has to find the way back.

Shapes: W processes with B rows each.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def together() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, 0 .. W - 1."""
    return dist.get_rank() if together() else 0


class _Gather(torch.autograd.Function):
    """All rows forward; backward the sum of what every process says of ours."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may need it elsewhere as it is
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) of this process to (W B, ...) of all, in the order of their ranks; gradients flow back to each.

    When the gradients of the parameters are averaged over the processes, as DistributedDataParallel does, they are
    those of the mean of all processes' losses.
    """
    return _Gather.apply(rows) if together() else rows
