"""Measure accuracy with few labels: linear probing, fine-tuning, and training from scratch.

Kornblith et al., Do Better ImageNet Models Transfer Better?, 2018 (arXiv:1805.08974), compares the same three.

Shapes: N training and M test images, C classes, L label counts.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minissl.data.images import Images, InMemoryDataset
from minissl.errors import InputError
from minissl.evaluation import extract_features, linear_probe, sample_per_class
from minissl.hub import pretrained
from minissl.methods.transfer import Transfer
from minissl.models.outputs import Encoder
from minissl.reports.compare import check_figure_path, write_figure
from minissl.training.config import TrainConfig
from minissl.training.device import choose_device
from minissl.training.run import RunConfig, random_init_encoder, read_run
from minissl.training.trainer import learn
from minissl.visualization import lines_figure

LABELS_PER_CLASS = (1, 5, 10, 50, 100, 500)
MAX_STREAMED, NUM_TEST = 20_000, 1000  # images: training images of a set that does not fit into memory; test images


def fine_tune(
    encoder: Encoder,
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    image_size: int,
    *,
    steps: int = 150,
    lr: float = 1e-3,
    layer_decay: float = 0.7,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Train a copy of an encoder together with a linear classifier, then classify the test images.

    The training is `trainer.learn` with the method `Transfer`: AdamW with weight decay 0.05 on matrices, linear warm-up
    over a tenth of the steps, cosine to 0, no gradient clipping, float32, random crops of 0.5 to 1 of the area and
    horizontal flips. A batch is sampled without replacement within an epoch, and vectors have no weight decay.

    Args:
        encoder: maps normalized images to Tokens; it is not changed.
        images: (N, 3, H, W) uint8, for training.
        labels: (N,) int64.
        test_images: (M, 3, H, W) uint8.
        image_size: pixels a side that the encoder sees.
        steps: optimizer steps.
        lr: peak learning rate.
        layer_decay: factor on the encoder's learning rate from each block to the one before.
        batch_size: images a step; N if that is less.
        seed: of the classifier's weights, the order of the images and the crops. The global generator is changed.

    Returns:
        (M,) int64 predicted labels.
    """
    torch.manual_seed(seed)
    num_classes = int(labels.max()) + 1
    method = Transfer(
        copy.deepcopy(encoder).requires_grad_(True),
        crop_size=image_size,
        crop_scale=(0.5, 1.0),
        num_classes=num_classes,
        layer_decay=layer_decay,
    ).to(images.device)
    config = TrainConfig(
        batch_size=min(batch_size, len(images)),
        lr=lr,
        final_lr=0.0,
        warmup_fraction=0.1,
        weight_decay=0.05,
        final_weight_decay=0.05,
        clip_grad=0.0,
        precision="fp32",
        seed=seed,
    )
    classes = tuple(str(index) for index in range(num_classes))
    learn(method, Images(images, labels, classes), config, steps)
    with torch.no_grad():
        logits: Tensor = method.heads["labels"](extract_features(method.encoder, test_images, image_size))  # (M, C)
    return logits.argmax(dim=-1)


def few_label_accuracy(
    encoder: Encoder,
    random_encoder: Encoder,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    image_size: int,
    labels_per_class: Sequence[int] = LABELS_PER_CLASS,
    num_seeds: int = 3,
    first_seed: int = 0,
) -> dict[str, Tensor]:
    """Measure the test accuracy of three ways to use few labels, for several label counts and seeds.

    Args:
        encoder: the pretrained encoder.
        random_encoder: the same architecture, randomly initialized, for training from scratch.
        train: images (N, 3, H, W) uint8 and labels (N,), of which the few are sampled.
        test: images (M, 3, H, W) uint8 and labels (M,).
        image_size: pixels a side that the encoders see.
        labels_per_class: label counts to compare.
        num_seeds: samples of the labels for each count, each with its own initialization of the classifier.
        first_seed: the seed of the first.

    Returns:
        "frozen" (linear probe), "fine-tuned" and "from scratch", each (L, num_seeds) accuracies in [0, 1].
    """
    (images, labels), (test_images, test_labels) = train, test
    features = extract_features(encoder, images, image_size)
    test_features = extract_features(encoder, test_images, image_size)
    accuracy = {
        name: torch.zeros(len(labels_per_class), num_seeds) for name in ("frozen", "fine-tuned", "from scratch")
    }
    for i, count in enumerate(labels_per_class):
        for j, seed in enumerate(range(first_seed, first_seed + num_seeds)):
            indices = sample_per_class(labels, count, seed).to(images.device)
            few = images[indices], labels[indices], test_images, image_size
            predictions = {
                "frozen": linear_probe(features[indices], labels[indices], test_features, inverse_regularization=0.1),
                "fine-tuned": fine_tune(encoder, *few, seed=seed),
                "from scratch": fine_tune(random_encoder, *few, layer_decay=1.0, seed=seed),
            }
            for name, predicted in predictions.items():
                accuracy[name][i, j] = (predicted == test_labels).float().mean()
    return accuracy


