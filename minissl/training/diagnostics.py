"""Diagnose a run: compare options, log, features and metrics with values that indicate a known problem.

For example, a cross-entropy over N classes that stays at ln N is at chance level: a loss that stays at 5.545 = ln 256
means that 256 prototypes are predicted as equally likely. All functions are pure and know no method by name, only
options and loss terms. How many classes a term distinguishes is `Method.num_candidates`.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

from minissl.methods.base import Method
from minissl.training.config import TrainConfig

MIN_STEPS = 100  # a shorter run only tests the code, so little is checked
WARMUP_FRACTION = 0.3  # of the run, in which the loss is not judged: learning rate and teacher are still warming up
MIN_BATCH = 4  # images; fewer give too few negatives or statistics
NUM_GLOBAL_CROPS = 2  # the term "koleo" is a sum over the global crops

CAUSES = {  # name: what it means, and which option to change
    "batch too small": ("Contrast, batch statistics, Sinkhorn-Knopp and KoLeo need other images in the batch.",
        "Raise --batch_size to 64 or more."),
    "high learning rate": ("It may have been scaled by batch size / 256 twice, or be that of another optimizer.",
        "Lower --lr; it is used as given, without any scaling."),
    "slow teacher": ("The EMA teacher stays near its random initialization, and so do its targets.",
        "Lower --teacher_momentum, or train longer, with --minutes or --epochs."),
    "no EMA": ("The teacher is almost the student of the step before, so its errors become the next targets.",
        "Raise --teacher_momentum to 0.95 or more."),
    "no stop-gradient": ("The loss also changes the targets, and the easiest target to match is one for all images.",
        "Set --stop_gradient true."),
    "soft teacher": ("The teacher's distribution is no sharper than the student's, so both can become uniform.",
        "Lower it, to 0.04; for runs of minutes, to 0.02."),
    "slow centering": ("The center stays near its start, so one prototype can win for all images.",
        "Lower --center_momentum to 0.9, or use --sinkhorn_iterations 3 instead."),
    "too many prototypes": ("Most prototypes are never assigned an image, and the targets are uniform or noise.",
        "Lower --num_prototypes to a hundredth of the number of images seen."),
    "high temperature": ("Cosine similarities are at most 1: divided by so much, all candidates look alike.",
        "Lower --temperature to 0.5 or less."),
    "small crops": ("A crop of a single patch gives attention nothing to compare.",
        "Raise it, or lower --encoder.patch_size."),
    "non-finite loss": ("A step was too large, or a value exceeded the precision; the last checkpoint is from before.",
        "Start again: lower --lr, raise --warmup_fraction, set --clip_grad 3, or use --precision fp32."),
    "chance-level loss": ("All candidates are predicted as equally likely: nothing is learned, or features are equal.",
        "Lower --lr, raise --warmup_fraction; where there is a --temperature, lower it to 0.5 or less."),
    "uniform collapse": ("The teacher assigns every image to all prototypes equally, which is trivial to predict.",
        "Lower --teacher_temp, --lr, --num_prototypes; or set --sinkhorn_iterations 3, --koleo_loss_weight 0.3."),
    "one-hot collapse": ("The teacher assigns all images to one prototype, which is trivial to predict.",
        "Lower --center_momentum, or set --sinkhorn_iterations 3; then raise --teacher_temp, lower --lr."),
    "complete collapse": ("All images have the same class token, and equal features have no useful gradient.",
        "Start again: lower --lr; for a narrow encoder set --encoder.init_std 0.088, --encoder.stem conv."),
    "KoLeo dominates": ("All images are as far apart as possible, similar ones too: KoLeo outweighs the main loss.",
        "Lower --koleo_loss_weight to 0.3 or less."),
    "rising loss": ("The steps are too large and undo what was learned.",
        "Lower --lr, raise --warmup_fraction, or set --clip_grad 3."),
    "degrading features": ("The loss still falls but the features get worse: the task is solved by a shortcut.",
        "Lower --lr, or stop earlier, with --minutes; where there is a teacher, raise --teacher_momentum."),
    "dimensional collapse": ("The features vary along one dimension only, no more than before training.",
        "Lower --lr, raise --batch_size; where there is one, raise --koleo_loss_weight."),
    "dead prototypes": ("No image is assigned to the other prototypes, so the targets carry little information.",
        "Set --sinkhorn_iterations 3, which uses all equally; or lower --center_momentum, or --num_prototypes."),
    "no gain over random init": ("The pretext task does not need what the labels describe, or the run is too short.",
        "Train longer, with --minutes; then check the views: --crop_size and --crop_scale may hide the objects."),
}  # fmt: skip

LogLine = dict[str, float]
Evidence = Iterator[tuple[str, str]]  # name of the cause, and the values that show it


class Finding(NamedTuple):
    """A problem of a run.

    Attributes:
        name: one of `CAUSES`.
        evidence: the values that show it.
        meaning: what the problem is.
        remedy: which option to change.
    """

    name: str
    evidence: str  # with the values
    meaning: str
    remedy: str  # which option to change

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}\n  {self.meaning}\n  {self.remedy}"


def make_findings(evidence: Evidence | list[tuple[str, str]]) -> list[Finding]:
    """Add meaning and remedy, from `CAUSES`, to each pair of a cause's name and its evidence."""
    return [Finding(name, values, *CAUSES[name]) for name, values in evidence]


