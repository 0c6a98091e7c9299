"""Recommend a method and its options for a folder of images, each with the reason.

All functions are pure functions of `DatasetStats`. A value is the preset's wherever the images and the machine allow
it. A number in a reason is of the folder or the machine, of this project's measurements (README), or published by
others; the sentence says which. All k-NN accuracies are in percent, on test images, with 20 neighbors.
"""

import math
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from minissl.errors import InputError
from minissl.methods.registry import get_method_class, method_options
from minissl.reports.dataset_stats import DatasetStats
from minissl.training.config import TrainConfig

MIN_IMAGES = 8  # distinct ones; with fewer there is no batch of different images
FEW_IMAGES = 1000  # with fewer the network soon memorizes the images
MIN_TEACHER_MINUTES = 30  # training time from which on DINO was better than SimCLR on a CPU
TEXTURE_THRESHOLD = 0.8  # texture agreement from which on a small crop shows the whole
IMAGES_PER_PROTOTYPE = 32  # 39 in the measured runs
NUM_PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16_384), (500_000, 32_768))  # by images
PRESET_MEMORY = 31.4e9  # bytes that DINO's preset allocated on a GPU
CHECKPOINTED_MEMORY = 5.6e9  # bytes, estimated, with --activation_checkpointing
ALLOCATOR_OVERHEAD = 1.2  # factor


class Recommendation(NamedTuple):
    """One line of the recommendation: an option of `train METHOD` (--NAME), or an expected quantity (NAME)."""

    option: str
    value: Any
    reason: str  # one sentence

    @property
    def text(self) -> str:
        """The value as it is typed on the command line."""
        if isinstance(self.value, tuple):
            return "[" + ",".join(f"{x:g}" for x in self.value) + "]"
        return f"{self.value:g}" if isinstance(self.value, float) else str(self.value)


def recommend(stats: DatasetStats) -> list[Recommendation]:
    """Recommend what to train, with reasons; the method comes first.

    Raises:
        InputError: if there are too few distinct images, an image is too small, or `stats.method` is not supported.
    """
    check_stats(stats)
    method, minutes = choose_method(stats), choose_minutes(stats)
    preset = preset_options(method.value, stats)
    sizes = list(choose_sizes(stats, preset))
    batch = choose_batch(stats, preset)
    steps = round(60 * minutes.value * stats.images_per_second / batch.value)
    lines = [method, choose_preset(stats), *sizes, choose_crops(stats, preset)]
    if "num_prototypes" in preset:
        lines += [choose_prototypes(stats), choose_momentum(preset["teacher_momentum"], steps)]
    else:
        lines.append(without_teacher(stats))
    reason = "The features are evaluated eight times, but not more often than every 0.2 minutes."
    eval_minutes = Recommendation("--eval_minutes", max(0.2, round(minutes.value / 8, 1)), reason)
    lines += [batch, *choose_memory_savings(stats, preset, batch.value), minutes, eval_minutes]
    if stats.images_per_second:
        lines += expected_cost(stats, steps, batch.value, image_size=sizes[0].value)
    return lines


def check_stats(stats: DatasetStats) -> None:
    """Raise InputError for what no option can correct."""
    supported = ("dino",) if stats.on_cuda else ("simclr", "dino")
    if stats.method not in ("", *supported):
        raise InputError(
            f"There is no recommendation for --method {stats.method} on {stats.device}; choose "
            f"{' or '.join(supported)}, or train it with its preset: minissl train {stats.method}"
        )
    if stats.num_distinct < MIN_IMAGES:
        raise InputError(
            f"The folder has {stats.num_train} training images, about {stats.num_distinct} of them distinct; "
            f"at least {MIN_IMAGES} are needed, and some hundreds are recommended."
        )
    if stats.min_side < 16:
        raise InputError(
            f"The smallest image is {stats.min_side} pixels on its short side; remove images smaller than 16 pixels."
        )


def preset_options(method: str, stats: DatasetStats) -> dict[str, Any]:
    """Return all options of a method's training by name, as its preset for the machine sets them."""
    method_class = get_method_class(method)
    defaults = vars(TrainConfig()) | {name: option.default for name, option in method_options(method_class).items()}
    preset = method_class.presets["gpu" if stats.on_cuda else "cpu"]
    return defaults | {"encoder.patch_size": 16, "image_size": 256} | preset