def few_shot_report(run_dirs: list[Path], data: str, out: Path, num_seeds: int = 3) -> dict[str, Tensor]:
    """Measure a run's accuracy with few labels of another task; write a figure and a JSON file, print a table.

    Args:
        run_dirs: runs that differ in their seed; mean and standard deviation are over all their label samples.
        data: name of the data set of the other task.
        out: the figure, PNG, SVG or PDF; a JSON file of the same name is written beside it.
        num_seeds: samples of the labels for each run.

    Returns:
        "frozen", "fine-tuned" and "from scratch", each (L, runs * num_seeds) accuracies in percent.

    Raises:
        InputError: for a folder without a run, a data set without labels, or a figure that cannot be written.
    """
    tables, runs = [], [read_run(run_dir)[0] for run_dir in run_dirs]
    check_figure_path(out)
    for i, (run_dir, run) in enumerate(zip(run_dirs, runs)):
        tables.append(_measure_run(run_dir, replace(run, data=data), num_seeds, first_seed=i * num_seeds))
    accuracy = {name: 100 * torch.cat([table[name] for table in tables], dim=1).cpu() for name in tables[0]}
    title = f"Pretrained on {runs[-1].data}, tested on {data}"
    figure = lines_figure(LABELS_PER_CLASS, accuracy, "labels per class", "accuracy (%)", title)
    content = {"labels_per_class": list(LABELS_PER_CLASS), "data": data}
    write_figure(out, content | {name: values.tolist() for name, values in accuracy.items()}, figure)
    _print_table(accuracy)
    return accuracy


def _measure_run(run_dir: Path, run: RunConfig, num_seeds: int, first_seed: int) -> dict[str, Tensor]:
    """Return `few_label_accuracy` of one run on the data set that `run` names."""
    device = choose_device()
    arrays = []
    for split in ("train", "test"):
        dataset = run.load_dataset(split)
        if dataset.labels is None:
            raise InputError(f"{run.data} has no labels; choose another --data.")
        if split == "test":
            dataset = dataset.subsample(NUM_TEST)
        in_memory = dataset if isinstance(dataset, InMemoryDataset) else dataset.subsample(MAX_STREAMED)
        assert in_memory.labels is not None
        arrays.append((in_memory.images.to(device), in_memory.labels.to(device)))
    encoders = pretrained.load_encoder(run_dir).to(device), random_init_encoder(run).to(device)
    return few_label_accuracy(*encoders, arrays[0], arrays[1], run.crop_size, LABELS_PER_CLASS, num_seeds, first_seed)


def _print_table(accuracy: dict[str, Tensor]) -> None:
    """Print mean and standard deviation (over n, not n - 1) of accuracies (L, seeds) in percent, a row each."""
    print(f"{'labels per class':16}" + "".join(f"{count:>14}" for count in LABELS_PER_CLASS))
    for name, values in accuracy.items():
        means, stds = values.mean(dim=1).tolist(), values.std(dim=1, correction=0).tolist()
        print(f"{name:16}" + "".join(f"{mean:8.1f} ± {std:3.1f}" for mean, std in zip(means, stds)))
