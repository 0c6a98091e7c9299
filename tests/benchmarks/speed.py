"""Training speed, views included: minissl, lightly's documented recipes, and an explicit loop over the DINO paper.

The ViT (width 192, 6 blocks, patches of 4 pixels, images of 32 pixels, two global crops and four local ones of 16),
head and batch size (128) are the same; on a GPU it is ViT-S/16 with the paper's crops. Each implementation runs in its
own process with a thread per core. They take turns, a few steps each, so that other processes affect all alike. Batches
that a DataLoader prepared before a turn are consumed before time is measured. On a CPU the cost of a step is then
analyzed: operators, efficiency, scaling, and k-NN.

    python -m tests.benchmarks.speed [--gpu] [--turns 3] [--steps 6] [--only dino simclr dinov2] [--out runs/speed.json]
    python -m tests.benchmarks.speed --print data/recorded/speed.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minissl.data import load_dataset
from minissl.evaluation import knn
from minissl.training import checkpoint
from minissl.training.device import choose_precision, memory_used, synchronize
from minissl.visualization.charts import seeds_figure
from tests.benchmarks.implementations import IMPLEMENTATIONS, Setting, gpu_setting, minissl_dino

Results = dict[str, dict[str, dict[str, Any]]]  # method -> implementation -> images_per_second of each turn, memory


def serve_steps(implementation: Callable, images: torch.Tensor, setting: Setting, connection: Any) -> None:
    """Take as many steps as the connection asks for, until 0. Replies with seconds and bytes, workers included."""
    torch.manual_seed(0)
    steps, device, process = implementation(images, setting), torch.device(setting.device), psutil.Process()
    while (count := connection.recv()) > 0:
        start = time.perf_counter()
        for _ in range(count):
            next(steps)
        synchronize(device)
        seconds, processes = time.perf_counter() - start, [process, *process.children(recursive=True)]
        on_cuda = setting.device == "cuda"
        memory = memory_used(device) if on_cuda else sum(p.memory_info().rss for p in processes)
        connection.send((seconds, memory))


def measure_implementations(
    implementations: dict[str, Callable], images: torch.Tensor, setting: Setting, turns: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Return images per second of each implementation in each turn, and its memory in bytes at the end."""
    connections, context = {}, multiprocessing.get_context("spawn")
    for name, implementation in implementations.items():
        connections[name], other = context.Pipe()
        context.Process(target=serve_steps, args=(implementation, images, setting, other)).start()
        other.close()
    results = {name: {"images_per_second": [], "memory": 0} for name in connections}
    for turn in range(-1, turns):  # the first warms up
        for name, connection in connections.items():
            connection.send(2 * setting.num_workers + 1)  # batches that a DataLoader has prepared
            connection.recv()
            connection.send(steps)
            seconds, results[name]["memory"] = connection.recv()
            if turn >= 0:
                results[name]["images_per_second"].append(steps * setting.batch_size / seconds)
    for connection in connections.values():
        connection.send(0)
    return results


def median_seconds(function: Callable[[], object], repetitions: int = 5) -> float:
    """Return the median time of some calls, after one to warm up."""
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def peak_flops(n: int = 2048) -> dict[str, float]:
    """Measure floating-point operations per second of large matrix products, the most that this machine reaches."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(n, n, dtype=dtype)
        rates[name] = 2 * n**3 / median_seconds(lambda a=a: a @ a)
    return rates


def efficiency(images: torch.Tensor, setting: Setting) -> dict[str, float]:
    """Count the operations of a step of minissl's DINO, and compare their rate with the machine's peak."""
    steps, peak = minissl_dino(images, setting), peak_flops()
    next(steps)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    seconds, flops = median_seconds(lambda: next(steps)), counter.get_total_flops()
    precision = choose_precision("auto", torch.device("cpu"))
    return {"flops": flops, "seconds": seconds, "fraction_of_peak": flops / seconds / peak[precision], **peak}


def operator_fractions(images: torch.Tensor, setting: Setting, n: int = 12) -> dict[str, float]:
    """Return the n operators with the largest fractions of a step's CPU time, without the operators they call."""
    steps = minissl_dino(images, setting)
    next(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            next(steps)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:n]
    return {name: times[name] / sum(times.values()) for name in largest}


