"""Degradation of dense features in long training, and Gram anchoring against it: DINOv3's claim at a small scale.

All runs start from one checkpoint and train on the class-token loss alone (--ibot_loss_weight 0), without and with two
weights of the Gram loss. The class token, patch features at four times the training resolution, and label propagation
in clips are evaluated on the test split several times during training. An existing result is not computed again.

    python -m tests.benchmarks.decay [--seeds 0 1 2] [--early 1500] [--further 2000] [--out runs/decay/decay.json]
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.cli import parse_run
from minissl.data import load_dataset
from minissl.data.images import ImageDataset
from minissl.data.synthetic.clips import Clip, Clips
from minissl.data.transforms.functional import normalize
from minissl.evaluation import (
    accuracy,
    extract_features,
    frame_patch_features,
    j_and_f,
    knn,
    labels_at_patch_centers,
    mean_iou,
    pixel_labels,
    propagate_stream,
    segment_patches,
)
from minissl.hub.pretrained import init_from_run, save_encoder
from minissl.methods.base import Method
from minissl.models.outputs import Encoder
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.run import RunConfig

EARLY = "dinov3 --gram_loss_weight 0 --final_lr 1e-6 --final_weight_decay 0.4"  # decayed, as DINOv2's preset ends
LATE = (  # at the preset's constant learning rate
    "dinov3 --ibot_loss_weight 0 --gram_update_at [] --gram_start_fraction 0 --gram_warmup_fraction 0 "
    "--warmup_fraction 0.02"
)
ARMS = {"free": "--gram_loss_weight 0", "anchored": "--gram_loss_weight 10", "tight": "--gram_loss_weight 50"}
EVALUATE_AT = (0.25, 0.5, 1.0)  # fractions of the late training

Metrics = dict[str, float]


class PatchEvaluator:
    """Evaluate the class token and the patch features of an encoder on Scenes and clips.

    Args:
        split: of the scenes and clips.
        size: side in pixels of the images whose patches are evaluated.
    """

    def __init__(self, split: str = "test", size: int = 128):
        self.train, self.test = load_dataset("scenes", "train", 64).subsample(5000), load_dataset("scenes", split, 64)
        self.patch_train = load_dataset("scenes", "train", size).subsample(300)
        self.patch_test = load_dataset("scenes", split, size).subsample(300)
        clips = (Clips(split, size, 24, 20)[i] for i in range(20))
        self.clips = [clip for clip in clips if (clip.masks[0] > 0).any()]

    @torch.no_grad()
    def __call__(self, encoder: Encoder, image_size: int) -> Metrics:
        """Return all metrics, fractions from 0 to 1; the class token is evaluated on images of `image_size` pixels."""
        training = encoder.training
        encoder.eval()
        train, test = (extract_features(encoder, dataset, image_size) for dataset in (self.train, self.test))
        metrics = {"knn": accuracy(knn(train, self.train.labels, test), self.test.labels)}
        train_patches, test_patches = (patch_features(encoder, x.images) for x in (self.patch_train, self.patch_test))
        truth = pixel_labels(self.patch_test)
        for target, labels in pixel_labels(self.patch_train).items():
            for classifier in ("linear", "knn"):
                predictions = segment_patches(train_patches, labels, test_patches, classifier)
                metrics[f"miou_{target}_{classifier}"] = mean_iou(predictions, truth[target])
        metrics["nearest_patch_on_object"] = nearest_patch_on_object(test_patches, self.patch_test.masks)
        metrics["J&F"] = mean_j_and_f(encoder, self.clips)
        encoder.train(training)
        return metrics


def patch_features(encoder: Encoder, images: Tensor) -> Tensor:
    """Return patch tokens (N, h, w, D) of uint8 images (N, 3, H, W)."""
    return torch.cat([encoder(normalize(part)).patches for part in images.split(50)])


def nearest_patch_on_object(patches: Tensor, masks: Tensor) -> float:
    """Of the patches on an object, return the fraction whose most similar patch of the same image is on it too.

    Args:
        patches: (N, h, w, D).
        masks: (N, H, W), nonzero on the object.
    """
    on_object = (labels_at_patch_centers(masks, patches.shape[1:3]) > 0).flatten(1)  # (N, h w)
    x = F.normalize(patches.flatten(1, 2), dim=-1)
    nearest = (x @ x.mT - 3 * torch.eye(x.shape[1])).argmax(dim=-1)
    return float(on_object.gather(1, nearest)[on_object].float().mean())


def mean_j_and_f(encoder: Encoder, clips: Sequence[Clip]) -> float:
    """Propagate the first mask of each clip, and return J&F, the mean over the objects of all clips, 0 to 1."""
    values = []
    for clip in clips:
        features = frame_patch_features(encoder, clip.frames, tuple(clip.frames.shape[-2:]))
        metrics = j_and_f(torch.stack(list(propagate_stream(features, clip.masks[0]))), clip.masks)
        values += [by_object["J&F"] for by_object in metrics["objects"].values()]
    return statistics.mean(values)


def train_arm(
    command: str,
    seed: int,
    steps: int,
    dataset: ImageDataset,
    init_from: Path | None = None,
    evaluate: Callable[[Encoder, int], Metrics] | None = None,
) -> tuple[RunConfig, Method, dict[int, Metrics]]:
    """Train in memory.

    Args:
        command: arguments of `minissl train`.
        seed: of weights and batches.
        steps: number of training steps.
        dataset: training images.
        init_from: directory of the run to start from; its EMA encoder becomes the Gram teacher. None starts at random.
        evaluate: computes metrics at the steps of `EVALUATE_AT`; None for never.

    Returns:
        The options, the trained method, and the metrics by step.
    """
    run, _ = parse_run([*command.split(), "--device", "cpu", "--seed", str(seed)])
    method, metrics = run.build(), {}
    if init_from is not None:
        init_from_run(init_from, method)
        method.gram_teacher.load_state_dict(method.teacher["encoder"].state_dict())
    steps_done = itertools.count(1)

    def after_step() -> Metrics:
        step = next(steps_done)
        if evaluate and step in {round(steps * fraction) for fraction in EVALUATE_AT}:
            metrics[step] = evaluate(method.encoder, run.crop_size)
            print(command, step, metrics[step], flush=True)
        return {}

    trainer.learn(method, dataset, TrainConfig(**run.train), steps, after_step, eval_every=1)
    return run, method, metrics


def save_run(run: RunConfig, method: Method, output_dir: Path) -> None:
    """Write the state from which another run can start (--init_from), and the encoder."""
    output_dir.mkdir(parents=True, exist_ok=True)
    state = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
    checkpoint.save_tensors(output_dir / "checkpoint.safetensors", state, {})
    save_encoder(method.encoder, output_dir / "encoder.safetensors", run.encoder)


def print_final_metrics(arms: dict[str, dict[str, dict[str, Metrics]]]) -> None:
    """Print mean and standard deviation (divisor n) over seeds of the last metrics of each arm."""
    for arm, by_seed in arms.items():
        final = [list(by_step.values())[-1] for by_step in by_seed.values()]
        for name in final[0]:
            values = [metrics[name] for metrics in final]
            print(f"{arm:10} {name:24} {statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--early", type=int, default=1500, help="steps to the checkpoint from which all arms start")
    parser.add_argument("--further", type=int, default=2000, help="steps from there")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--out", type=Path, default=Path("runs/decay/decay.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"arms": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    evaluator, dataset = PatchEvaluator(options.split), load_dataset("scenes", "train", 64)
    results |= {"early_command": EARLY, "late_command": LATE, "arm_options": ARMS}
    results["steps"] = [options.early, options.further]
    for seed in options.seeds:
        start = options.out.parent / f"early_{seed}"
        if not start.exists():
            run, method, _ = train_arm(EARLY, seed, options.early, dataset)
            results["arms"].setdefault("early", {})[str(seed)] = {"0": evaluator(method.encoder, run.crop_size)}
            save_run(run, method, start)
            checkpoint.write_json(options.out, results)
        for arm in options.arms:
            by_seed = results["arms"].setdefault(arm, {})
            if str(seed) not in by_seed:
                command = f"{LATE} {ARMS[arm]}"
                run, method, by_seed[str(seed)] = train_arm(command, seed, options.further, dataset, start, evaluator)
                save_run(run, method, start.with_name(f"{arm}_{seed}"))
                checkpoint.write_json(options.out, results)
    print_final_metrics(results["arms"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
