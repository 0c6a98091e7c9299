"""Kill a training again and again, at moments of chance, also while it saves; it must end as one that was left alone.

A small DINO that saves after every step. Each life is a process of its own, forked from one that has PyTorch loaded,
and is killed (SIGKILL) up to a second after it began. In the end the weights of both are compared, bit by bit.

    python -m tests.benchmarks.kills [--kills 200] [--steps 3000]
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

from minissl import checkpoint, train
from minissl.data import Images
from minissl.methods.dino import DINO
from minissl.vit import ViT


def live(out: Path, steps: int) -> None:
    """Train in the folder, from its checkpoint if there is one, to the end or until killed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = ViT(16, 1, 2, 4, 8)
    method = DINO(vit, size=8, local_size=4, local_crops=1, prototypes=16, hidden=16, bottleneck=8)
    images = Images(torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8))
    config = train.TrainConfig(batch_size=8, precision="fp32", save_minutes=0.0, watch_minutes=1e6)
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        train.fit(method, images, config, steps, out, watch=lambda encoder: {}, export=lambda encoder: None)


def weights(out: Path) -> tuple[dict[str, torch.Tensor], int]:
    tensors, info = checkpoint.load_newest(out / "checkpoint.safetensors")
    return tensors, info["step"]


def lives(out: Path, steps: int, kills: int, seed: int = 0) -> tuple[int, int]:
    """Kill it so often, then let it end. Returns how many kills met it alive, and how many left a half-written file."""
    chance, fork = random.Random(seed), multiprocessing.get_context("fork")
    met = halves = 0
    out.mkdir(parents=True, exist_ok=True)
    while met < kills:
        life = fork.Process(target=live, args=(out, steps))
        life.start()
        time.sleep(chance.uniform(0.02, 1.0))
        os.kill(life.pid, signal.SIGKILL)
        life.join()
        if life.exitcode == 0:
            raise SystemExit(f"It ended after {met} kills; give more --steps.")
        met += 1
        halves += any(out.glob("*.partial"))
    life = fork.Process(target=live, args=(out, steps))
    life.start()
    life.join()
    return met, halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, torn = Path(folder) / "whole", Path(folder) / "torn"
        whole.mkdir()
        left = multiprocessing.get_context("fork").Process(target=live, args=(whole, asked.steps))
        left.start()
        left.join()
        met, halves = lives(torn, asked.steps, asked.kills)
        (one, at), (other, there) = weights(whole), weights(torn)
        same = at == there == asked.steps and all(torch.equal(t, other[name]) for name, t in one.items())
        said = "the same bits" if same else "OTHER WEIGHTS"
        print(f"{met} kills, {halves} of them in the middle of a save, {there} steps: {said}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
