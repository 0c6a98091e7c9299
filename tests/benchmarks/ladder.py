"""From DINO to DINOv2, one change at a time: the same encoder, data and minutes.

Each row is a command line; all are evaluated alike. The metrics are written after each run. An evaluated run is not
repeated, so an interrupted ladder is resumed by the same command.

    python -m tests.benchmarks.ladder [--minutes 5] [--seeds 0 1 2] [--data scenes] [--out runs/ladder.json]
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from minissl.cli import parse_run
from minissl.data.images import ImageDataset
from minissl.evaluation import benchmark
from minissl.methods.base import Method
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision

ROWS = {
    "DINO": "dino --sinkhorn_iterations 0 --koleo_loss_weight 0 --teacher_temp 0.04 --warmup_teacher_temp 0.04",
    "+ Sinkhorn-Knopp": "dino --koleo_loss_weight 0",
    "+ KoLeo": "dino",
    "+ masked patches": "dinov2",
    "untied heads": "dinov2 --num_patch_prototypes 256",
    "+ registers": "dinov2 --encoder.num_registers 4",
    "+ LayerScale": "dinov2 --encoder.layer_scale_init 0.1",
    "+ SwiGLU": "dinov2 --encoder.swiglu true",
}
METRICS = ("knn", "linear", "linear_color", "linear_action", "linear_place", "miou_object", "miou_part", "miou_place")
METRICS += ("correspondence", "attention_head_iou", "rank_me")


def seconds_per_step(method: Method, dataset: ImageDataset, config: TrainConfig, steps: int = 40) -> float:
    """Measure the CPU time of a training step, after five steps of warm-up. Other processes do not change CPU time."""
    trial = copy.deepcopy(method)
    trainer.learn(trial, dataset, config, steps=5)
    start = time.process_time()
    trainer.learn(trial, dataset, config, steps=steps)
    return (time.process_time() - start) / steps


def run_row(row: str, seed: int, minutes: float, train_set: ImageDataset, test_set: ImageDataset) -> dict[str, float]:
    """Train one row with one seed, and evaluate its encoder. "minutes" of the result is CPU time."""
    run, _ = parse_run([*ROWS[row].split(), "--device", "cpu", "--seed", str(seed)])
    config, method = TrainConfig(**run.train), run.build()
    config = replace(config, precision=choose_precision(config.precision, torch.device("cpu")))
    steps = int(60 * minutes / seconds_per_step(method, train_set, config))
    start = time.process_time()
    trainer.learn(method, train_set, config, steps)
    seconds, encoder = time.process_time() - start, method.encoder.eval()
    metrics = benchmark.evaluate_encoder(encoder, train_set, test_set, run.crop_size)
    if test_set.masks is not None:
        few = train_set.subsample(300), test_set.subsample(300)
        metrics |= benchmark.evaluate_patches(encoder, *few, run.crop_size)
    cost = {"images_per_second": steps * config.batch_size / seconds, "minutes": seconds / 60}
    return {name: metrics[name] for name in METRICS if name in metrics} | cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"rows": {}}
    run, _ = parse_run(["dinov2", "--data", options.data])
    train_set, test_set = run.load_dataset("train"), run.load_dataset("test")
    for seed in options.seeds:
        for row in options.rows:
            by_seed = results["rows"].setdefault(row, {})
            if str(seed) not in by_seed:
                by_seed[str(seed)] = run_row(row, seed, options.minutes, train_set, test_set)
                checkpoint.write_json(options.out, results | {"minutes": options.minutes, "data": options.data})
                print(row, seed, by_seed[str(seed)], flush=True)
    for row, by_seed in results["rows"].items():
        values = {name: [metrics[name] for metrics in by_seed.values()] for name in next(iter(by_seed.values()))}
        cells = (f"{name} {statistics.mean(x):.3f} ± {statistics.pstdev(x):.3f}" for name, x in values.items())
        print(f"{row:20}", "  ".join(cells))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
