"""Training speed on a machine that is shared: a fixed number of threads against the number that is chosen.

DINO's cpu preset is trained for some seconds with one thread, with one for each core, and with as many as `Threads`
chooses, in turns: on a quiet machine, beside processes that each keep one core busy, and bound to a single core.

    python -m tests.benchmarks.busy [--seconds 20] [--turns 3] [--out runs/busy.json]
    python -m tests.benchmarks.busy --print data/recorded/busy.json
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from minissl.cli import parse_run
from minissl.data import Images
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision
from minissl.training.plan import Plan
from minissl.training.threads import Threads

CPU = torch.device("cpu")
SITUATIONS = {"quiet": 0, "one busy process": 1, "four busy processes": 4, "bound to one core": 0}
Rates = dict[str, dict[str, list[float]]]  # situation -> threads -> images per second of each turn


def train(threads: int, seconds: float) -> None:
    """Train DINO's cpu preset for so long, and print its images per second."""
    run, _ = parse_run(["dino", "--device", "cpu", "--preset", "cpu"])
    method, config = run.build(), TrainConfig(**run.train)
    config = replace(config, precision=choose_precision(config.precision, CPU))
    images = Images(torch.randint(256, (1000, 3, run.image_size, run.image_size), dtype=torch.uint8))
    with Threads(threads, CPU) as chooser:
        steps = trainer.train_steps(method, images, config, Plan(10_000).progress, chooser)
        next(steps)  # loads what is loaded at the first step
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            next(steps)
            count += 1
    print(count * config.batch_size / passed)


def spin() -> None:
    while True:
        pass


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep n cores busy."""
    processes = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(n)]
    for process in processes:
        process.start()
    yield
    assert all(process.is_alive() for process in processes)
    for process in processes:
        process.kill()


def measure(situation: str, threads: int, seconds: float) -> float:
    """Return the images per second of a training in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.busy", "--train", str(threads), "--seconds", str(seconds)]
    if situation == "bound to one core":
        command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), *command]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def markdown_table(rates: Rates) -> str:
    """Format medians and ranges over the turns, and the chosen rate as a fraction of the best fixed one."""
    lines = []
    for situation, by_threads in rates.items():
        fixed = {name: values for name, values in by_threads.items() if name != "chosen"}
        if not lines:
            lines = [f"| images/s | {' | '.join(fixed)} | chosen | of the best |", f"|{'---|' * (len(fixed) + 3)}"]
        best = max(fixed.values(), key=median)
        fractions = [own / other for own, other in zip(by_threads["chosen"], best)]
        cells = [f"{median(v):.0f} ({min(v):.0f} to {max(v):.0f})" for v in (*fixed.values(), by_threads["chosen"])]
        fraction = f"{median(fractions):.2f} ({min(fractions):.2f} to {max(fractions):.2f})"
        lines.append(f"| {situation} | {' | '.join(cells)} | {fraction} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each training")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(SITUATIONS), choices=SITUATIONS, help="situations")
    parser.add_argument("--out", type=Path, default=Path("runs/busy.json"))
    parser.add_argument("--print", type=Path, help="print the table of an existing file, and measure nothing")
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)  # the process that is measured
    options = parser.parse_args()
    if options.train is not None:
        return train(options.train, options.seconds)
    if options.print:
        return print(markdown_table(json.loads(options.print.read_text(encoding="utf-8"))))
    counts = {"one thread": 1, "all threads": os.cpu_count() or 1, "chosen": 0}
    rates: Rates = {}
    for situation in options.only:
        rates[situation] = {name: [] for name in counts}
        with busy_processes(SITUATIONS[situation]):
            for _ in range(options.turns):
                for name, threads in counts.items():
                    rates[situation][name].append(measure(situation, threads, options.seconds))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(options.out, rates)
    print(markdown_table(rates))
    return None


if __name__ == "__main__":
    main()
