"""What a training step takes in memory, without the machine: counted on fake tensors, and checked on a real CPU.

python -m tests.benchmarks.memory                      every method's preset for a GPU, as it is and with --recompute
python -m tests.benchmarks.memory dino --batch_size 64 any training, counted, and then run and measured
"""

import copy
import sys
import threading
import time

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from minissl import train
from minissl.__main__ import parse_run
from minissl.machine import Peak, recompute
from minissl.method import Batch, available

SAID = ("a red fish swims in the sea",)


def steps(method: nn.Module, config: train.TrainConfig, size: int, count: int = 2) -> None:
    """Whole steps: the second has the optimiser's moments."""
    n = config.batch_size
    images = torch.full((n, 3, size, size), 7, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(n, dtype=torch.long), [SAID] * n)
    optimizer = train.make_optimizer(method, config)
    for step in range(count):
        train.seed_step(0, step)
        train.training_step(method, optimizer, batch, 0.5, config)


def counted(words: list[str], again: bool = False) -> int:
    """Bytes at the most, the weights included, of a run that is asked for as on the command line."""
    run, _ = parse_run([*words, "--device", "cpu"])
    mode, method = FakeTensorMode(), run.build()
    weights = sum(t.nbytes for t in [*method.parameters(), *method.buffers()])
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    if again:
        recompute(method)
    precision = run.loop["precision"].replace("auto", "bf16")
    with mode, Peak() as peak:
        steps(method, train.TrainConfig(**run.loop | {"precision": precision}), run.image_size)
    return weights + peak.most


def measured(words: list[str]) -> int:
    """Bytes by which this process grows when the same is done."""
    run, _ = parse_run([*words, "--device", "cpu"])
    method, me, most, done = run.build(), psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], me.memory_info().rss)
            time.sleep(0.005)

    before = me.memory_info().rss - sum(t.nbytes for t in [*method.parameters(), *method.buffers()])
    watching = threading.Thread(target=watch)
    watching.start()
    steps(
        method,
        train.TrainConfig(**run.loop | {"precision": run.loop["precision"].replace("auto", "bf16")}),
        run.image_size,
    )
    done.set()
    watching.join()
    return most[0] - before


def main(words: list[str]) -> None:
    if words:
        there, real = counted(words), measured(words)
        print(f"counted {there / 1e9:.2f} GB, measured {real / 1e9:.2f} GB, {real / there:.2f} times as much")
        return
    print("| preset for a GPU | batch | GB | with --recompute true |", "|---|---|---|---|", sep="\n")
    for name in (name for name in available() if name != "dinotxt"):
        asked = [name, "--preset", "gpu"]
        batch_size = parse_run([*asked, "--device", "cpu"])[0].loop["batch_size"]
        print(f"| {name} | {batch_size} | {counted(asked) / 1e9:.1f} | {counted(asked, True) / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
