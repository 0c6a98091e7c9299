"""Sample batches deterministically and resumably: each step depends on (seed, step) only.

A resumed run therefore continues as if it had not been stopped, also on another number of processes.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Sampler

from minissl import distributed
from minissl.data.batch import Batch
from minissl.data.images import ImageDataset
from minissl.errors import InputError
from minissl.methods.base import Method


class EpochSampler(Sampler[Tensor]):
    """Yield the indices of batch after batch, without end; every epoch is a new permutation of (seed, epoch).

    An incomplete batch at the end of an epoch is dropped. With several processes each gets its own part of every batch.
    It can be the `batch_sampler` of a torch DataLoader.

    Args:
        num_images: N.
        batch_size: B, over all W processes.
        seed: of the permutations.
        start_step: number of batches to skip.

    Yields:
        int64 (B / W,) on the CPU.

    Raises:
        InputError: if N < B.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int = 0, start_step: int = 0):
        if batch_size > num_images:
            raise InputError(f"--batch_size {batch_size} exceeds the {num_images} images; make it smaller.")
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step

    def __iter__(self) -> Iterator[Tensor]:
        per_epoch = self.num_images // self.batch_size
        epoch, step = divmod(self.start_step, per_epoch)
        while True:
            permutation = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(self.num_images))
            for indices in permutation[step * self.batch_size : per_epoch * self.batch_size].split(self.batch_size):
                yield indices.chunk(distributed.world_size())[distributed.rank()]
            epoch, step = epoch + 1, 0


def iterate_batches(
    dataset: ImageDataset, batch_size: int, seed: int, start_step: int = 0, device: torch.device | None = None
) -> Iterator[Batch]:
    """Yield batch after batch, without end. With several processes each gets its own part of every batch.

    Args:
        dataset: images, in memory or streamed.
        batch_size: images per batch, over all processes.
        seed: of the order, see `EpochSampler`.
        start_step: number of batches to skip.
        device: of the batches; None keeps the data set's.

    Yields:
        The images of this process, (B / W, 3, S, S) uint8, and their annotations.

    Raises:
        InputError: if there are fewer images than a batch has.
    """
    sampler = EpochSampler(len(dataset), batch_size, seed, start_step)
    for batch in dataset.iterate(sampler):
        yield batch.to(device or dataset.device)


def check_batch_split(method: Method, batch_size: int, num_parts: int) -> None:
    """Raise InputError if a batch cannot be split over the processes, or into parts without changing the gradient."""
    distributed.local_batch_size(batch_size)
    if num_parts == 1:
        return
    advice = "leave --grad_accum_steps out; --activation_checkpointing true and several processes save memory too"
    if not method.supports_grad_accumulation:
        raise InputError(
            f"--grad_accum_steps is {num_parts}, but the loss of {type(method).__name__} compares the images of a "
            f"batch with each other; {advice}."
        )
    if any(isinstance(module, _BatchNorm) for module in method.modules()):
        raise InputError(
            f"--grad_accum_steps is {num_parts}, but this encoder has batch norms, whose statistics need the whole "
            f"batch; use a ViT with --encoder.stem patch, or {advice}."
        )
    if batch_size % (num_parts * distributed.world_size()):
        raise InputError(
            f"A batch of {batch_size} in {distributed.world_size()} processes has no {num_parts} equal parts; "
            "change --grad_accum_steps or --batch_size."
        )


def seed_step(seed: int, step: int) -> None:
    """Seed torch's and Python's random generators for one step, from (seed, step)."""
    number = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    torch.manual_seed(number)
    random.seed(number)
