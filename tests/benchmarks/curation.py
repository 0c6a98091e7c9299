"""Curation of an uncurated pool: which features does a method learn from differently selected images?

The pool has 20,000 images: many near-duplicates, many images without an object, and mostly two classes. Subsets are
selected in several ways, and a method is trained on each for the same time on one core. All encoders are evaluated on
Scenes, which is not in the pool. The features used for selection come from SimCLR, trained on the whole pool. The
curated set from which retrieval starts is 200 scenes of the validation split, without their labels.

    python -m tests.benchmarks.curation [--method dinov2] [--keep 3000] [--minutes 3] [--seeds 0 1 2] [--arms ...]
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minissl.cli import parse_run
from minissl.data import Images, Scenes
from minissl.data.curation import (
    balanced_sample,
    cluster,
    find_near_duplicates,
    retrieve_similar,
    thumbnail_descriptors,
)
from minissl.data.synthetic.uncurated import TOPICS, UncuratedPool
from minissl.evaluation import extract_features, quick_evaluation
from minissl.models.outputs import Encoder
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision
from tests.benchmarks.ladder import seconds_per_step

POOL_SIZE, CURATED_SIZE = 20_000, 200
DUPLICATE_THRESHOLD = 0.95  # chosen by the ground truth of the pool's first 6,000 images, so its result is optimistic
NUM_CLUSTERS = 200
ARMS = (
    "random",
    "retrieved",
    "balanced",
    "oracle: scenes",
    "oracle: classes",
    "deduplicated",
    "random 300",
    "random 1000",
    "pool",
)


class Candidates(NamedTuple):
    """What a selection uses."""

    pool: UncuratedPool
    features: Tensor  # (N, D) of the pool
    curated: Tensor  # (S, D), features of the curated set
    unique: Tensor  # (n,) indices of the pool without near-duplicates


def train(args: Sequence[str], images: Tensor, minutes: float) -> tuple[Encoder, int]:
    """Train a method on images for minutes of CPU time. Returns its encoder and the side in pixels of its input."""
    run, _ = parse_run([*args, "--device", "cpu"])
    dataset, method = Images(images), run.build()
    config = TrainConfig(**run.train)
    config = replace(config, precision=choose_precision(config.precision, torch.device("cpu")))
    trainer.learn(method, dataset, config, int(60 * minutes / seconds_per_step(method, dataset, config)))
    return method.encoder.eval(), run.crop_size


def select(arm: str, num_images: int, candidates: Candidates, seed: int) -> Tensor:
    """Return indices (n,) of the selected images.

    Args:
        arm: one of ARMS. Those with "oracle" use the ground truth: scenes that are no near-duplicates, and of these all
            classes evenly. They are upper bounds of what curation can reach.
        num_images: n, unless the name of the arm says another.
        candidates: the pool, and what is known of it.
        seed: of random selections.
    """
    pool, features, curated, unique = candidates
    generator = torch.Generator().manual_seed(seed)
    if arm == "pool":
        return torch.arange(len(pool))
    if arm == "deduplicated":
        return unique[torch.randperm(len(unique), generator=generator)[:num_images]]
    if arm.startswith("oracle"):
        scenes = ((pool.topic == 0) & (pool.origin == torch.arange(len(pool)))).nonzero()[:, 0]
        if arm == "oracle: scenes":
            return scenes[torch.randperm(len(scenes), generator=generator)[:num_images]]
        labels = pool.labels[scenes]
        class_weights = 1 / torch.bincount(labels)[labels].double()
        return scenes[torch.multinomial(class_weights, num_images, generator=generator)]
    if arm == "balanced":
        return unique[balanced_sample(cluster(features[unique], NUM_CLUSTERS, seed), num_images, seed)]
    if arm == "retrieved":
        return unique[retrieve_similar(features[unique], curated, num_images)]
    n = int(arm.removeprefix("random") or num_images)
    return torch.randperm(len(pool), generator=generator)[:n]


def describe(pool: UncuratedPool, indices: Tensor) -> dict[str, float]:
    """Describe a selection by the ground truth.

    Returns:
        "images", their number; "non_scene_fraction", without an object; "duplicate_fraction", of an image that is
        already selected; "num_effective_classes", the exponential of the entropy of the classes.
    """
    origins, is_scene = pool.origin[indices], pool.topic[indices] == 0
    class_fractions = torch.bincount(pool.labels[indices][is_scene], minlength=len(pool.classes)) / is_scene.sum()
    return {
        "images": len(indices),
        "non_scene_fraction": 1 - float(is_scene.float().mean()),
        "duplicate_fraction": 1 - len(origins.unique()) / len(indices),
        "num_effective_classes": float(torch.special.entr(class_fractions).sum().exp()),
    }


def evaluate_duplicates(pool: UncuratedPool, first: Tensor) -> dict[str, float]:
    """Compute precision and recall of the removed images, among all images and ("_scenes") among scenes.

    Args:
        pool: N images.
        first: (N,), the output of `find_near_duplicates`.
    """
    removed, duplicate = first != torch.arange(len(pool)), pool.origin != torch.arange(len(pool))
    is_scene, metrics = pool.topic == TOPICS.index("scene"), {}
    for suffix, subset in (("", torch.ones_like(is_scene)), ("_scenes", is_scene)):
        correct = float((removed & duplicate & subset).sum())
        metrics[f"precision{suffix}"] = correct / float((removed & subset).sum())
        metrics[f"recall{suffix}"] = correct / float((duplicate & subset).sum())
    return metrics


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="dinov2")
    parser.add_argument("--keep", type=int, default=3000, help="images to select")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/curation.json"))
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pool = UncuratedPool(POOL_SIZE)
    encoder, size = train(["simclr"], pool.images, options.minutes)
    features, curated = (
        extract_features(encoder, x, size) for x in (pool.images, Scenes("val", n=CURATED_SIZE).images)
    )
    first = find_near_duplicates(thumbnail_descriptors(pool.images), DUPLICATE_THRESHOLD)
    candidates = Candidates(pool, features, curated, (first == torch.arange(len(pool))).nonzero()[:, 0])
    results: dict[str, Any] = {"arms": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    results |= {key: getattr(options, key) for key in ("method", "keep", "minutes")}
    results["near_duplicates"] = evaluate_duplicates(pool, first)
    print(results["near_duplicates"], flush=True)
    train_set, test_set = (parse_run([options.method])[0].load_dataset(split) for split in ("train", "test"))
    for arm in options.arms:
        by_seed = results["arms"].setdefault(arm, {})
        for seed in options.seeds:
            if str(seed) not in by_seed:
                indices = select(arm, options.keep, candidates, seed)
                encoder, size = train([options.method, "--seed", str(seed)], pool.images[indices], options.minutes)
                metrics = quick_evaluation(encoder, train_set, test_set, size)
                by_seed[str(seed)] = describe(pool, indices) | metrics
                checkpoint.write_json(options.out, results)
                print(arm, seed, by_seed[str(seed)], flush=True)
    for arm, by_seed in results["arms"].items():
        knn = [metrics["knn"] for metrics in by_seed.values()]
        print(f"{arm:16} k-NN {statistics.mean(knn):.3f} ± {statistics.pstdev(knn):.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
