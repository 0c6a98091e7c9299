"""Training on several processes: collectives, data parallelism and sharding. In a single process all are no-ops.

`torchrun` starts the processes and `torch.distributed` connects them. Each holds its own rows of every batch. A loss
over all pairs of a batch gathers the rows of all processes, and its gradient flows back to each. Without sharding
every process holds all weights; with FSDP2 (Zhao et al., 2023, arXiv:2304.11277) each holds a
shard of every parameter and gathers a block when it is used. Results equal those of one process with the whole batch.

Shapes: W processes with B rows each.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from minissl.errors import InputError

Loss = Callable[[Any, float], dict[str, Tensor]]  # (batch, progress) -> terms


def is_distributed() -> bool:
    """Return whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the index of this process, 0 to W - 1."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return W."""
    return dist.get_world_size() if is_distributed() else 1


def init_distributed(device: torch.device) -> torch.device:
    """Connect the processes that torchrun started, if it did. Returns this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or is_distributed():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def shutdown_distributed() -> None:
    """Disconnect the processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def peer_failures_as_input_errors() -> Iterator[None]:
    """Convert the error that a peer's failure causes here into an InputError."""
    try:
        yield
    except RuntimeError as error:
        signs = ("peer", "Gloo", "NCCL", "Connection", "timed out")
        if not is_distributed() or not any(sign in str(error) for sign in signs):
            raise
        raise InputError(
            "Another process of this training has ended, so this one stops too. The last checkpoint is complete; "
            "the same command with --resume continues."
        ) from None


def print_once(text: object) -> None:
    """Print from the first process only."""
    if rank() == 0:
        print(text, flush=True)


def any_process(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set in any process. Runs on the CPU, so that no GPU waits."""
    if not is_distributed():
        return list(flags)
    reduced = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    return reduced.bool().tolist()


def broadcast_object(value: Any) -> Any:
    """Return the first process's value in all processes; they wait for each other here."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes, in the order of their ranks."""
    if not is_distributed():
        return items
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class _GatherRows(torch.autograd.Function):
    """Gather all rows; backward sums the gradients that all processes have for ours."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need it unchanged
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduceSum.forward(ctx, gradient)


def gather_rows(rows: Tensor) -> Tensor:
    """Gather (B, ...) of each process to (W B, ...), in the order of their ranks; gradients flow back to each.

    When the parameters' gradients are averaged over the processes, as DistributedDataParallel does, they are those of
    the mean of all processes' losses.
    """
    return _GatherRows.apply(rows) if is_distributed() else rows


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum tensors of one shape over the processes; gradients flow back as for `gather_rows`."""
    return _AllReduceSum.apply(x) if is_distributed() else x


def mean_rows(x: Tensor) -> Tensor:
    """Average (n, D) over the rows of all processes, each with its own n, to (D,); no gradient."""
    x = x.detach()
    if not is_distributed():
        return x.mean(dim=0)
    return all_reduce_sum(x.sum(dim=0)) / all_reduce_sum(torch.full((), float(len(x)), device=x.device))


def log_softmax_over_rows(logits: Tensor) -> Tensor:
    """Normalize (n, K) so that the exponentials of each column sum to 1 over all processes' rows; no gradient."""
    if not is_distributed():
        return logits.log_softmax(dim=0)
    return logits - gather_rows(logits.logsumexp(dim=0)[None]).logsumexp(dim=0)


def local_rows(x: Tensor, dim: int = 0) -> Tensor:
    """Return this process's equal part of a tensor that every process holds whole."""
    n = x.shape[dim] // world_size()
    return x.narrow(dim, rank() * n, n)


def local_batch_size(batch_size: int) -> int:
    """Return B for a total batch size. Raises InputError if it cannot be split evenly."""
    if batch_size % world_size():
        raise InputError(
            f"A batch of {batch_size} cannot be split over {world_size()} processes; make --batch_size a multiple."
        )
    return batch_size // world_size()


class _NormalizeBatch(torch.autograd.Function):
    """Normalize (n, C, ...) by the statistics of all processes' rows; one collective forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y, the mean (C,), the biased variance (C,) and the number of values of each channel, a scalar."""
        channels, shape = x.shape[1], _channel_shape(x)
        count = x.numel() // channels
        if count:  # by this process's own statistics first, with the fused kernel
            y, own_mean, own_scale = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
        else:  # it may have no rows, where there are no local crops
            y, own_mean, own_scale = x.clone(), x.new_zeros(channels), x.new_ones(channels)
        own_var = own_scale.square().reciprocal() - eps
        statistics = _gather_small(torch.cat([x.new_full((1,), count), own_mean, own_var]))
        counts, means, variances = statistics.split([1, channels, channels], dim=1)  # (W, 1), (W, C), (W, C)
        total = counts.sum()
        mean = (counts * means).sum(0) / total.clamp_min(1)
        var = (counts * (variances + (means - mean).square())).sum(0) / total.clamp_min(1)
        scale = (var + eps).rsqrt()
        y = torch.addcmul(((own_mean - mean) * scale).view(shape), y, (scale / own_scale).view(shape))
        ctx.save_for_backward(y, scale, total)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Any) -> tuple[Tensor, None]:
        y, scale, total = ctx.saved_tensors
        shape = _channel_shape(y)
        sums = _gather_small(torch.cat([_sum_of_channels(gradient), _sum_of_channels(gradient * y)])).sum(0)
        mean, slope = (sums / total.clamp_min(1)).chunk(2)
        return torch.addcmul(gradient - mean.view(shape), y, -slope.view(shape)).mul_(scale.view(shape)), None


