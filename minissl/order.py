"""Which images a step sees, and what chance gives it: a function of (seed, step), of nothing that went before.

So a run goes on where it was stopped, on as many processes as there are then, as if nothing had happened.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from minissl import parallel
from minissl.errors import InputError
from minissl.method import Batch


def orders(n: int, size: int, seed: int, step: int) -> Iterator[Tensor]:
    """Rows (size,) of endless batches from `step` on: every epoch a new order that depends on (seed, epoch) only.

    Raises InputError if there are fewer than a batch.
    """
    if size > n:
        raise InputError(f"A batch of {size} is more than the {n} images there are; make it smaller.")
    per_epoch = n // size
    for epoch in range(step // per_epoch, 1 << 62):
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))
        yield from order[step % per_epoch * size : per_epoch * size].split(size)
        step = 0


def batches(data, size: int, seed: int, step: int = 0, device: torch.device | None = None) -> Iterator[Batch]:
    """Endless batches from `step` on, on the device; of several processes each has its share of every batch.

    Args:
        data: with `batches(orders)`, as `data.Images` has it, and the `device` it is on.
        size: images a batch.
        seed, step: what the order depends on.
        device: where batches are wanted; where the data is, if None.
    """
    device = device or data.device
    whole = orders(len(data), size, seed, step)
    for found in data.batches(rows.chunk(parallel.world())[parallel.rank()] for rows in whole):
        yield Batch(**{name: _to(part, device) for name, part in found.items()})


def check_parts(method: nn.Module, batch_size: int, parts: int) -> None:
    """Raises InputError if a batch cannot be shared out, or be computed in parts with the same gradient."""
    parallel.share(batch_size)
    if parts == 1:
        return
    name, instead = type(method).__name__, "leave --accumulate out; --recompute true and several processes save memory"
    if not getattr(method, "apart", False):
        raise InputError(f"{name} compares the images of a batch with each other, and needs it whole; {instead}.")
    if any(isinstance(module, _BatchNorm) for module in method.modules()):
        raise InputError(
            f"The batch norms of this encoder need a batch whole; give a ViT's --encoder.stem patch, or {instead}."
        )
    if batch_size % (parts * parallel.world()):
        raise InputError(f"A batch of {batch_size} has no {parts} equal parts in each process; change --accumulate.")


def parts_of(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut into equal parts, in its order."""
    n = len(batch.images) // parts
    return [Batch(*(_rows(part, i * n, n) for part in batch)) for i in range(parts)]


def _rows(part, start: int, n: int):
    if isinstance(part, dict):
        return {name: _rows(tensor, start, n) for name, tensor in part.items()}
    return None if part is None else part[start : start + n]


def _to(part, device: torch.device):
    if isinstance(part, dict):
        return {name: _to(tensor, device) for name, tensor in part.items()}
    return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part


def seed_step(seed: int, step: int) -> None:
    """All that step draws follows from here."""
    number = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    torch.manual_seed(number)
    random.seed(number)