def choose_method(stats: DatasetStats) -> Recommendation:
    """Choose SimCLR or DINO by the device, the number of images and the time."""
    if stats.method:
        return Recommendation("method", stats.method, "You chose this method.")
    if stats.on_cuda:
        reason = "stable-pretraining reports k-NN 83.8 for DINO and 73.3 for SimCLR (Imagenette, ViT-S/16, 200 epochs)."
        return Recommendation("method", "dino", reason)
    if stats.num_train < FEW_IMAGES:
        reason = "on 300 scenes SimCLR reached k-NN 39.3 ± 2.4 in 2.5 minutes (random init: 17.0)"
        return Recommendation("method", "simclr", f"{stats.num_train:,} images are few: {reason}.")
    if stats.minutes >= MIN_TEACHER_MINUTES:
        reason = (
            "An EMA teacher needs time: DINO reached k-NN 70.9 ± 13.2 on scenes after 5 minutes, and 89.6 after 30."
        )
        return Recommendation("method", "dino", reason)
    scenes = "k-NN on scenes was 76.5 ± 4.6 with SimCLR and 70.9 ± 13.2 with DINO after 5 minutes"
    reason = f"{scenes}, on photographs 61.2 and 57.3 after 20."
    return Recommendation("method", "simclr", f"Below {MIN_TEACHER_MINUTES} minutes SimCLR is more reliable: {reason}")


def choose_preset(stats: DatasetStats) -> Recommendation:
    """Choose the preset by the device."""
    if stats.on_cuda:
        reason = f"A GPU with {gb(stats.free_memory)} free: the paper's network, measured for single steps only."
        return Recommendation("--preset", "gpu", reason)
    reason = (
        f"There is no CUDA GPU; this preset's network of one block trains in minutes on {stats.num_cores} CPU cores."
    )
    return Recommendation("--preset", "cpu", reason)


def choose_minutes(stats: DatasetStats) -> Recommendation:
    """Choose the training time: the user's, 200 epochs on a GPU, or 3 or 15 minutes on a CPU."""
    if stats.minutes:
        return Recommendation("--minutes", float(stats.minutes), "You chose this time.")
    if stats.on_cuda:
        speed = stats.images_per_second
        minutes = 200 * stats.num_train / speed / 60 if speed else 60
        reason = f"200 epochs, as in published trainings, take {minutes:,.0f} minutes; recommended are 10 to 720."
        return Recommendation("--minutes", float(min(max(round(minutes), 10), 720)), reason)
    if stats.num_train < FEW_IMAGES:
        reason = f"{stats.num_train:,} images are few: 300 scenes were measured with 2.5 minutes."
        return Recommendation("--minutes", 3.0, reason)
    reason = "SimCLR reached k-NN 76.5 ± 4.6 on scenes after 5 minutes, and 61.2 on photographs after 20."
    return Recommendation("--minutes", 15.0, reason)


def choose_sizes(stats: DatasetStats, preset: dict[str, Any]) -> Iterator[Recommendation]:
    """Choose sizes in pixels: the images', the crops', and if the images are small the patches' and local crops'."""
    preset_crop, preset_patch = preset["crop_size"], preset["encoder.patch_size"]
    image_size = min(preset["image_size"], stats.median_side)
    reason = (
        f"Half of the images have {stats.median_side} pixels or fewer on the short side; more would be interpolated."
    )
    if image_size < stats.median_side:
        reason = (
            f"The preset's size, from which crops of {preset_crop} are resampled; the median is {stats.median_side}."
        )
    yield Recommendation("--image_size", image_size, reason)
    largest_crop, patch = min(image_size, stats.min_side, preset_crop), preset_patch
    while largest_crop // patch < 3 and patch > 4:
        patch //= 2
    crop = largest_crop // patch * patch
    grid = crop // patch
    reason = f"The preset's size, a grid of {grid} x {grid} patches; the smallest image has {stats.min_side} pixels."
    if crop < preset_crop:
        reason = f"The preset's {preset_crop} are too many: the smallest image has {stats.min_side} pixels, and "
        reason += f"{image_size} are kept."
    yield Recommendation("--crop_size", crop, reason)
    if patch < preset_patch:
        grid = largest_crop // preset_patch
        reason = f"Patches of {preset_patch} pixels would form a grid of {grid} x {grid}, too few tokens for attention."
        yield Recommendation("--encoder.patch_size", patch, reason)
    if preset.get("num_local_crops") and crop < preset_crop:
        preset_local = preset["local_crop_size"]
        local_crop = max(2, round(preset_local / preset_crop * crop / patch)) * patch
        reason = f"In proportion to the preset, {preset_local} pixels for global crops of {preset_crop}."
        yield Recommendation("--local_crop_size", local_crop, reason)


