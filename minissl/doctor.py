"""The loss doctor: knows the numbers at which a loss gets stuck, what they mean, and which option to turn.

A loss that guesses among N answers is ln N: one that stays at 5.545 has 256 prototypes that all look alike. All here
is pure: from the options, the log and a few measures of the encoder to findings. No method is known by its name, only
options and terms are; among how many answers a term guesses, the method says (`guesses` in `method.Method`).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

from torch import nn

from minissl.train import TrainConfig

LEAST = 100  # steps; a shorter run is a trial of the code, of which little is asked
EARLY = 0.3  # share of the run in which a loss may be anywhere: the rate, the teacher and its temperature warm up
CROWD = 4  # images; fewer are no company
CROPS = 2  # the term "koleo" is a sum over so many crops

CAUSES = {  # name: what it means, and which option to turn
    "lone batch": ("There is nothing to compare an image with: contrast is 0, Sinkhorn-Knopp even, KoLeo without end.",
        "Turn up --batch_size, to 64 or more."),
    "high rate": ("Perhaps it was scaled by batch size / 256 twice, by a rule and by hand; or another optimiser's.",
        "Turn down --lr; it is used as it is, nothing scales it here."),
    "slow teacher": ("The student learns what a random network says, and the teacher is what is kept.",
        "Turn down --momentum, or train longer, with --minutes or --epochs."),
    "no average": ("The teacher is last step's student; its errors come back as targets, and soon nothing else does.",
        "Turn up --momentum, to 0.95 or more."),
    "moving target": ("The loss moves the targets too, and the easiest target to match is one for all images.",
        "Turn --stop_gradient on."),
    "blunt teacher": ("The teacher's answers are no sharper than the student's; nothing stops both from becoming even.",
        "Turn it down, to 0.04; where minutes must do, to 0.02."),
    "slow centre": ("The centre stays where it began; nothing else keeps one prototype from winning for all images.",
        "Turn down --center_momentum, to 0.9, or put --sinkhorn 3 in its place."),
    "many prototypes": ("Most prototypes never get an image of their own; the targets are even, or noise.",
        "Turn down --prototypes, to a hundredth of the images seen."),
    "warm contrast": ("Cosines end at 1: divided by so much, right and wrong look alike, and the loss stays at chance.",
        "Turn down --temperature, to 0.5 or less."),
    "small crops": ("One patch has no neighbours: attention has nothing to do, and there is little to recognise.",
        "Turn it up, or turn down --encoder.patch_size."),
    "not finite": ("A step was too long, or a number too large for the precision; the last checkpoint is from before.",
        "Start again: turn down --lr, turn up --warmup, set --clip 3, or give --precision fp32."),
    "guessing": ("All answers look equally right: nothing is learnt, or all images have become one vector.",
        "Turn down --lr, turn up --warmup; where there is a --temperature, turn it down, to 0.5 or less."),
    "uniform": ("Uniform collapse: the teacher gives every image all prototypes alike; nothing is left to match.",
        "Turn down --teacher_temperature and --lr; or give --sinkhorn 3, --koleo 0.3, fewer --prototypes."),
    "one-hot": ("One-hot collapse: one prototype wins for all images, and it is easy to agree on that.",
        "Turn down --center_momentum, or give --sinkhorn 3; then turn up --teacher_temperature, turn down --lr."),
    "one vector": ("The class tokens of different images are equal, and equal vectors have no useful gradient.",
        "Start again: turn down --lr; for a narrow encoder give --encoder.init_std 0.088, --encoder.stem conv."),
    "spread only": ("Images are as far apart as they can be, whether alike or not: KoLeo outweighs the views.",
        "Turn down --koleo, to 0.3 or less."),
    "rising": ("The steps are too long: they undo more than they learn.",
        "Turn down --lr, turn up --warmup, or set --clip 3."),
    "forgetting": ("The loss goes on, the features get worse: the task is solved without what the images show.",
        "Turn down --lr, or stop earlier, with --minutes; where there is a teacher, turn up --momentum."),
    "one dimension": ("All images are nearly the same to the encoder, as before training or worse.",
        "Turn down --lr, turn up --batch_size; where there is one, turn up --koleo."),
    "dead prototypes": ("No image moves the others, and the targets say less than their number promises.",
        "Give --sinkhorn 3, which uses all alike; or turn down --center_momentum, or --prototypes."),
    "nothing learnt": ("What the loss asks for is not what the labels are about, or training was too short to tell.",
        "Train longer, with --minutes; then look at the views: --size and --scale may not show what is asked."),
}  # fmt: skip

Line = dict[str, float]
Seen = Iterator[tuple[str, str]]  # a cause's name, and the numbers that say so


class Finding(NamedTuple):
    """What is wrong."""

    name: str
    seen: str  # with the numbers
    means: str
    turn: str  # which option, by its name

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}\n  {self.means}\n  {self.turn}"


def findings(seen: Seen) -> list[Finding]:
    return [Finding(name, numbers, *CAUSES[name]) for name, numbers in seen]


def guesses(method: nn.Module, batch_size: int) -> dict[str, int]:
    """Among how many answers each term chooses; empty for a method that does not say."""
    return method.guesses(batch_size) if hasattr(method, "guesses") else {}


def on_options(asked: dict[str, Any], steps: int, method: nn.Module) -> list[Finding]:
    """What cannot go well, by the options alone.

    Args:
        asked: "run" of config.json: `options` of the method, of the `loop`, of the `encoder`.
        steps: length of the run.
        method: as it was built; nothing of it is run.
    """
    patch = getattr(method.encoder, "patch_size", 0)
    asked, size = {**asked["encoder"], **asked["loop"], **asked["options"]}, asked["loop"]["batch_size"]
    contrast = guesses(method, size) != guesses(method, size + 1)  # the answers are the others of the batch
    crowded = contrast or any(asked.get(name) for name in ("koleo", "sinkhorn", "batch_norm", "center_momentum"))
    if size < CROWD and crowded:
        return findings([("lone batch", f"--batch_size is {size}.")])
    if steps < LEAST:
        return []
    found = [*high_rate(asked, method.presets), *no_targets(asked, steps)]
    if contrast and asked.get("temperature", 0) > 1:
        found.append(("warm contrast", f"--temperature is {asked['temperature']}."))
    for name in ("size", "local_size") if asked.get("local_crops") else ("size",):
        if asked[name] < 2 * patch:
            found.append(("small crops", f"--{name} {asked[name]} is a single patch of {patch} pixels."))
    return findings(found)


def high_rate(asked: dict[str, Any], presets: dict[str, dict[str, Any]]) -> Seen:
    """Compares with the preset of the same optimiser and, if there is one, encoder, scaled once to this batch."""
    known = [asdict(TrainConfig()) | preset for preset in presets.values()]
    known = [preset for preset in known if preset["optimizer"] == asked["optimizer"]]
    known = [preset for preset in known if preset.get("encoder.name") == asked["name"]] or known
    size, lr = asked["batch_size"], asked["lr"]
    most = max((preset["lr"] * max(1, size / preset["batch_size"]) for preset in known), default=lr)
    if lr > 3 * most:
        yield "high rate", f"--lr is {lr:.3g}; for a batch of {size} it is {most:.2g} in the preset."


def no_targets(asked: dict[str, Any], steps: int) -> Seen:
    """Teachers with nothing to teach."""
    left = math.exp(-(1 - asked.get("momentum", 0)) / 2 * steps)  # a momentum that climbs to 1 is half as fast
    if left > 0.1:
        said = f"--momentum {asked['momentum']} over {steps} steps leaves {left:.0%} of the random start"
        yield "slow teacher", f"{said}; {1 - 10 / steps:.2g} leaves 1%."
    if asked.get("momentum", 1) < 0.5:
        yield "no average", f"--momentum is {asked['momentum']}."
    if not asked.get("stop_gradient", True):
        yield "moving target", "--stop_gradient is off."
    name = max(("warmup_temperature", "teacher_temperature"), key=lambda name: asked.get(name, 0))
    if asked.get(name, 0) >= asked.get("student_temperature", math.inf):
        yield "blunt teacher", f"--{name} is {asked[name]}, --student_temperature {asked['student_temperature']}."
    if not asked.get("sinkhorn") and asked.get("center_momentum", 0) ** steps > 0.1:
        yield "slow centre", f"--center_momentum is {asked['center_momentum']}, for {steps} steps, and --sinkhorn 0."
    seen = asked["batch_size"] * steps
    if asked.get("prototypes", 0) > seen:
        yield "many prototypes", f"--prototypes is {asked['prototypes']}; {seen} images are seen in the whole run."


def ripe(lines: list[Line], steps: int) -> bool:
    """Whether a run is past its beginning, in which a loss at chance is as it should be."""
    return bool(lines) and lines[-1]["step"] >= max(LEAST, EARLY * steps)


def on_log(lines: list[Line], steps: int, options: dict[str, Any], among: dict[str, int]) -> list[Finding]:
    """What the loss says, at most one thing: of several the first is the cause.

    Args:
        lines: of log.jsonl, so far.
        steps: length of the run.
        options: of the method.
        among: how many answers each term chooses from, as `guesses` says.
    """
    told = [line for line in lines if "loss" in line]  # the others hold what was watched
    if told and not math.isfinite(told[-1]["loss"]):
        last = told[-1]
        return findings([("not finite", f"the loss is {last['loss']} at step {last['step']}, where the run stopped.")])
    if not ripe(told, steps):
        return []
    late = [line for line in told if line["step"] >= told[-1]["step"] * 2 / 3]
    return findings([*stuck(late, options, among), *worse(lines, told, late)])[:1]


def stuck(late: list[Line], options: dict[str, Any], among: dict[str, int]) -> Seen:
    """Numbers at which a loss stays."""
    for name, answers in among.items():
        level, values = math.log(answers), [line[name] for line in late if name in line]
        if level and values and median(values) >= 0.99 * level:
            cause = "uniform" if name == "teacher_entropy" else "guessing"
            yield cause, f"{name} stays at {median(values):.3f}; ln {answers} is {level:.3f}."
    weight = options.get("koleo", 0)
    bare = [line["loss"] - weight * line.get("koleo", 0) for line in late]
    if "teacher_entropy" in among:  # near 0 alone is only sharp; but a student that always knows it is told one thing
        level = math.log(among["teacher_entropy"])
        entropy = max(line["teacher_entropy"] for line in late)
        if max(bare) < 0.05 * level and entropy < 0.02 * level:
            yield "one-hot", f"the loss stays at {bare[-1]:.3f} (without KoLeo), teacher_entropy at {entropy:.3f}."
    crops = [line["koleo"] / CROPS for line in late if "koleo" in line]
    if crops and min(crops) > 8:
        yield "one vector", f"koleo stays at {crops[-1]:.1f} a crop; its ceiling is about 17."
    if crops and max(crops) < -0.475 * math.log(2):  # at right angles each with its nearest
        yield (
            "spread only",
            f"koleo stays at {crops[-1]:.2f} a crop; its floor is -0.35 for all but the smallest batches.",
        )
    ratio = median(abs(weight * CROPS * crop) for crop in crops) / max(median(bare), 1e-6) if crops else 0
    if ratio > 2:
        yield "spread only", f"--koleo {weight} makes that term {ratio:.1f} times as large as the rest of the loss."


def worse(lines: list[Line], told: list[Line], late: list[Line]) -> Seen:
    """Numbers that go the wrong way."""
    first, last = (median(line["loss"] for line in part) for part in (told[: len(told) // 20 + 1], late))
    if last > first + 0.1 * abs(first) and "teacher_entropy" not in late[-1]:  # to follow a teacher may get harder
        yield "rising", f"the loss is {last:.3f}, and began at {first:.3f}."
    scores = [line["knn"] for line in lines if "knn" in line]
    if len(scores) > 2 and max(scores) - max(scores[-2:]) > 0.05:
        yield "forgetting", f"k-NN was {max(scores):.3f} and is {scores[-1]:.3f}."


def on_encoder(rank: float, before: float, used: int | None, prototypes: int, images: int) -> list[Finding]:
    """What features and prototypes say, once the run is past its beginning; at most one thing.

    Args:
        rank: RankMe of the features of some images.
        before: the same of the untrained encoder; as low as 1.3 for a narrow ViT.
        used: how many prototypes are the nearest of one of the images; None for a method without.
        prototypes: K; even use would find K (1 - e^(-images / K)) of them.
        images: how many.
    """
    if rank < 2 and rank < 1.1 * before and rank != before:  # equal: an encoder that is not trained
        return findings([("one dimension", f"RankMe is {rank:.2f}, and was {before:.2f} before training.")])
    if used is not None and used < 0.1 * prototypes * (1 - math.exp(-images / prototypes)):
        return findings([("dead prototypes", f"{images} images take {used} of {prototypes} prototypes.")])
    return []


def on_metrics(metrics: dict[str, Any]) -> list[Finding]:
    """What metrics.json says of a finished run."""
    knn, before = metrics.get("knn"), metrics.get("random_knn")
    if knn is None or before is None or knn > before or metrics["rank_me"] == metrics["random_rank_me"]:
        return []
    return findings([("nothing learnt", f"k-NN is {knn:.3f}, and {before:.3f} by the untrained encoder.")])
