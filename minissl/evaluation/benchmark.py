"""Evaluate one encoder on one data set: the metrics of `metrics.json` and of the scoreboard.

All encoders are evaluated alike, by frozen features; k-NN uses 20 neighbors. `metrics.json` is computed from at most
20,000 training and 5,000 test images.

Shapes: N images of H x W pixels, D the encoder's width, E dimensions of the shared embedding space, T sentences.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.data.images import ImageDataset
from minissl.errors import InputError
from minissl.evaluation.attention import attention_fraction, attention_iou, dense_attention, pointing_game
from minissl.evaluation.classification import knn, linear_probe
from minissl.evaluation.features import Pooling, dense_patches, extract_features, rank_me
from minissl.evaluation.few_shot import few_shot_accuracy
from minissl.evaluation.segmentation import IGNORE_INDEX, correspondence_accuracy, mean_iou, segment_patches
from minissl.evaluation.zero_shot import (
    class_embeddings,
    fill_templates,
    prompt_embeddings,
    retrieval_recall,
    zero_shot_classify,
    zero_shot_classify_sum,
)
from minissl.models.outputs import Encoder, Tokens


class ImageTextModel(Protocol):
    """A model that embeds images and sentences into one space, such as CLIP.

    Attributes:
        training: whether it is in training mode.
        logit_scale: scalar, natural logarithm of the factor on cosine similarities.
    """

    training: bool
    logit_scale: torch.nn.Parameter  # logarithm of the factor on cosines

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed normalized images (B, 3, H, W) as (B, E), not necessarily L2-normalized."""

    def embed_text(self, texts: list[str]) -> Tensor:
        """Embed B sentences as (B, E), not necessarily L2-normalized."""


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Compute the fraction of predictions that equal their labels, 0 to 1."""
    return float((predictions == labels).float().mean())


def quick_evaluation(
    encoder: Encoder,
    train_set: ImageDataset,
    test_set: ImageDataset,
    image_size: int | None = None,
    pooling: Pooling = "cls",
) -> dict[str, float]:
    """Compute one metric of an encoder during training; the arguments are as for `evaluate_encoder`.

    Returns:
        "knn", the k-NN accuracy, 0 to 1; without labels "rank_me" of the training features instead.
    """
    train_features, test_features = _features(encoder, train_set, test_set, image_size, pooling)
    if train_set.labels is None or test_set.labels is None:
        return {"rank_me": rank_me(train_features)}
    return {"knn": accuracy(knn(train_features, train_set.labels, test_features), test_set.labels)}


def evaluate_encoder(
    encoder: Encoder,
    train_set: ImageDataset,
    test_set: ImageDataset,
    image_size: int | None = None,
    pooling: Pooling = "cls",
) -> dict[str, float]:
    """Compute k-NN, linear-probe and few-shot accuracy, RankMe, and the attention metrics of a data set with masks.

    Args:
        encoder: its weights are not changed; it is evaluated in evaluation mode.
        train_set: data set on which k-NN and linear probes are trained.
        test_set: data set on the same device, with the same classes.
        image_size: side in pixels of the encoder's input; None takes that of the data set.
        pooling: "cls", the class token, or "both", it and the mean patch token.

    Returns:
        "rank_me" of the test features. With labels the accuracies "knn", "linear", and "few_shot_10" (10 labels per
        class, mean of 3 samples), and for each factor "linear_NAME", 0 to 1. With masks the metrics of
        `evaluate_attention` too, on at most 500 test images.

    Raises:
        InputError: if the data sets have different classes, or the test set lacks a factor of the training set.
    """
    _check_same_classes(train_set, test_set)
    train_features, test_features = _features(encoder, train_set, test_set, image_size, pooling)
    metrics = {"rank_me": rank_me(test_features)}
    if train_set.labels is not None and test_set.labels is not None:
        labeled = (train_features, train_set.labels, test_features)
        metrics["knn"] = accuracy(knn(*labeled), test_set.labels)
        metrics["linear"] = accuracy(linear_probe(*labeled), test_set.labels)
        metrics["few_shot_10"] = few_shot_accuracy(*labeled, test_set.labels)
    for name, factor in train_set.factors.items():
        labels = factor.labels.to(test_features.device)
        if "linear" in metrics and train_set.labels is not None and torch.equal(labels, train_set.labels):
            metrics[f"linear_{name}"] = metrics["linear"]  # the labels are this factor
        else:
            predictions = linear_probe(train_features, labels, test_features)
            test_labels = test_set.factors[name].labels.to(test_features.device)
            metrics[f"linear_{name}"] = accuracy(predictions, test_labels)
    if test_set.masks is not None:
        metrics |= evaluate_attention(encoder, test_set.subsample(500), image_size)
    return metrics


def _features(
    encoder: Encoder, train_set: ImageDataset, test_set: ImageDataset, image_size: int | None, pooling: Pooling
) -> tuple[Tensor, Tensor]:
    """Return the features (N, D) of both data sets."""
    return (
        extract_features(encoder, train_set, image_size, pooling=pooling),
        extract_features(encoder, test_set, image_size, pooling=pooling),
    )


def _check_same_classes(train_set: ImageDataset, test_set: ImageDataset) -> None:
    if train_set.classes and test_set.classes and train_set.classes != test_set.classes:
        raise InputError(
            f"The classes of the training set are {_shorten(train_set.classes)}, those of the test set "
            f"{_shorten(test_set.classes)}; give two with the same classes in the same order."
        )
    missing = sorted(set(train_set.factors) - set(test_set.factors))
    if missing:
        raise InputError(
            f"The test set lacks the factors {', '.join(missing)}; give one with those of the training set."
        )


def _shorten(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"


def evaluate_attention(encoder: Encoder, test_set: ImageDataset, image_size: int | None = None) -> dict[str, float]:
    """Compare the class token's attention with the objects' masks.

    Args:
        encoder: in evaluation mode, on the device of the data set.
        test_set: N images with masks.
        image_size: side in pixels of the encoder's input; None takes that of the data set.

    Returns:
        Fractions, 0 to 1:

        - "attention_iou", `attention_iou` of the mean map over heads, at 60 % of the attention;
        - "attention_fraction", the fraction of the attention on the object, of the head for which it is largest;
        - "attention_fraction_shuffled", that head's fraction on the mask of another image;
        - "attention_head_iou" (at 60 %) and "attention_pointing" of the head with the largest fraction on the first
          half of the images, measured on the second half;
        - "object_fraction", the fraction of the image that objects cover: the value of uniform attention.

    Raises:
        InputError: if the data set has no masks.
    """
    images, masks = test_set.get_batch(torch.arange(len(test_set))).images, _masks(test_set)
    maps = dense_attention(encoder, images, image_size or test_set.image_size)  # (N, heads, h, w)
    masks, half = masks.to(maps.device), len(maps) // 2
    fractions = attention_fraction(maps, masks)  # (N, heads)
    by_head = fractions.mean(dim=0)  # (heads,)
    head = int(fractions[: max(half, 1)].mean(dim=0).argmax())
    head_maps, half_masks = maps[half:, head, None], masks[half:]  # (N - half, 1, h, w)
    shuffled = attention_fraction(maps, masks.roll(1, dims=0)).mean(dim=0)
    return {
        "attention_iou": float(attention_iou(maps.mean(dim=1, keepdim=True), masks).mean()),
        "attention_fraction": float(by_head.max()),
        "attention_fraction_shuffled": float(shuffled[by_head.argmax()]),  # high for a head that attends to the center
        "attention_head_iou": float(attention_iou(head_maps, half_masks).mean()),
        "attention_pointing": float(pointing_game(head_maps, half_masks).float().mean()),
        "object_fraction": float((masks > 0).float().mean()),
    }


def evaluate_patches(
    encoder: Encoder, train_set: ImageDataset, test_set: ImageDataset, image_size: int | None = None
) -> dict[str, float]:
    """Compute mIoU of linear segmentation and the correspondence accuracy of patch features.

    The features are those of `dense_patches`, on a grid of at least 16 x 16.

    Args:
        encoder: in evaluation mode, on the device of the data sets.
        train_set: images with labels and masks.
        test_set: likewise.
        image_size: side in pixels of the encoder's input; None takes that of the data set.

    Returns:
        "miou_TARGET" for each target of `pixel_labels`, and "correspondence", all 0 to 1.

    Raises:
        InputError: if a data set has no labels or no masks.
    """
    patches, targets = {}, {}
    for split, dataset in (("train", train_set), ("test", test_set)):
        images = dataset.get_batch(torch.arange(len(dataset))).images
        patches[split] = dense_patches(encoder, images, image_size or dataset.image_size, 0).cpu()
        targets[split] = pixel_labels(dataset)
    metrics = {}
    for target in targets["train"]:
        predictions = segment_patches(patches["train"], targets["train"][target], patches["test"])
        metrics[f"miou_{target}"] = mean_iou(predictions, targets["test"][target])
    labels, indices = _labels(test_set).cpu().sort(stable=True)
    a, b = (part[labels[:-1] == labels[1:]] for part in (indices[:-1], indices[1:]))  # pairs of one class
    masks = _masks(test_set)
    accuracy_of_parts = correspondence_accuracy(patches["test"][a], patches["test"][b], masks[a], masks[b])
    return metrics | {"correspondence": accuracy_of_parts}


def _masks(dataset: ImageDataset) -> Tensor:
    if dataset.masks is None:
        raise InputError("The data set has no masks; choose one that has, such as --data scenes.")
    return dataset.masks


def _labels(dataset: ImageDataset) -> Tensor:
    if dataset.labels is None:
        raise InputError("The data set has no labels; choose one that has, such as --data scenes.")
    return dataset.labels


def pixel_labels(dataset: ImageDataset) -> dict[str, Tensor]:
    """Return segmentation targets by name, from labels and masks of object parts.

    Returns:
        Classes (N, H, W) int64 on the CPU: "object", 0 for the background or 1 + label; "part", 0 for the background or
        256 label + part; with a factor "place" also "place", the class of the background, `IGNORE_INDEX` on the object.

    Raises:
        InputError: if the data set has no labels or no masks.
    """
    labels, masks = _labels(dataset).cpu()[:, None, None], _masks(dataset).cpu().long()
    targets = {
        "object": torch.where(masks > 0, 1 + labels, 0),
        "part": torch.where(masks > 0, labels * 256 + masks, 0),  # masks are uint8: at most 256 parts per class
    }
    if "place" in dataset.factors:
        background = dataset.factors["place"].labels.cpu()[:, None, None]
        targets["place"] = torch.where(masks > 0, IGNORE_INDEX, background)
    return targets


def evaluate_zero_shot(model: ImageTextModel, dataset: ImageDataset, image_size: int | None = None) -> dict[str, float]:
    """Compute zero-shot accuracy of every factor, and image-text retrieval of a data set with captions.

    Args:
        model: embeds images and sentences.
        dataset: on its device, with classes, factors or captions.
        image_size: side in pixels of the model's input; None takes that of the data set.

    Returns:
        "zero_shot_NAME", by `zero_shot_classify`, and "zero_shot_sum_NAME", by `zero_shot_classify_sum`, of each
        factor, or without factors of "classes". With captions and 100 or more images, "image_to_text" and
        "text_to_image", recall at 1 among 100. All are 0 to 1.
    """
    images, metrics = image_embeddings(model, dataset, image_size), {}
    prompts: dict[str, Sequence[Sequence[str]]] = {name: f.prompts for name, f in dataset.factors.items()}
    labels = {name: factor.labels for name, factor in dataset.factors.items()}
    if not prompts and dataset.labels is not None:
        prompts, labels = {"classes": fill_templates(dataset.classes)}, {"classes": dataset.labels}
    for name in prompts:
        truth = labels[name].to(images.device)
        classes = class_embeddings(model.embed_text, prompts[name])
        sentences = prompt_embeddings(model.embed_text, prompts[name])
        metrics[f"zero_shot_{name}"] = accuracy(zero_shot_classify(images, classes), truth)
        summed = zero_shot_classify_sum(images, sentences, model.logit_scale.detach().exp())
        metrics[f"zero_shot_sum_{name}"] = accuracy(summed, truth)
    if dataset.captions is not None and len(dataset) >= 100:
        metrics |= _evaluate_retrieval(model, images, dataset.captions)
    return metrics


def _evaluate_retrieval(model: ImageTextModel, images: Tensor, captions: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Compute recall at 1 among 100, in both directions, of image embeddings (N, E) and the first caption of each."""
    index = {texts: i for i, texts in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([index[texts] for texts in captions], device=images.device)
    sentences = class_embeddings(model.embed_text, [texts[:1] for texts in captions])
    return {
        "image_to_text": retrieval_recall(images, sentences, ids),
        "text_to_image": retrieval_recall(sentences, images, ids),
    }


def image_embeddings(model: ImageTextModel, images: Tensor | ImageDataset, image_size: int | None = None) -> Tensor:
    """Embed images, as for `extract_features`, into the shared space: (N, E) float32, which are not L2-normalized."""
    return extract_features(_ImageTower(model), images, image_size)


def image_text_similarity(
    model: ImageTextModel, images: Tensor | ImageDataset, texts: Sequence[str], image_size: int | None = None
) -> Tensor:
    """Compute the cosine similarities (N, T) of N images and T sentences, in [-1, 1]."""
    sentences = class_embeddings(model.embed_text, [[text] for text in texts])
    return F.normalize(image_embeddings(model, images, image_size), dim=-1) @ sentences.mT


class _ImageTower(Encoder):
    """The image half of a model as an encoder whose class token is the embedding in the shared space."""

    def __init__(self, model: ImageTextModel):
        super().__init__()
        self.model = model
        self.training = model.training  # `extract_features` restores it

    def forward(self, images: Tensor) -> Tokens:
        embeddings = self.model.embed_images(images)  # (B, E)
        return Tokens(embeddings, embeddings[:, None, None])