def choose_crops(stats: DatasetStats, preset: dict[str, Any]) -> Recommendation:
    """Choose the range of the crops' area, as a fraction of the image's."""
    agreement = f"the quarters of an image agree by {stats.texture_agreement:.2f} (1: a texture)"
    if "crop_scale" in preset:
        reason = f"The preset's range for crops of {preset['crop_size']} pixels, where the paper's begins at 0.08"
        return Recommendation("--crop_scale", preset["crop_scale"], f"{reason}; {agreement}.")
    if stats.on_cuda or stats.texture_agreement >= TEXTURE_THRESHOLD:
        reason = f"The paper's range, crops of at least 0.4 of the area; {agreement}."
        return Recommendation("--global_crops_scale", (0.4, 1.0), reason)
    reason = "On scenes k-NN was 61.5 with crops of at least half of the area, and 40.1 with a quarter"
    return Recommendation("--global_crops_scale", preset["global_crops_scale"], f"{reason}; {agreement}.")


def choose_prototypes(stats: DatasetStats) -> Recommendation:
    """Choose the number of prototypes by the number of images."""
    if stats.on_cuda:
        count = next((count for limit, count in NUM_PROTOTYPES if stats.num_train <= limit), 65_536)
        reason = f"The library lightly-train uses this number for {stats.num_train:,} images."
        return Recommendation("--num_prototypes", count, reason)
    count = 64
    while count < 256 and stats.num_train >= 2 * count * IMAGES_PER_PROTOTYPE:
        count *= 2
    reason = f"{stats.num_train:,} images are {stats.num_train / count:.0f} per prototype"
    measured = "on 10,000 scenes k-NN was 61.5 with 256 prototypes (39 images each) and 54.7 with 64"
    return Recommendation("--num_prototypes", count, f"{reason}; {measured}.")


def without_teacher(stats: DatasetStats) -> Recommendation:
    """Describe what a teacher would need, for a method that has none."""
    count, momentum = choose_prototypes(stats).value, preset_options("dino", stats)["teacher_momentum"]
    reason = f"SimCLR has no EMA teacher; --method dino would use {count} prototypes and a momentum of {momentum:g}."
    return Recommendation("teacher", "none", reason)


def choose_momentum(preset: float, steps: int) -> Recommendation:
    """Choose the momentum m of the EMA teacher, lower than the preset's for short runs.

    The momentum rises to 1 along a cosine, so that exp(-n (1 - m) / 2) of the random initialization is left after n
    steps.
    """
    momentum = round(max(0.5, min(preset, 1 - 10 / steps)), 3) if steps else preset
    left, preset_left = (math.exp(-(1 - m) / 2 * steps) for m in (momentum, preset))
    reason = f"after {steps:,} steps {left:.2%} of the teacher's random initialization is left"
    if momentum == preset:
        return Recommendation("--teacher_momentum", momentum, f"The preset's value, with which {reason}.")
    reason = f"With it, {reason}; the preset's {preset:g} would leave {preset_left:.2%}."
    return Recommendation("--teacher_momentum", momentum, reason)


def choose_batch(stats: DatasetStats, preset: dict[str, Any]) -> Recommendation:
    """Choose the batch size by the number of images and the memory."""
    batch = preset["batch_size"]
    if stats.num_train < batch:
        reason = f"The preset's {batch} are more than the {stats.num_train} training images."
        return Recommendation("--batch_size", 2 ** int(math.log2(stats.num_train)), reason)
    if stats.on_cuda:
        count = batch
        while count > 32 and ALLOCATOR_OVERHEAD * CHECKPOINTED_MEMORY * count / batch > stats.free_memory:
            count //= 2
        reason = f"The preset's {batch} needed {gb(PRESET_MEMORY)} at 224 pixels, or an estimated "
        reason += f"{gb(CHECKPOINTED_MEMORY)} with activation checkpointing; {gb(stats.free_memory)} are free."
        return Recommendation("--batch_size", count, reason)
    reason = f"Each view has {2 * batch - 2} negatives, as in the runs measured on 300 to 50,000 images."
    if "num_prototypes" in preset:
        reason = (
            "On scenes k-NN was 54.5, 48.8 and 40.0 in three runs with 64, 38.0 and 45.5 with 128, and 28.9 with 32."
        )
    return Recommendation("--batch_size", batch, reason)