def check_options(options: dict[str, Any], steps: int, method: Method) -> list[Finding]:
    """Find problems in the options alone.

    Args:
        options: "run" of config.json, with the sections encoder, train and method_options.
        steps: length of the run.
        method: as built from the options; it is not run.
    """
    batch_size, patch_size = options["train"]["batch_size"], method.encoder.patch_size
    options = {**options["encoder"], **options["train"], **options["method_options"]}
    # A number of candidates that grows with the batch means that the other images are the candidates.
    contrastive = method.num_candidates(batch_size) != method.num_candidates(batch_size + 1)
    batch_options = ("koleo_loss_weight", "sinkhorn_iterations", "use_bn_in_head", "center_momentum")
    if batch_size < MIN_BATCH and (contrastive or any(options.get(name) for name in batch_options)):
        return make_findings([("batch too small", f"--batch_size is {batch_size}.")])
    if steps < MIN_STEPS:
        return []
    evidence = [*high_learning_rate(options, method.presets), *teacher_problems(options, steps)]
    if contrastive and options.get("temperature", 0) > 1:
        evidence.append(("high temperature", f"--temperature is {options['temperature']}."))
    for name in ("crop_size", "local_crop_size") if options.get("num_local_crops") else ("crop_size",):
        if options.get(name, math.inf) < 2 * patch_size:
            evidence.append(("small crops", f"--{name} {options[name]} is a single patch of {patch_size} pixels."))
    return make_findings(evidence)


def high_learning_rate(options: dict[str, Any], presets: dict[str, dict[str, Any]]) -> Evidence:
    """Find a learning rate above three times that of the presets, scaled linearly to a larger batch size.

    Args:
        options: of encoder and training, by name.
        presets: `Method.presets`; those of the same optimizer count, and of these, if there are any, those of the same
            encoder.
    """
    known = [asdict(TrainConfig()) | preset for preset in presets.values()]
    known = [preset for preset in known if preset["optimizer"] == options["optimizer"]]
    known = [preset for preset in known if preset.get("encoder.name") == options["name"]] or known
    batch_size, lr = options["batch_size"], options["lr"]
    highest = max((preset["lr"] * max(1, batch_size / preset["batch_size"]) for preset in known), default=lr)
    if lr > 3 * highest:
        yield "high learning rate", f"--lr is {lr:.3g}; for a batch of {batch_size} the preset has {highest:.2g}."


