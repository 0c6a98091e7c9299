"""Which images a step sees, and what chance gives it: a function of (seed, step), of nothing that went before.

So a run goes on where it was stopped, on as many processes as there are then, as if nothing had happened.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from minissl import parallel
from minissl.method import Batch


def orders(n: int, size: int, seed: int, step: int) -> Iterator[Tensor]:
    """Rows (size,) of endless batches from `step` on: every epoch a new order that depends on (seed, epoch) only."""
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


def _to(part, device: torch.device):
    if isinstance(part, dict):
        return {name: _to(tensor, device) for name, tensor in part.items()}
    return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part


def seed_step(seed: int, step: int) -> None:
    """All that step draws follows from here."""
    number = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    torch.manual_seed(number)
    random.seed(number)