def scaling(images: torch.Tensor, setting: Setting) -> dict[str, dict[str, float]]:
    """Measure the seconds of a step of minissl's DINO as a function of one size at a time."""

    def step_seconds(**changes: int) -> float:
        steps = minissl_dino(images, replace(setting, **changes))
        return median_seconds(lambda: next(steps), 3)

    sizes = {"batch_size": (32, 64, 128, 256), "image_size": (16, 32, 48, 64), "depth": (1, 3, 6, 12)}
    sizes["num_prototypes"] = (256, 2048, 16384, 65536)
    return {name: {str(n): step_seconds(**{name: n}) for n in values} for name, values in sizes.items()}


def knn_seconds(n: int = 50_000, m: int = 10_000) -> dict[str, float]:
    """Measure the seconds of k-NN with k = 20, m test features and n training features."""
    from lightly.utils.benchmarking import knn_predict

    torch.manual_seed(0)
    train, labels, test = torch.randn(n, 192), torch.randint(10, (n,)), torch.randn(m, 192)
    bank = F.normalize(train, dim=1).T.contiguous()

    def lightly_knn() -> None:
        for part in test.split(512):
            knn_predict(F.normalize(part, dim=1), bank, labels, 10, 20, 0.07)

    return {"minissl": median_seconds(lambda: knn(train, labels, test), 3), "lightly": median_seconds(lightly_knn, 3)}


def markdown_table(results: Results) -> str:
    """Format medians and ranges over the turns, and by how much minissl is faster, turn by turn."""
    lines = ["| method, implementation | images/s | minissl is faster by | memory, GB |", "|---|---|---|---|"]
    for method, implementations in results.items():
        own_rates = implementations["minissl"]["images_per_second"]
        for name, row in implementations.items():
            rates = row["images_per_second"]
            factors = [a / b for a, b in zip(own_rates, rates)]
            cell = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
            factor = f"{statistics.median(factors):.1f} ({min(factors):.1f} to {max(factors):.1f})"
            factor = "" if name == "minissl" else factor
            lines.append(f"| {method}, {name} | {cell} | {factor} | {row['memory'] / 1e9:.1f} |")
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each implementation per turn")
    parser.add_argument("--only", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--gpu", action="store_true", help="ViT-S/16 on a GPU, without the analysis of a step")
    parser.add_argument("--compile", action="store_true", help="compile the encoders of minissl")
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"))
    parser.add_argument("--print", type=Path, help="print the table of an existing file, and measure nothing")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.print:
        print(markdown_table(json.loads(options.print.read_text(encoding="utf-8"))["implementations"]))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    setting = Setting(num_workers=os.cpu_count(), compile=options.compile)
    setting = gpu_setting(setting) if options.gpu else setting
    images = load_dataset("scenes", "val", 64).images.float()
    images = F.interpolate(images, size=256 if options.gpu else setting.image_size, mode="area").byte()
    results: Results = {}
    report: dict[str, Any] = {
        "setting": asdict(setting),
        "threads": torch.get_num_threads(),
        "implementations": results,
    }
    for method in options.only:
        implementations = IMPLEMENTATIONS[method]
        results[method] = measure_implementations(implementations, images, setting, options.turns, options.steps)
        checkpoint.write_json(options.out, report)  # kept if a later measurement fails
    print(markdown_table(results), flush=True)
    if not options.gpu:
        for function in (operator_fractions, efficiency, scaling):
            report[function.__name__] = function(images, setting)
        report["knn"] = knn_seconds()
        print(json.dumps({name: report[name] for name in list(report)[3:]}, indent=1), flush=True)
        checkpoint.write_json(options.out, report)
    rates = {
        f"{method}, {name}": torch.tensor(row["images_per_second"])
        for method, implementations in results.items()
        for name, row in implementations.items()
    }
    figure = seeds_figure({"images per second, views included": rates}, "Training speed, turn by turn")
    figure.savefig(options.out.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
