"""Many processes, one training: the few operations in which they meet; in a single process each does nothing.

`torchrun` starts the processes, and `torch.distributed` holds the group. Each has its own rows of every batch. A loss
over all pairs of a batch has to see the batch of every process, and its gradient has to find the way back; a mean over
a batch is the mean of all. Chance is drawn for the whole batch by every process alike, and each takes its rows, so that
a run does not depend on how many there are.

Shapes: W processes with B rows each.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minissl.errors import InputError


def together() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, 0 .. W - 1."""
    return dist.get_rank() if together() else 0


def world() -> int:
    """W."""
    return dist.get_world_size() if together() else 1


def join(device: torch.device) -> torch.device:
    """Meet the processes that torchrun started, if it did. Returns this one's device: a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or together():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """The end of the group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def parted() -> Iterator[None]:
    """Inside, that another process is gone is said in one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not together() or not any(
            word in str(error) for word in ("peer", "Gloo", "NCCL", "Connection", "timed out")
        ):
            raise
        raise InputError(
            "Another process of this training has ended, so this one does too. What was saved last is whole; "
            "the same command with --resume goes on."
        ) from None


def say(text: object) -> None:
    """Print, once for all."""
    if rank() == 0:
        print(text, flush=True)


def anyone(asks: bool) -> bool:
    """Whether one of the processes asks for it. On the CPU, so that no GPU waits."""
    if not together():
        return asks
    found = torch.tensor(int(asks))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def from_first(thing: Any) -> Any:
    """What the first process has, for all; they wait for each other here."""
    if not together():
        return thing
    box = [thing]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(things: list) -> list:
    """The lists of all processes, one after the other."""
    if not together():
        return things
    parts = [None] * world()
    dist.all_gather_object(parts, things)
    return [thing for part in parts for thing in part]


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


class _Total(torch.autograd.Function):
    """The sum of what all have, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Total.forward(ctx, gradient)


def gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) of this process to (W B, ...) of all, in the order of their ranks; gradients flow back to each.

    When the gradients of the parameters are averaged over the processes, as DistributedDataParallel does, they are
    those of the mean of all processes' losses.
    """
    return _Gather.apply(rows) if together() else rows


def total(x: Tensor) -> Tensor:
    """The sum of the processes' x, of any one shape, for all; gradients flow back as for `gather_rows`."""
    return _Total.apply(x) if together() else x


def mean_rows(x: Tensor) -> Tensor:
    """(n, D) to the mean (D,) over the rows of all processes, of which each may have another n; no gradient."""
    x = x.detach()
    if not together():
        return x.mean(dim=0)
    return total(x.sum(dim=0)) / total(torch.full((), float(len(x)), device=x.device))


def log_softmax_rows(scores: Tensor) -> Tensor:
    """(n, K) less the logarithm of each column's sum of exponentials, over the rows of all processes; no gradient."""
    if not together():
        return scores.log_softmax(dim=0)
    return scores - gather_rows(scores.logsumexp(dim=0)[None]).logsumexp(dim=0)


def rand(*shape: int, device: torch.device, rows: int = 0) -> Tensor:
    """As torch.rand; axis `rows` is that of a batch, of which the other processes draw, and keep, the other rows."""
    whole = [n * world() if axis == rows else n for axis, n in enumerate(shape)]
    return torch.rand(whole, device=device).narrow(rows, rank() * shape[rows], shape[rows])


def share(batch_size: int) -> int:
    """B, of a whole batch. Raises InputError if it cannot be shared out evenly."""
    if batch_size % world():
        raise InputError(f"{world()} processes cannot share a batch of {batch_size}; give --batch_size a multiple.")
    return batch_size // world()