def choose_memory_savings(stats: DatasetStats, preset: dict[str, Any], batch: int) -> Iterator[Recommendation]:
    """Choose activation checkpointing, and the learning rate of a smaller batch, for a GPU with too little memory."""
    memory = ALLOCATOR_OVERHEAD * PRESET_MEMORY * batch / preset["batch_size"]
    if stats.on_cuda and memory > stats.free_memory:
        reason = f"Without it about {gb(memory)} are needed; {gb(stats.free_memory)} are free."
        yield Recommendation("--activation_checkpointing", "true", reason)
    if stats.on_cuda and batch != preset["batch_size"]:
        lr = preset["lr"]
        reason = f"The paper's linear scaling rule: {lr:g} for a batch of {preset['batch_size']}."
        yield Recommendation("--lr", lr * batch / preset["batch_size"], reason)


def expected_cost(stats: DatasetStats, steps: int, batch: int, image_size: int) -> Iterator[Recommendation]:
    """Estimate steps and memory of the run from the measured speed."""
    num_seen, speed = steps * batch, stats.images_per_second
    reason = f"{num_seen:,} images at the measured {speed:,.0f} a second are {num_seen / stats.num_train:,.1f} epochs"
    yield Recommendation("steps", f"{steps:,}", f"{reason} of {stats.num_train:,} images.")
    image_bytes = (stats.num_train + stats.num_test) * 3 * image_size**2
    reason = f"{gb(image_bytes)} of images and {gb(stats.peak_memory)} measured while training"
    yield Recommendation("memory", gb(image_bytes + stats.peak_memory), f"{reason}; {gb(stats.free_memory)} are free.")


def gb(size: float) -> str:
    """Format bytes as GB, or MB below 0.1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def warnings_for(stats: DatasetStats) -> list[str]:
    """Return one sentence for each problem of the images that no option corrects."""
    crop = preset_options(choose_method(stats).value, stats)["crop_size"]
    minutes = choose_minutes(stats).value
    epochs = 60 * minutes * stats.images_per_second / stats.num_train
    warnings = (
        (
            stats.num_train < FEW_IMAGES,
            f"{stats.num_train:,} images are few: also try pretrained weights, with --encoder.weights FILE.",
        ),
        (
            0 < epochs < 5,
            f"{epochs:.1f} epochs are few: 100, with which DINO reached k-NN 89.6 on scenes, would take "
            f"{100 * minutes / max(epochs, 1e-9):,.0f} minutes, or fewer if another process is running now.",
        ),
        (
            stats.nearest_similarity > 0.9,
            "Half of the images have a thumbnail like another image's (cosine "
            f"{stats.nearest_similarity:.2f} or more): a crop of {crop} pixels may not show the small differences.",
        ),
        (
            stats.min_side < min(crop, stats.p5_side),
            f"95% of the images have {stats.p5_side} pixels or more on the short side: without the smaller ones (down "
            f"to {stats.min_side}) crops could be larger.",
        ),
    )
    return [sentence for holds, sentence in warnings if holds] + _file_warnings(stats)


def _file_warnings(stats: DatasetStats) -> list[str]:
    """Return the warnings that do not depend on the recommended options."""
    warnings = (
        (stats.num_unreadable > 0, f"{stats.num_unreadable} files cannot be read as images and are left out."),
        (
            stats.duplicate_fraction > 0.05,
            f"{stats.duplicate_fraction:.0%} of the images are near-duplicates of another: keep one of each, because "
            "duplicates raise the k-NN accuracy.",
        ),
        (
            stats.gray_fraction > 0.9,
            f"{stats.gray_fraction:.0%} of the images are gray: color augmentation, half of the usual augmentation, "
            "has no effect on them.",
        ),
        (
            stats.aspect_ratio > 1.8,
            f"Half of the images are at least {stats.aspect_ratio:.1f} times as long as wide, and only the center "
            f"square, {1 / stats.aspect_ratio:.0%} of the area, is kept: cut them into squares first.",
        ),
    )
    return [sentence for holds, sentence in warnings if holds]


def command(stats: DatasetStats, out: str) -> list[str]:
    """Return the arguments of `minissl` that carry out the recommendation."""
    method, *lines = recommend(stats)
    options = [arg for line in lines if line.option.startswith("--") for arg in (line.option, line.text)]
    return ["train", method.value, "--data", stats.data, *options, "--device", stats.device, "--out", out]


def table(stats: DatasetStats, width: int = 100) -> str:
    """Format the recommendation as three columns, with the warnings below; `width` in characters."""
    lines = []
    for line in recommend(stats):
        prefix = f"{line.option:28}{line.text:12}"
        lines += textwrap.wrap(line.reason, width, initial_indent=prefix, subsequent_indent=" " * len(prefix))
    return "\n".join([*lines, *(f"Warning: {sentence}" for sentence in warnings_for(stats))])
