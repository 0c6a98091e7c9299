"""Many processes, one training: the few operations in which they meet; in a single process each does nothing.

`torchrun` starts the processes, and `torch.distributed` holds the group. Each has its own rows of every batch. A loss
over all pairs of a batch has to see the batch of every process, and its gradient has to find the way back; a mean over
a batch is the mean of all. Chance is drawn for the whole batch by every process alike, and each takes its rows, so that
a run does not depend on how many there are.

Shapes: W processes with B rows each.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

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


class SharedBatchNorm(_BatchNorm):
    """A batch norm whose batch is that of all processes, each with its own number of rows. torch's needs a GPU."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Any (n, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = total(torch.full((), float(x.numel() // x.shape[1]), dtype=y.dtype, device=x.device))
        some = count.clamp_min(1)  # a batch may have no rows, where no small crops are wanted
        y = y - (mean := total(y.sum(axes)) / some).view(shape)
        var = total(y.square().sum(axes)) / some
        if self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                weight = (self.momentum * (count > 0)).to(self.running_mean.dtype)
                self.running_mean.lerp_(mean.to(weight.dtype), weight)
                self.running_var.lerp_((var * count / (count - 1).clamp_min(1)).to(weight.dtype), weight)
        y = y * (var + self.eps).rsqrt().view(shape)
        return (y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def share_norms(module: nn.Module) -> None:
    """Let every batch norm in a module see the batches of all; names and numbers stay as they are."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            shared = SharedBatchNorm(child.num_features, child.eps, child.momentum, child.affine, False)
            shared._parameters, shared._buffers = child._parameters, child._buffers
            shared.track_running_stats = child.track_running_stats
            setattr(module, name, shared.train(child.training))
        else:
            share_norms(child)


class _Loss(nn.Module):
    """A method whose forward pass is its loss, which is what DistributedDataParallel watches."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, batch, progress: float) -> dict[str, Tensor]:
        return self.method.loss(batch, progress)


def averaged(method: nn.Module) -> Callable[[Any, float], dict[str, Tensor]]:
    """A method's loss, whose gradients are the mean over all processes after each backward pass.

    The method is changed: its batch norms see the batches of all.
    """
    if not together():
        return method.loss
    share_norms(method)
    named = signature(DistributedDataParallel).parameters
    leave_buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    return DistributedDataParallel(_Loss(method), find_unused_parameters=True, **{leave_buffers: False})


def mean_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars by name, each the mean over all processes."""
    if not together():
        return terms
    return dict(zip(terms, (total(torch.stack([t.detach().float() for t in terms.values()])) / world()).unbind()))