def _gather_small(x: Tensor) -> Tensor:
    """Gather vectors (n,) to (W, n); for a few numbers gloo is faster so than by a sum over the processes."""
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


def _sum_of_channels(x: Tensor) -> Tensor:
    """Sum (n, C, ...) to (C,)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1]).sum(0)


def _channel_shape(x: Tensor) -> list[int]:
    return [-1 if axis == 1 else 1 for axis in range(x.ndim)]


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, each with its own number of rows. torch's own needs a GPU."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any (n, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_distributed() or (not self.training and self.running_mean is not None):
            return super().forward(x)
        y, mean, var, count = _NormalizeBatch.apply(
            x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, self.eps
        )
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                assert self.momentum is not None
                self.num_batches_tracked += 1
                weight = (self.momentum * (count > 0)).to(self.running_mean.dtype)
                self.running_mean.lerp_(mean.to(weight.dtype), weight)
                self.running_var.lerp_((var * count / (count - 1).clamp_min(1)).to(weight.dtype), weight)
        shape = _channel_shape(x)
        y = y.clone() if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def convert_sync_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm in a module by `SyncBatchNorm`, in place; names and values stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synced = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, False)
            synced._parameters, synced._buffers = child._parameters, child._buffers
            synced.track_running_stats = child.track_running_stats
            setattr(module, name, synced.train(child.training))
        else:
            convert_sync_batch_norm(child)


class _LossModule(nn.Module):
    """A method whose forward pass is its loss, as DistributedDataParallel and FSDP2 need it."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.method.loss(batch, progress)  # type: ignore[operator]
        return terms


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes, in place, by one collective for each dtype.

    A parameter without a gradient in any process keeps none; one without a gradient in some has 0 there.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in parameters:
        if p.requires_grad:
            by_dtype.setdefault(p.dtype, []).append(p)
    for dtype, group in by_dtype.items():
        present = torch.tensor([p.grad is not None for p in group], dtype=dtype, device=group[0].device)
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in group]
        flat = torch.cat([present, *parts])
        dist.all_reduce(flat)
        present, *parts = (flat / world_size()).split([len(group), *map(len, parts)])
        for p, gradient, used in zip(group, parts, present.tolist()):
            p.grad = gradient.view_as(p) if used else None


def wrap_ddp(method: nn.Module) -> Loss:
    """Return a method's loss for several processes, each with all weights.

    The method is changed: its batch norms become `SyncBatchNorm`. On GPUs the loss is a DistributedDataParallel, which
    averages the gradients while the backward pass goes on. On CPUs, whose cores are busy with that pass, the training
    step averages them at once afterwards, with `average_gradients`.
    """
    if not is_distributed():
        return method.loss  # type: ignore[return-value]
    convert_sync_batch_norm(method)
    if next(method.parameters()).device.type == "cpu":
        for x in (*method.parameters(), *method.buffers()):  # all begin with the weights of the first
            dist.broadcast(x.data, 0)
        return method.loss  # type: ignore[return-value]
    named = signature(DistributedDataParallel).parameters
    keep_buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    options: dict[str, Any] = {keep_buffers: False}
    return DistributedDataParallel(_LossModule(method), find_unused_parameters=True, **options)


def wrap_fsdp(method: nn.Module) -> Loss:
    """Shard parameters, gradients and optimizer state across processes (FSDP2). Returns the loss, as `wrap_ddp`.

    The method is changed: its parameters become DTensors, gathered block by block while a loss is computed and nowhere
    else. `gather_method` restores them.
    """
    from torch.distributed.fsdp import fully_shard  # here, because not every build of torch has it

    convert_sync_batch_norm(method)
    for module in list(method.modules()):
        for block in getattr(module, "blocks", ()):
            fully_shard(block)
    scalars = {p for p in method.parameters() if p.ndim == 0}  # cannot be sharded
    for p in scalars:
        p.register_hook(lambda gradient: all_reduce_sum(gradient) / world_size())
    return fully_shard(_LossModule(method), ignored_params=scalars)  # type: ignore[return-value]


def gather_full(x: Any) -> Any:
    """Gather a sharded tensor, or a dict of them, in all processes. Returns anything else unchanged."""
    if isinstance(x, dict):
        return {key: gather_full(value) for key, value in x.items()}
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of x if `like` is sharded, else x."""
    if hasattr(like, "full_tensor") and x.shape == like.shape:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


def gather_method(method: nn.Module, into: nn.Module) -> nn.Module:
    """Copy a sharded method's state into one that is not sharded, and return that. All processes take part."""
    into.load_state_dict(gather_full(method.state_dict()))
    return into


def mean_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average scalars by name over all processes."""
    if not is_distributed():
        return dict(terms)
    stacked = torch.stack([term.detach().float() for term in terms.values()])
    return dict(zip(terms, (all_reduce_sum(stacked) / world_size()).unbind()))
