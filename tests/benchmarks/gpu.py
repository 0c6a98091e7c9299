"""What a real GPU says of every method's preset for it: that no step waits, how fast it is, what it holds.

python -m tests.benchmarks.gpu [--only dino simclr] [--compile] [--steps 10] [--out runs/gpu.json]
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from minissl import checkpoint, runs, train
from minissl.__main__ import parse_run
from minissl.data import Images
from minissl.machine import choose_precision, compile_encoders
from minissl.method import available
from tests.benchmarks.memory import counted


def pictures(n: int, size: int, device: str = "cuda") -> Images:
    """Pictures of noise, with labels and sentences."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(n) % 10, captions=(("a red fish swims in the sea", "a fish"),) * n).to(device)


def stepping(run: runs.Run, images: Images, compile: bool) -> Iterator[dict[str, torch.Tensor]]:
    """The loop of `train.fit`, a step at a time."""
    method = run.build().to(images.device)
    config = train.TrainConfig(**run.loop)
    config = replace(config, precision=choose_precision(config.precision, images.device))
    runs.prepare(method, images)
    optimizer = train.make_optimizer(method, config)
    if compile:
        compile_encoders(method)
    for step, batch in enumerate(train.batches(images, config.batch_size, config.seed)):
        train.seed_step(config.seed, step)
        yield train.training_step(method, optimizer, batch, 0.5, config)


def measure(name: str, compile: bool, steps: int) -> dict[str, float]:
    """Raises RuntimeError if a step, after the first three, makes the CPU wait for the GPU."""
    run = parse_run([name, "--preset", "gpu", "--device", "cuda"])[0]
    images = pictures(2 * run.loop["batch_size"], run.image_size)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, loop = time.perf_counter(), stepping(run, images, compile)
    for _ in itertools.islice(loop, 3):
        pass
    torch.cuda.synchronize()
    warm = time.perf_counter() - start
    torch.cuda.set_sync_debug_mode("error")
    start = time.perf_counter()
    for terms in itertools.islice(loop, steps):
        last = terms
    torch.cuda.set_sync_debug_mode("default")
    asked = (time.perf_counter() - start) / steps
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / steps
    found = {"seconds": each, "launching": asked, "warm_up": warm, "images_per_second": run.loop["batch_size"] / each}
    return found | {"memory": torch.cuda.max_memory_allocated() - before, "loss": float(last["loss"])}


def main() -> None:
    names = [name for name in available() if name != "dinotxt"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--compile", action="store_true", help="as the presets have it; eager if not")
    parser.add_argument("--count", action="store_true", help="memory on fake tensors as well; a minute a method")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    found, waits, properties = {}, [], torch.cuda.get_device_properties(0)
    for name in asked.only:
        try:
            found[name] = row = measure(name, asked.compile, asked.steps)
        except RuntimeError as problem:
            torch.cuda.set_sync_debug_mode("default")
            print(f"{name}: {str(problem).splitlines()[0]}", flush=True)
            waits.append(name)
            continue
        row |= {"counted": counted([name, "--preset", "gpu"])} if asked.count else {}
        print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)
        torch.cuda.empty_cache()
        about = {"gpu": properties.name, "torch": torch.__version__, "compile": asked.compile}
        checkpoint.write_json(asked.out, about | {"methods": found})
    raise SystemExit(f"These failed: {', '.join(waits)}." if waits else 0)


if __name__ == "__main__":
    main()
