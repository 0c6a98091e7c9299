"""Attention while it emerges: where every head of a method looks, from the first step to the last.

    python -m tests.benchmarks.emergence dino --minutes 0 --epochs 20 [--moments 14] [--film FILE]

All other options are those of `python -m minissl train`. Sixteen test scenes are looked at; on two hundred others it is
measured which head has most of its attention on objects, and how much that was at every moment. With several blocks,
as of --encoder.depth 3, a second film has them one after the other at the end of the training, in layers.safetensors.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minissl import film, runs, train
from minissl.__main__ import parse_run
from minissl.data import Images
from minissl.evaluate import attention_share, fine_attention

SHOWN, OTHERS = 16, 200  # scenes in the film, and scenes the head is chosen on
LIMIT = 580_000  # bytes of maps; with more than that, only the chosen head is kept


def shares(encoder: torch.nn.Module, scenes: Images, size: int, layer: int | None = None) -> Tensor:
    """How much of each head's attention is on the objects, (heads,)."""
    training = encoder.training
    maps = fine_attention(encoder.eval(), scenes.images, size, stride=4, layer=layer)
    found = attention_share(maps, scenes.masks).mean(dim=0)
    encoder.train(training)
    return found


def record(run: runs.Run, words: list[str], n: int) -> tuple[film.Film, film.Film]:
    """Train a run in memory, and keep n moments of it, and its blocks at the end."""
    data, test = run.images("train"), run.images("test")
    shown, others = (test.take(torch.arange(*ends)) for ends in ((0, SHOWN), (SHOWN, SHOWN + OTHERS)))
    method, by_head = run.build(), []
    runs.prepare(method, data)
    config = train.TrainConfig(**run.loop)
    config = replace(config, precision=train.choose_precision(config.precision, torch.device("cpu")))
    steps = train.plan(method, data, config).steps

    def look() -> Tensor:
        by_head.append(shares(method.encoder, others, run.size).tolist())
        print(f"step {camera.step}: {', '.join(f'{share:.2f}' for share in by_head[-1])} on the object", flush=True)
        return film.snapshot(method.encoder, shown.images, run.size)

    camera = film.Camera(look, film.moments(steps, n))
    train.learn(method, data, config, steps, look=camera, every=1)
    maps, head = torch.stack(camera.maps), max(range(len(by_head[-1])), key=lambda i: by_head[-1][i])
    about = {"command": " ".join(words), "data": run.data, "image_size": run.image_size, "scenes": list(range(SHOWN))}
    about |= {"head": head, "shares": by_head, "object_share": float((others.masks > 0).float().mean())}
    blocks = range(len(method.encoder.blocks))
    deep = torch.stack([film.snapshot(method.encoder, shown.images, run.size, layer=i) for i in blocks])
    by_block = [shares(method.encoder, others, run.size, i).tolist() for i in blocks]
    layers = film.Film(deep, list(blocks), about | {"shares": by_block})
    if maps.nbytes > LIMIT:
        maps, about = maps[:, :, head : head + 1], about | {"head": 0}
    return film.Film(maps, camera.steps, about), layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=14)
    parser.add_argument("--film", type=Path, default=Path("data/recorded/emergence.safetensors"))
    options, words = parser.parse_known_args()
    run, _ = parse_run([*words, "--device", "cpu"])
    options.film.parent.mkdir(parents=True, exist_ok=True)
    moments, layers = record(run, words, options.moments)
    film.save(moments, options.film)
    print(f"Written: {options.film}, {options.film.stat().st_size / 1e3:.0f} KB")
    if len(layers.steps) > 1:
        film.save(layers, options.film.with_name("layers.safetensors"))
        print(f"Its blocks, {layers.about['shares']}: {options.film.with_name('layers.safetensors')}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
