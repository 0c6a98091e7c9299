"""Kill a training repeatedly at random times, also during saves, and check that it ends with the same weights.

The training is a small DINO that saves after every step. Each process is forked from one that has PyTorch loaded, and
is killed (SIGKILL) up to a second after its start. In the end the weights are compared, bit by bit, with those of a
training that was not interrupted.

    python -m tests.benchmarks.interrupted_runs [--kills 200] [--steps 3000]
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from minissl.data import Images
from minissl.methods.dino import DINO
from minissl.models.vit import ViT
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.plan import Plan


def train(output_dir: Path, steps: int) -> None:
    """Train in the directory, from its checkpoint if it has one, to the end or until killed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"crop_size": 8, "local_crop_size": 4, "num_local_crops": 1}
    method = DINO(ViT(16, 1, 2, 4, 8), **sizes, num_prototypes=16, hidden_dim=16, bottleneck_dim=8)
    images = Images(torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8))
    config = TrainConfig(batch_size=8, precision="fp32", save_minutes=0.0, eval_minutes=1e6)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        trainer.fit(method, images, config, Plan(steps), output_dir, lambda encoder: {}, export=lambda encoder: None)


def start_process(output_dir: Path, steps: int) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=train, args=(output_dir, steps))
    process.start()
    return process


def train_with_kills(output_dir: Path, steps: int, kills: int, seed: int = 0) -> int:
    """Kill the training so often, then let it end. Returns how many kills left a partially written file."""
    rng, partial = random.Random(seed), 0
    output_dir.mkdir(parents=True, exist_ok=True)
    for n in range(kills):
        process = start_process(output_dir, steps)
        time.sleep(rng.uniform(0.02, 1.0))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            raise SystemExit(f"The training ended after {n} kills; give more --steps.")
        partial += any(output_dir.glob("*.partial"))
    start_process(output_dir, steps).join()
    return partial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        complete, interrupted = Path(folder) / "complete", Path(folder) / "interrupted"
        complete.mkdir()
        start_process(complete, options.steps).join()
        partial = train_with_kills(interrupted, options.steps, options.kills)
        (expected, expected_info), (tensors, info) = (
            checkpoint.load_latest_tensors(path / "checkpoint.safetensors") for path in (complete, interrupted)
        )
    equal = info["step"] == expected_info["step"] == options.steps
    equal = equal and all(torch.equal(tensor, tensors[name]) for name, tensor in expected.items())
    weights = "the same bits" if equal else "DIFFERENT WEIGHTS"
    print(f"{options.kills} kills, {partial} of them during a save, {info['step']} steps: {weights}")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
