"""Training speed and memory of every method's GPU preset on a real GPU, and whether a step waits for the GPU.

python -m tests.benchmarks.gpu [--only dino simclr] [--compile] [--steps 10] [--out runs/gpu.json]
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minissl.cli import parse_run
from minissl.data import Images
from minissl.methods import list_methods
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision, compile_encoders
from minissl.training.run import RunConfig
from minissl.training.sampler import iterate_batches, seed_step
from tests.benchmarks.memory import count_memory


def noise_images(n: int, size: int, device: str = "cuda") -> Images:
    """Return n images of noise, with labels and captions."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    captions = (("a red fish swims in the sea", "a fish"),) * n
    return Images(images, torch.arange(n) % 10, captions=captions).to(torch.device(device))


def train_steps(run: RunConfig, images: Images, compile: bool) -> Iterator[dict[str, Tensor]]:
    """Train at progress 0.5, without end. Yields the terms of the loss, still on the device."""
    method = run.build().to(images.device)
    config = TrainConfig(**run.train)
    config = replace(config, precision=choose_precision(config.precision, images.device))
    method.prepare(images)
    optimizer = trainer.create_optimizer(method, config)
    if compile:
        compile_encoders(method)
    for step, batch in enumerate(iterate_batches(images, config.batch_size, config.seed)):
        seed_step(config.seed, step)
        yield trainer.training_step(method, optimizer, batch, 0.5, config)


def measure(name: str, compile: bool, steps: int) -> dict[str, float]:
    """Measure a method's GPU preset.

    Returns:
        "seconds" per step, "launch_seconds" of the CPU per step, "warmup_seconds" of the first three steps,
        "images_per_second", peak "memory" in bytes, and the last "loss".

    Raises:
        RuntimeError: if a step after the first three makes the CPU wait for the GPU.
    """
    run = parse_run([name, "--preset", "gpu", "--device", "cuda"])[0]
    batch_size = run.train["batch_size"]
    images = noise_images(2 * batch_size, run.image_size)
    memory_before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, loop = time.perf_counter(), train_steps(run, images, compile)
    for _ in itertools.islice(loop, 3):
        pass
    torch.cuda.synchronize()
    warmup_seconds = time.perf_counter() - start
    torch.cuda.set_sync_debug_mode("error")
    start = time.perf_counter()
    *_, terms = itertools.islice(loop, steps)
    torch.cuda.set_sync_debug_mode("default")
    launch_seconds = (time.perf_counter() - start) / steps
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    times = {"seconds": seconds, "launch_seconds": launch_seconds, "warmup_seconds": warmup_seconds}
    memory = torch.cuda.max_memory_allocated() - memory_before
    return times | {"images_per_second": batch_size / seconds, "memory": memory, "loss": float(terms["loss"])}


def main() -> None:
    names = [name for name in list_methods() if name != "dinotxt"]  # which needs a pretrained encoder
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--compile", action="store_true", help="compile the encoders, as the presets do")
    parser.add_argument("--count", action="store_true", help="also count memory on fake tensors, a minute per method")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results, failed, properties = {}, [], torch.cuda.get_device_properties(0)
    for name in options.only:
        try:
            results[name] = row = measure(name, options.compile, options.steps)
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode("default")
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            failed.append(name)
            continue
        row |= {"counted_memory": count_memory([name, "--preset", "gpu"])} if options.count else {}
        print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)
        torch.cuda.empty_cache()
        machine = {"gpu": properties.name, "torch": torch.__version__, "compile": options.compile}
        checkpoint.write_json(options.out, machine | {"methods": results})
    raise SystemExit(f"These methods failed: {', '.join(failed)}." if failed else 0)


if __name__ == "__main__":
    main()