def teacher_problems(options: dict[str, Any], steps: int) -> Evidence:
    """Find options with which an EMA teacher gives no useful targets.

    Args:
        options: of method and training, by name.
        steps: length of the run.
    """
    momentum = options.get("teacher_momentum")
    if momentum is not None:
        random_fraction = math.exp(-(1 - momentum) / 2 * steps)  # 1 - momentum is halved, because it falls to 0
        if random_fraction > 0.1:
            evidence = (
                f"--teacher_momentum {momentum} over {steps} steps leaves {random_fraction:.0%} of the random init"
            )
            yield "slow teacher", f"{evidence}; {1 - 10 / steps:.2g} leaves 1%."
        if momentum < 0.5:
            yield "no EMA", f"--teacher_momentum is {momentum}."
    if not options.get("stop_gradient", True):
        yield "no stop-gradient", "--stop_gradient is false."
    name = max(("warmup_teacher_temp", "teacher_temp"), key=lambda name: options.get(name, 0))
    if options.get(name, 0) >= options.get("student_temp", math.inf):
        yield "soft teacher", f"--{name} is {options[name]}, --student_temp {options['student_temp']}."
    center_momentum = options.get("center_momentum", 0)
    if not options.get("sinkhorn_iterations") and center_momentum**steps > 0.1:
        yield "slow centering", f"--center_momentum is {center_momentum} for {steps} steps, --sinkhorn_iterations is 0."
    images_seen = options["batch_size"] * steps
    if options.get("num_prototypes", 0) > images_seen:
        yield (
            "too many prototypes",
            f"--num_prototypes is {options['num_prototypes']}; the run sees {images_seen} images.",
        )


def past_warmup(lines: list[LogLine], steps: int) -> bool:
    """Return whether a run has done 100 steps and 30 % of its length; before, a loss at chance level is normal."""
    return bool(lines) and lines[-1]["step"] >= max(MIN_STEPS, WARMUP_FRACTION * steps)


def check_log(
    lines: list[LogLine], steps: int, options: dict[str, Any], num_candidates: dict[str, int]
) -> list[Finding]:
    """Find problems in the loss; at most one finding, because the first causes the others.

    Args:
        lines: all lines of log.jsonl so far.
        steps: length of the run.
        options: options of the method, by name.
        num_candidates: number of classes of each loss term, from `Method.num_candidates`.
    """
    losses = [line for line in lines if "loss" in line]  # the other lines are evaluations
    if losses and not math.isfinite(losses[-1]["loss"]):
        last = losses[-1]
        return make_findings([("non-finite loss", f"the loss is {last['loss']} at step {last['step']}, the last one.")])
    if not past_warmup(losses, steps):
        return []
    late = [line for line in losses if line["step"] >= losses[-1]["step"] * 2 / 3]
    return make_findings([*stuck_losses(late, options, num_candidates), *worsening(lines, losses, late)])[:1]


def stuck_losses(late: list[LogLine], options: dict[str, Any], num_candidates: dict[str, int]) -> Evidence:
    """Find loss terms that stay at chance level, targets that are one-hot and equal for all images, and KoLeo problems.

    Args:
        late: lines with a loss, of the last third of the steps so far.
        options: options of the method, by name.
        num_candidates: as for `check_log`.
    """
    for name, candidates in num_candidates.items():
        chance_level, values = math.log(candidates), [line[name] for line in late if name in line]
        if chance_level and values and median(values) >= 0.99 * chance_level:
            cause = "uniform collapse" if name == "teacher_entropy" else "chance-level loss"
            yield cause, f"{name} stays at {median(values):.3f}; ln {candidates} is {chance_level:.3f}."
    weight = options.get("koleo_loss_weight", 0)
    main_loss = [line["loss"] - weight * line.get("koleo", 0) for line in late]
    if "teacher_entropy" in num_candidates:
        # A low entropy alone is a sharp teacher; with a loss near 0 its target is the same for all images.
        max_entropy = math.log(num_candidates["teacher_entropy"])
        entropy = max(line["teacher_entropy"] for line in late)
        if max(main_loss) < 0.05 * max_entropy and entropy < 0.02 * max_entropy:
            evidence = f"the loss without KoLeo stays at {main_loss[-1]:.3f}, teacher_entropy at {entropy:.3f}."
            yield "one-hot collapse", evidence
    koleo = [line["koleo"] / NUM_GLOBAL_CROPS for line in late if "koleo" in line]
    if koleo:
        yield from _koleo_problems(koleo, weight, median(main_loss))


