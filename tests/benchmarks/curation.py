"""A pool as one finds it, and what is chosen from it: what does each step of curation do for the features?

From 20,000 pictures, many of them copies, many of nothing, most of two kinds, some are chosen in several ways, and a
method learns from each choice for the same minutes of one core. All are measured on Scenes, which no choice has seen.
What is needed of a picture to choose it comes from the pool too: SimCLR, which trains on all of it first. The chosen
set that retrieval starts from is 200 scenes of the validation split, without their labels.

    python -m tests.benchmarks.curation [--method dinov2] [--keep 3000] [--minutes 3] [--seeds 0 1 2] [--arms ...]
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minissl import checkpoint, scores, train
from minissl.__main__ import parse_run
from minissl.data import Images, Scenes
from minissl.data.curation import balanced, clusters, copies, retrieved, thumbnails
from minissl.data.pool import TOPICS, Pool
from minissl.evaluate import extract
from tests.benchmarks.ladder import seconds_a_step

POOL, CHOSEN = 20_000, 200
COPY = 0.95  # cosine of two thumbnails, chosen on the first 6,000 of the pool by the truth, which flatters it a little
GROUPS = 200
ARMS = (
    "random",
    "retrieved",
    "balanced",
    "true scenes",
    "true kinds",
    "without copies",
    "random 300",
    "random 1000",
    "pool",
)


def learn(words: list[str], images: Tensor, minutes: float) -> tuple[nn.Module, int]:
    """Train a method on images for minutes of the CPU, and give its encoder and the pixels it sees."""
    run, _ = parse_run([*words, "--device", "cpu"])
    data, method = Images(images), run.build()
    config = train.TrainConfig(**run.loop)
    config = replace(config, precision=train.choose_precision(config.precision, torch.device("cpu")))
    train.learn(method, data, config, int(60 * minutes / seconds_a_step(method, data, config)))
    return method.encoder.eval(), run.size


def choose(arm: str, keep: int, pool: Pool, features: Tensor, chosen: Tensor, kept: Tensor, seed: int) -> Tensor:
    """Rows of the pool.

    Args:
        arm: one of ARMS; those with "true" use what is known of the pool: scenes without copies, and all kinds alike.
            No curation can do better, so they say what there is to be won.
        keep: how many pictures; an arm with a number in its name has its own.
        features: (N, D) of the pool.
        chosen: (S, D) of the chosen set.
        kept: rows that are left without copies.
        seed: of the draws.
    """
    chance = torch.Generator().manual_seed(seed)
    if arm == "pool":
        return torch.arange(len(pool))
    if arm == "without copies":
        return kept[torch.randperm(len(kept), generator=chance)[:keep]]
    if arm.startswith("true"):
        good = ((pool.topic == 0) & (pool.origin == torch.arange(len(pool)))).nonzero()[:, 0]
        if arm == "true scenes":
            return good[torch.randperm(len(good), generator=chance)[:keep]]
        kinds = pool.labels[good]
        return good[torch.multinomial(1 / torch.bincount(kinds)[kinds].double(), keep, generator=chance)]
    if arm == "balanced":
        return kept[balanced(clusters(features[kept], GROUPS, seed), keep, seed)]
    if arm == "retrieved":
        return kept[retrieved(features[kept], chosen, keep)]
    n = int(arm.removeprefix("random") or keep)
    return torch.randperm(len(pool), generator=chance)[:n]


def describe(pool: Pool, rows: Tensor) -> dict[str, float]:
    """What was chosen: how much of it shows nothing or repeats another, and how evenly the kinds are in it."""
    origin, shown = pool.origin[rows], pool.topic[rows] == 0
    share = torch.bincount(pool.labels[rows][shown], minlength=len(pool.classes)) / shown.sum()
    kinds = torch.special.entr(share).sum().exp()
    repeats = 1 - len(origin.unique()) / len(rows)
    return {
        "images": len(rows),
        "of nothing": 1 - float(shown.float().mean()),
        "repeats": repeats,
        "kinds": float(kinds),
    }


def found_copies(pool: Pool, first: Tensor) -> dict[str, float]:
    """Precision and recall of what is removed, of all pictures and of those that show a scene."""
    removed, true = first != torch.arange(len(pool)), pool.origin != torch.arange(len(pool))
    scene, found = pool.topic == TOPICS.index("scene"), {}
    for name, here in (("", torch.ones_like(scene)), ("_scenes", scene)):
        hit = float((removed & true & here).sum())
        found[f"precision{name}"] = hit / float((removed & here).sum())
        found[f"recall{name}"] = hit / float((true & here).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="dinov2")
    parser.add_argument("--keep", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/curation.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    pool = Pool(POOL)
    guide, size = learn(["simclr"], pool.images, asked.minutes)
    features, chosen = (extract(guide, x, size) for x in (pool.images, Scenes("val", n=CHOSEN).images))
    first = copies(thumbnails(pool.images), COPY)
    kept = (first == torch.arange(len(pool))).nonzero()[:, 0]
    done = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"arms": {}}
    done |= {"copies": found_copies(pool, first)} | {k: vars(asked)[k] for k in ("method", "keep", "minutes")}
    print(done["copies"], flush=True)
    known, test = (parse_run([asked.method])[0].images(split) for split in ("train", "test"))
    for arm in asked.arms:
        for seed in asked.seeds:
            here = done["arms"].setdefault(arm, {})
            if str(seed) not in here:
                rows = choose(arm, asked.keep, pool, features, chosen, kept, seed)
                words = [asked.method, "--seed", str(seed)]
                encoder, its_size = learn(words, pool.images[rows], asked.minutes)
                here[str(seed)] = describe(pool, rows) | scores.watch(encoder, known, test, its_size)
                checkpoint.write_json(asked.out, done)
                print(arm, seed, here[str(seed)], flush=True)
    for arm, found in done["arms"].items():
        knn = [one["knn"] for one in found.values()]
        print(f"{arm:16} k-NN {statistics.mean(knn):.3f} ± {statistics.pstdev(knn):.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
