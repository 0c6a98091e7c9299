"""Record the attention maps of every head from the first step of a training to the last.

    python -m tests.benchmarks.attention_history dino --minutes 0 --epochs 20 [--snapshots 14] [--history FILE]

All other options are those of `minissl train`. The maps are of sixteen test scenes. On two hundred others the fraction
of each head's attention on objects is measured at every recorded step, and the best head is chosen. With several
blocks, as with --encoder.depth 3, a second history, layers.safetensors, has the maps of each block at the end.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minissl.cli import parse_run
from minissl.data import Images
from minissl.evaluation import attention_fraction, dense_attention
from minissl.evaluation.attention_history import (
    AttentionHistory,
    SnapshotRecorder,
    attention_snapshot,
    log_spaced_steps,
    save_history,
)
from minissl.models.outputs import Encoder
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision
from minissl.training.run import RunConfig

NUM_SHOWN, NUM_HEAD_IMAGES = 16, 200  # scenes whose maps are recorded, and scenes by which the head is chosen
MAX_BYTES = 580_000  # of maps; above, only the chosen head is kept


def object_fractions(encoder: Encoder, scenes: Images, size: int, layer: int = -1) -> list[float]:
    """Return the mean fraction of each head's attention on the objects."""
    training = encoder.training
    maps = dense_attention(encoder.eval(), scenes.images, size, stride=4, layer=layer)
    encoder.train(training)
    return attention_fraction(maps, scenes.masks).mean(dim=0).tolist()


def record(run: RunConfig, args: Sequence[str], n: int) -> tuple[AttentionHistory, AttentionHistory]:
    """Train in memory. Returns the maps of the last block at n steps, and those of each block at the end.

    Args:
        run: the options.
        args: the command line they came from, which is written into the history.
        n: number of recorded steps.
    """
    train_set, test_set = run.load_dataset("train"), run.load_dataset("test")
    shown = test_set.subset(torch.arange(NUM_SHOWN))
    head_images = test_set.subset(torch.arange(NUM_SHOWN, NUM_SHOWN + NUM_HEAD_IMAGES))
    method, fractions = run.build(), []
    method.prepare(train_set)
    config = TrainConfig(**run.train)
    config = replace(config, precision=choose_precision(config.precision, torch.device("cpu")))
    steps = trainer.plan(method, train_set, config).steps

    def snapshot() -> Tensor:
        fractions.append(object_fractions(method.encoder, head_images, run.crop_size))
        print(f"step {recorder.step}: {', '.join(f'{x:.2f}' for x in fractions[-1])} on the object", flush=True)
        return attention_snapshot(method.encoder, shown.images, run.crop_size)

    recorder = SnapshotRecorder(snapshot, log_spaced_steps(steps, n))
    trainer.learn(method, train_set, config, steps, evaluate=recorder, eval_every=1)
    maps, head = torch.stack(recorder.maps), max(range(len(fractions[-1])), key=lambda i: fractions[-1][i])
    info = {"command": " ".join(args), "data": run.data, "image_size": run.image_size, "scenes": list(range(NUM_SHOWN))}
    info |= {"head": head, "object_fraction": float((head_images.masks > 0).float().mean())}
    layers = record_layers(method.encoder, shown, head_images, run.crop_size, info)
    if maps.nbytes > MAX_BYTES:
        maps, info = maps[:, :, head : head + 1], info | {"head": 0}
    return AttentionHistory(maps, recorder.steps, info | {"attention_fractions": fractions}), layers


def record_layers(encoder: Encoder, shown: Images, head_images: Images, size: int, info: dict) -> AttentionHistory:
    """Return the maps of each block, with the index of the block in place of the step."""
    blocks = list(range(len(encoder.blocks)))
    maps = torch.stack([attention_snapshot(encoder, shown.images, size, layer=i) for i in blocks])
    fractions = [object_fractions(encoder, head_images, size, i) for i in blocks]
    return AttentionHistory(maps, blocks, info | {"attention_fractions": fractions})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=14, help="number of recorded steps")
    parser.add_argument("--history", type=Path, default=Path("data/recorded/emergence.safetensors"), help="output file")
    options, args = parser.parse_known_args()
    run, _ = parse_run([*args, "--device", "cpu"])
    options.history.parent.mkdir(parents=True, exist_ok=True)
    history, layers = record(run, args, options.snapshots)
    save_history(history, options.history)
    print(f"Wrote {options.history} ({options.history.stat().st_size / 1e3:.0f} KB).")
    if len(layers.steps) > 1:
        path = options.history.with_name("layers.safetensors")
        save_history(layers, path)
        print(f"Wrote {path}; attention on the object by block and head: {layers.info['attention_fractions']}.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
