"""Memory of a training step, counted on fake tensors without the GPU, and checked by a real step on a CPU.

python -m tests.benchmarks.memory                       every method's GPU preset, also with --activation_checkpointing
python -m tests.benchmarks.memory dino --batch_size 64  the arguments of any training; counted, then run and measured
"""

import copy
import sys
import threading
import time
from collections.abc import Sequence

import psutil
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from minissl.cli import parse_run
from minissl.data.batch import Batch
from minissl.methods import list_methods
from minissl.methods.base import Method
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.device import PeakMemory, enable_activation_checkpointing
from minissl.training.run import RunConfig
from minissl.training.sampler import seed_step

CAPTIONS = ("a red fish swims in the sea",)


def train_config(run: RunConfig) -> TrainConfig:
    """Return the run's configuration, with bf16 for "auto"."""
    return TrainConfig(**run.train | {"precision": run.train["precision"].replace("auto", "bf16")})


def take_steps(method: Method, config: TrainConfig, size: int, steps: int = 2) -> None:
    """Take whole training steps; from the second on the optimizer has its moments."""
    n = config.batch_size
    images = torch.full((n, 3, size, size), 7, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(n, dtype=torch.long), [CAPTIONS] * n)
    optimizer = trainer.create_optimizer(method, config)
    for step in range(steps):
        seed_step(0, step)
        trainer.training_step(method, optimizer, batch, 0.5, config)


def weight_bytes(method: Method) -> int:
    return sum(t.nbytes for t in [*method.parameters(), *method.buffers()])


def count_memory(args: Sequence[str], activation_checkpointing: bool = False) -> int:
    """Count the peak memory of a training step in bytes, weights included.

    Args:
        args: arguments of `minissl train`.
        activation_checkpointing: recompute each block in the backward pass.
    """
    run, _ = parse_run([*args, "--device", "cpu"])
    mode, method = FakeTensorMode(), run.build()
    weights = weight_bytes(method)
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    if activation_checkpointing:
        enable_activation_checkpointing(method)
    with mode, PeakMemory() as memory:
        take_steps(method, train_config(run), run.image_size)
    return weights + memory.peak


def measure_memory(args: Sequence[str]) -> int:
    """Measure the bytes by which this process grows in the same steps, weights included."""
    run, _ = parse_run([*args, "--device", "cpu"])
    method, process, done = run.build(), psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    take_steps(method, train_config(run), run.image_size)
    done.set()
    watcher.join()
    return peak - before + weight_bytes(method)


def main(args: Sequence[str]) -> None:
    if args:
        counted, measured = count_memory(args), measure_memory(args)
        factor = measured / counted
        print(f"counted {counted / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB, {factor:.2f} times as much")
        return
    print("| GPU preset | batch size | GB | with --activation_checkpointing true |", "|---|---|---|---|", sep="\n")
    for name in (name for name in list_methods() if name != "dinotxt"):
        preset = [name, "--preset", "gpu"]
        batch_size = parse_run([*preset, "--device", "cpu"])[0].train["batch_size"]
        stored, recomputed = count_memory(preset) / 1e9, count_memory(preset, activation_checkpointing=True) / 1e9
        print(f"| {name} | {batch_size} | {stored:.1f} | {recomputed:.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