def _koleo_problems(koleo: list[float], weight: float, main_loss: float) -> Evidence:
    """Find KoLeo values of collapsed or over-dispersed features; `koleo` is per crop."""
    if min(koleo) > 8:
        yield "complete collapse", f"koleo stays at {koleo[-1]:.1f} per crop; its maximum is about 17."
    if max(koleo) < -0.475 * math.log(2):  # nearest neighbors are orthogonal
        evidence = f"koleo stays at {koleo[-1]:.2f} per crop; its minimum is -0.35 for all but the smallest batches."
        yield "KoLeo dominates", evidence
    ratio = median(abs(weight * NUM_GLOBAL_CROPS * value) for value in koleo) / max(main_loss, 1e-6)
    if ratio > 2:
        yield "KoLeo dominates", f"--koleo_loss_weight {weight} makes that term {ratio:.1f} times the rest of the loss."


def worsening(lines: list[LogLine], losses: list[LogLine], late: list[LogLine]) -> Evidence:
    """Find a loss that rises by more than 10 %, or a k-NN accuracy that falls by more than 0.05.

    Args:
        lines: all lines of the log.
        losses: those with a loss.
        late: those of them in the last third of the steps so far.
    """
    first, last = (median(line["loss"] for line in part) for part in (losses[: len(losses) // 20 + 1], late))
    if last > first + 0.1 * abs(first) and "teacher_entropy" not in late[-1]:  # a teacher's targets may get harder
        yield "rising loss", f"the loss is {last:.3f}, and was {first:.3f} at the start."
    knn = [line["knn"] for line in lines if "knn" in line]
    if len(knn) > 2 and max(knn) - max(knn[-2:]) > 0.05:
        yield "degrading features", f"k-NN accuracy was {max(knn):.3f} and is {knn[-1]:.3f}."


def check_encoder(
    rank: float, random_rank: float, num_used_prototypes: int | None, num_prototypes: int, num_images: int
) -> list[Finding]:
    """Find problems of features and prototypes of a run past its warmup; at most one finding.

    Args:
        rank: RankMe of the features of some images.
        random_rank: RankMe of the same images with the randomly initialized encoder; as low as 1.3 for a narrow ViT.
        num_used_prototypes: number of prototypes that are the argmax for one of the images; None without prototypes.
        num_prototypes: K; uniform assignment would use K (1 - e^(-images / K)) of them.
        num_images: number of images.
    """
    if rank < 2 and rank < 1.1 * random_rank and rank != random_rank:  # equal: the encoder is not trained
        evidence = f"RankMe is {rank:.2f}, and was {random_rank:.2f} before training."
        return make_findings([("dimensional collapse", evidence)])
    if num_used_prototypes is None:
        return []
    if num_used_prototypes < 0.1 * num_prototypes * (1 - math.exp(-num_images / num_prototypes)):
        evidence = f"{num_images} images are assigned to {num_used_prototypes} of {num_prototypes} prototypes."
        return make_findings([("dead prototypes", evidence)])
    return []


def check_metrics(metrics: dict[str, Any]) -> list[Finding]:
    """Find a k-NN accuracy, in metrics.json of a finished run, that does not exceed the one with random weights."""
    knn, random_knn = metrics.get("knn"), metrics.get("random_knn")
    if knn is None or random_knn is None or knn > random_knn or metrics["rank_me"] == metrics["random_rank_me"]:
        return []
    evidence = f"k-NN accuracy is {knn:.3f}, and {random_knn:.3f} with random weights."
    return make_findings([("no gain over random init", evidence)])
