"""From DINO to DINOv2, one difference at a time: the same encoder, data and minutes.

Each row is a command line; all are measured alike, by `scores`. The numbers are written after each run, and what
is there is not run again: the ladder goes on where it was stopped.

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
from torch import nn

from minissl import checkpoint, scores, train
from minissl.__main__ import parse_run
from minissl.data import Images

ROWS = {
    "DINO": "dino --sinkhorn 0 --koleo 0 --teacher_temperature 0.04 --warmup_temperature 0.04",
    "+ Sinkhorn-Knopp": "dino --koleo 0",
    "+ KoLeo": "dino",
    "+ hidden patches": "dinov2",
    "two heads": "dinov2 --patch_prototypes 256",
    "+ registers": "dinov2 --encoder.registers 4",
    "+ LayerScale": "dinov2 --encoder.layer_scale 0.1",
    "+ SwiGLU": "dinov2 --encoder.gated true",
}
KEPT = ("knn", "linear", "linear_color", "linear_action", "linear_place", "miou_object", "miou_part", "miou_place")
KEPT += ("correspondence", "attention_head_iou", "rank_me")


def seconds_a_step(method: nn.Module, images: Images, config: train.TrainConfig, steps: int = 40) -> float:
    """Of the CPU, not of the clock, which counts what else the machine does; after a few steps to warm up."""
    trial = copy.deepcopy(method)
    train.learn(trial, images, config, steps=5)
    start = time.process_time()
    train.learn(trial, images, config, steps=steps)
    return (time.process_time() - start) / steps


def climb(row: str, seed: int, minutes: float, images: Images, test: Images) -> dict[str, float]:
    """Train one row from one seed, and measure its encoder."""
    run, _ = parse_run([*ROWS[row].split(), "--device", "cpu", "--seed", str(seed)])
    config, method = train.TrainConfig(**run.loop), run.build()
    config = replace(config, precision=train.choose_precision(config.precision, torch.device("cpu")))
    steps = int(60 * minutes / seconds_a_step(method, images, config))
    start = time.process_time()
    train.learn(method, images, config, steps)
    seconds, encoder = time.process_time() - start, method.encoder.eval()
    found = scores.score(encoder, images, test, run.size)
    if test.masks is not None:
        found |= scores.score_patches(encoder, images.some(300), test.some(300), run.size)
    speed = {"images_per_second": steps * config.batch_size / seconds, "minutes": seconds / 60}  # of the CPU
    return {name: found[name] for name in KEPT if name in found} | speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"rows": {}}
    images, test = (parse_run(["dinov2", "--data", asked.data])[0].images(split) for split in ("train", "test"))
    for seed in asked.seeds:
        for row in asked.rows:
            here = done["rows"].setdefault(row, {})
            if str(seed) not in here:
                here[str(seed)] = climb(row, seed, asked.minutes, images, test)
                checkpoint.write_json(asked.out, done | {"minutes": asked.minutes, "data": asked.data})
                print(row, seed, here[str(seed)], flush=True)
    for row, found in done["rows"].items():
        numbers = {name: [one[name] for one in found.values()] for name in next(iter(found.values()))}
        said = (f"{name} {statistics.mean(x):.3f} ± {statistics.pstdev(x):.3f}" for name, x in numbers.items())
        print(f"{row:20}", "  ".join(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
