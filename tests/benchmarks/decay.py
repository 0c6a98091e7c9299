"""Patches that decay while the image's vector gains, and the anchor that holds them: DINOv3's claim, on a small scale.

From one checkpoint, as many steps of the loss of whole images alone (--ibot 0), without the Gram anchor and with two
weights of it. All is measured on test scenes and clips, as training goes on: what the class token is worth, what each
patch says at four times the resolution that was trained, and how well patches follow objects in video. What is there
is not run again.

    python -m tests.benchmarks.decay [--seeds 0 1 2] [--early 1500] [--further 2000] [--out runs/decay/decay.json]
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl import checkpoint, pretrained, runs, train
from minissl.__main__ import parse_run
from minissl.augment import normalize
from minissl.data import Images, load
from minissl.data.video import Clip, Clips
from minissl.evaluate import at_patches, extract, follow, frame_patches, j_and_f, knn, mean_iou, segment
from minissl.scores import accuracy, pixel_classes

EARLY = "dinov3 --gram 0 --final_lr 1e-6 --final_weight_decay 0.4"  # cooled, as DINOv2's preset ends
FURTHER = "dinov3 --ibot 0 --anchor_at [] --gram_from 0 --gram_rise 0 --warmup 0.02"  # at a constant rate, the preset's
ARMS = {"free": "--gram 0", "anchored": "--gram 10", "tight": "--gram 50"}
MOMENTS = (0.25, 0.5, 1.0)  # of the further steps, at which all is measured


class Ruler:
    """Everything that is measured of an encoder.

    Args:
        split: of the scenes and clips that are asked about.
        size: pixels a side at which patches are asked.
    """

    def __init__(self, split: str = "test", size: int = 128):
        self.train, self.test = load("scenes", "train", 64).some(5000), load("scenes", split, 64)
        self.known, self.asked = load("scenes", "train", size).some(300), load("scenes", split, size).some(300)
        clips = (Clips(split, size, 24, 20)[i] for i in range(20))
        self.clips = [clip for clip in clips if (clip.masks[0] > 0).any()]

    @torch.no_grad()
    def __call__(self, encoder: nn.Module, size: int) -> dict[str, float]:
        """An encoder that was trained at `size` pixels."""
        training = encoder.training
        encoder.eval()
        vectors = (extract(encoder, part.images, size) for part in (self.train, self.test))
        found = dict(zip(("train", "test"), vectors))
        metrics = {"knn": accuracy(knn(found["train"], self.train.labels, found["test"]), self.test.labels)}
        known, asked = (patches(encoder, part.images) for part in (self.known, self.asked))
        truth = pixel_classes(self.asked)
        for question, masks in pixel_classes(self.known).items():
            for way in ("linear", "knn"):
                metrics[f"miou_{question}_{way}"] = mean_iou(segment(known, masks, asked, way), truth[question])
        metrics |= {"purity": purity(asked, self.asked.masks), "J&F": tracked(encoder, self.clips)}
        encoder.train(training)
        return metrics


def patches(encoder: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([encoder(normalize(part)).patches for part in images.split(50)])


def purity(found: Tensor, masks: Tensor) -> float:
    """Of patches that show the object, how often the most similar patch of the same image shows it too."""
    on = (at_patches(masks, found.shape[1:3]) > 0).flatten(1)  # (N, h w)
    x = F.normalize(found.flatten(1, 2), dim=-1)
    nearest = (x @ x.mT - 3 * torch.eye(x.shape[1])).argmax(dim=-1)
    return float(on.gather(1, nearest)[on].float().mean())


def tracked(encoder: nn.Module, clips: list[Clip]) -> float:
    """J&F, the mean over the objects of all clips."""
    scores = []
    for clip in clips:
        frames = frame_patches(encoder, clip.frames, tuple(clip.frames.shape[-2:]))
        found = j_and_f(torch.stack(list(follow(frames, clip.masks[0]))), clip.masks)
        scores += [of["J&F"] for of in found["objects"].values()]
    return statistics.mean(scores)


def learn(
    words: str, seed: int, steps: int, data: Images, start: Path | None = None, look: Callable | None = None
) -> tuple[runs.Run, nn.Module, dict[int, dict[str, float]]]:
    """Train in memory, from another method's end if there is a start, which the anchor becomes; look at the MOMENTS."""
    run, _ = parse_run([*words.split(), "--device", "cpu", "--seed", str(seed)])
    method, seen = run.build(), {}
    if start is not None:
        pretrained.begin_from(start, method)
        method.anchor.load_state_dict(method.teacher["encoder"].state_dict())
    count = itertools.count(1)

    def after_a_step() -> dict[str, float]:
        step = next(count)
        if look and step in {round(steps * moment) for moment in MOMENTS}:
            seen[step] = look(method.encoder, run.size)
            print(words, step, seen[step], flush=True)
        return {}

    train.learn(method, data, train.TrainConfig(**run.loop), steps, after_a_step, every=1)
    return run, method, seen


def keep(run: runs.Run, method: nn.Module, out: Path) -> None:
    """What another run may --start from, and the encoder."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(
        out / "checkpoint.safetensors", {f"method.{k}": t for k, t in method.state_dict().items()}, {}
    )
    pretrained.save(method.encoder, run.encoder, out / "encoder.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--early", type=int, default=1500, help="steps to the checkpoint both begin at")
    parser.add_argument("--further", type=int, default=2000, help="steps from there")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--out", type=Path, default=Path("runs/decay/decay.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"arms": {}}
    ruler, data = Ruler(asked.split), load("scenes", "train", 64)
    about = {"early": EARLY, "further": FURTHER, "words": ARMS, "steps": [asked.early, asked.further]}
    for seed in asked.seeds:
        start = asked.out.parent / f"early_{seed}"
        if not start.exists():
            run, method, _ = learn(EARLY, seed, asked.early, data)
            done["arms"].setdefault("early", {})[str(seed)] = {"0": ruler(method.encoder, run.size)}
            keep(run, method, start)
            checkpoint.write_json(asked.out, done | about)
        for arm in asked.arms:
            here = done["arms"].setdefault(arm, {})
            if str(seed) not in here:
                run, method, here[str(seed)] = learn(f"{FURTHER} {ARMS[arm]}", seed, asked.further, data, start, ruler)
                keep(run, method, start.with_name(f"{arm}_{seed}"))
                checkpoint.write_json(asked.out, done | about)
    for arm, by_seed in done["arms"].items():
        ends = [list(run.values())[-1] for run in by_seed.values()]
        for name in ends[0]:
            values = [end[name] for end in ends]
            print(f"{arm:10} {name:20} {statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
