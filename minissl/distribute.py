"""A method on several processes: batch norms share their batches, gradients are averaged, weights dealt out.

With DistributedDataParallel every process holds all weights; with FSDP2 (Zhao et al., 2023, arXiv:2304.11277) each
holds a share of every one, and gathers a block's when the block is used. Either way the numbers are those of one
process with the whole batch.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from minissl.parallel import together, total, world


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


def sharded(method: nn.Module) -> Callable[[Any, float], dict[str, Tensor]]:
    """As `averaged`, and every process keeps a share of each parameter, gradient and moment alone (FSDP2).

    The method is changed: its parameters become DTensors, gathered block by block while a loss is computed and nowhere
    else; `gather_method` brings them back.
    """
    from torch.distributed.fsdp import fully_shard  # here, because not every build of torch has it

    share_norms(method)
    for module in list(method.modules()):
        for block in getattr(module, "blocks", ()):
            fully_shard(block)
    scalars = {p for p in method.parameters() if p.ndim == 0}  # cannot be dealt out
    for p in scalars:
        p.register_hook(lambda gradient: total(gradient) / world())
    return fully_shard(_Loss(method), ignored_params=scalars)


def whole(x: Any) -> Any:
    """A tensor of which each process has a share, or a dict of such: all of it, for all. Anything else as it is."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def part_as(x: Tensor, like: Tensor) -> Tensor:
    """This process's share of x, if it has only a share of `like`."""
    if hasattr(like, "full_tensor") and x.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


def gather_method(method: nn.Module, into: nn.Module) -> nn.Module:
    """Copy a sharded method's state into one that is not; returns that one. All processes take part."""
    into.load_state_dict(whole(method.state_dict()))
    return into


def mean_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars by name, each the mean over all processes."""
    if not together():
        return terms
    return dict(zip(terms, (total(torch.stack([t.detach().float() for t in terms.values()])) / world()).unbind()))
