"""How fast one trains, views included: by minissl, by lightly's documented recipe, by a plain reading of the paper.

The same ViT (width 192, 6 blocks, patches of 4 pixels, images of 32, two large crops and four of 16), head and batch of
128; on a GPU ViT-S/16 with the paper's crops. Every contestant is in a process of its own, with a thread for each core.
They take turns, a few steps each, so that what else the machine does falls on all alike; what a DataLoader had ready
from before a turn is used up before its time is taken. Then what a step is made of, how it grows, and k-NN.

    python -m tests.benchmarks.speed [--gpu] [--turns 3] [--steps 6] [--only dino simclr dinov2] [--out runs/speed.json]
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minissl import checkpoint
from minissl.data import load
from minissl.evaluate import knn
from minissl.machine import choose_precision, memory_used, wait_for
from minissl.methods.dino import DINO
from minissl.visualize.charts import seeds_figure
from tests.benchmarks.contestants import CONTESTS, Setting, on_a_gpu, our_dino, our_vit, ours


def serve(contestant: Callable, images: torch.Tensor, at: Setting, line) -> None:
    """Take as many steps as the line asks for; answer with seconds and bytes, worker processes included."""
    torch.manual_seed(0)
    steps, device, me = contestant(images, at), torch.device(at.device), psutil.Process()
    while (count := line.recv()) > 0:
        start = time.perf_counter()
        for _ in range(count):
            next(steps)
        wait_for(device)
        seconds, there = time.perf_counter() - start, [me, *me.children(recursive=True)]
        held = memory_used(device) if at.device == "cuda" else sum(p.memory_info().rss for p in there)
        line.send((seconds, held))


def contest(
    contestants: dict[str, Callable], images: torch.Tensor, at: Setting, turns: int, steps: int
) -> dict[str, dict]:
    """Images a second of each in each turn, and its memory at the end."""
    there, context = {}, multiprocessing.get_context("spawn")
    for name, contestant in contestants.items():
        line, other = context.Pipe()
        context.Process(target=serve, args=(contestant, images, at, other)).start()
        other.close()
        there[name] = line
    found = {name: {"images_per_second": [], "memory": 0} for name in there}
    for turn in range(-1, turns):  # the first only warms up
        for name, line in there.items():
            line.send(2 * at.workers + 1)  # what a DataLoader has ready
            line.recv()
            line.send(steps)
            seconds, found[name]["memory"] = line.recv()
            if turn >= 0:
                found[name]["images_per_second"].append(steps * at.batch / seconds)
    for line in there.values():
        line.send(0)
    return found


def seconds(do: Callable[[], object], times: int = 5) -> float:
    """The median of some times, after one to warm up."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        do()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def rates(n: int = 2048) -> dict[str, float]:
    """Multiplications and additions a second of large matrix products, the most that can be had of this machine."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(n, n, dtype=dtype)
        found[name] = 2 * n**3 / seconds(lambda a=a: a @ a)
    return found


def reached(images: torch.Tensor, at: Setting) -> dict[str, float]:
    """What a step of our DINO multiplies, and its share of what the machine could in that time."""
    steps, best = our_dino(images, at), rates()
    next(steps)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    each = seconds(lambda: next(steps))
    precision = choose_precision("auto", torch.device("cpu"))
    counted = counter.get_total_flops()
    return {"operations": counted, "seconds": each, "share": counted / each / best[precision], **best}


def made_of(images: torch.Tensor, at: Setting, most: int = 12) -> dict[str, float]:
    """Shares of a step's time of the operations of PyTorch that take most of it, what they call not counted in."""
    steps = our_dino(images, at)
    next(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            next(steps)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:most]
    return {name: times[name] / sum(times.values()) for name in largest}


def growth(images: torch.Tensor, at: Setting) -> dict[str, dict[str, float]]:
    """Seconds a step of our DINO, one thing changed at a time."""

    def step(**changed: int) -> float:
        here = replace(at, **changed)
        steps = ours(DINO(our_vit(here), **here.crops, prototypes=here.prototypes), images, here)
        return seconds(lambda: next(steps), 3)

    asked = {"batch": (32, 64, 128, 256), "size": (16, 32, 48, 64), "depth": (1, 3, 6, 12)}
    asked["prototypes"] = (256, 2048, 16384, 65536)
    return {name: {str(n): step(**{name: n}) for n in numbers} for name, numbers in asked.items()}


def neighbours(n: int = 50_000, m: int = 10_000) -> dict[str, float]:
    """Seconds for the 20 nearest of n vectors of each of m."""
    from lightly.utils.benchmarking import knn_predict

    torch.manual_seed(0)
    x, labels, y = torch.randn(n, 192), torch.randint(10, (n,)), torch.randn(m, 192)
    bank = F.normalize(x, dim=1).T.contiguous()
    theirs = [
        lambda part=part: knn_predict(F.normalize(part, dim=1), bank, labels, 10, 20, 0.07) for part in y.split(512)
    ]
    return {"minissl": seconds(lambda: knn(x, labels, y), 3), "lightly": seconds(lambda: [do() for do in theirs], 3)}


def table(found: dict[str, dict[str, dict]]) -> str:
    """Medians and ranges over the turns, and how many times as fast we are, turn by turn."""
    lines = ["| | images/s | minissl is faster by | memory, GB |", "|---|---|---|---|"]
    for contest_name, rows in found.items():
        for name, row in rows.items():
            speeds, own = row["images_per_second"], rows["minissl"]["images_per_second"]
            times = [a / b for a, b in zip(own, speeds)]
            said = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
            more = "" if name == "minissl" else f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
            lines.append(f"| {contest_name}, {name} | {said} | {more} | {row['memory'] / 1e9:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each contestant in a turn")
    parser.add_argument("--only", nargs="+", default=list(CONTESTS), choices=CONTESTS)
    parser.add_argument("--gpu", action="store_true", help="ViT-S/16 on a GPU; the contests alone")
    parser.add_argument("--compile", action="store_true", help="our encoders")
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    at = Setting(workers=os.cpu_count(), compile=asked.compile)
    at = on_a_gpu(at) if asked.gpu else at
    images = load("scenes", "val", 64).images.float()
    images = F.interpolate(images, size=256 if asked.gpu else at.size, mode="area").byte()
    found = {}
    report = {"setting": asdict(at), "threads": torch.get_num_threads(), "contests": found}
    for name in asked.only:
        found[name] = contest(CONTESTS[name], images, at, asked.turns, asked.steps)
        checkpoint.write_json(asked.out, report)  # what is measured is kept, whatever happens next
    print(table(found), flush=True)
    for ask in () if asked.gpu else (made_of, reached, growth, neighbours):
        report[ask.__name__] = ask() if ask is neighbours else ask(images, at)
        print(ask.__name__, report[ask.__name__], flush=True)
        checkpoint.write_json(asked.out, report)
    rows = {f"{of}, {name}": row for of, there in found.items() for name, row in there.items()}
    speeds = {name: torch.tensor(row["images_per_second"]) for name, row in rows.items()}
    figure = seeds_figure({"images a second, views included": speeds}, f"{len(speeds)} ways to train, turn by turn")
    figure.savefig(asked.out.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
