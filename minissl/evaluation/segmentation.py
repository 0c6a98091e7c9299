"""Segment images by frozen patch features, and find corresponding patches of two images.

Oquab et al., DINOv2, 2023 (arXiv:2304.07193), section 7.4: a linear layer on patch tokens, measured by the mean
intersection over union (mIoU).

Shapes: N training and M test images, a grid (h, w) of patch features of D dimensions, masks of H x W pixels.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.evaluation.classification import knn, linear_probe

IGNORE_INDEX = -1  # class of pixels that neither training nor evaluation uses


def labels_at_patch_centers(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """Return the values (N, h, w) of masks (N, H, W) at the centers of the patches of a grid (h, w)."""
    (height, width), (h, w) = masks.shape[-2:], grid
    rows, columns = ((2 * torch.arange(n) + 1) * size // (2 * n) for n, size in ((h, height), (w, width)))
    return masks[:, rows[:, None], columns]


def segment_patches(
    train_patches: Tensor,
    train_masks: Tensor,
    test_patches: Tensor,
    classifier: Literal["linear", "knn"] = "linear",
    max_patches: int = 20_000,
) -> Tensor:
    """Predict the class of every patch of the test images.

    Args:
        train_patches: (N, h, w, D) patch features.
        train_masks: (N, H, W) int64 classes, read at the patch centers; `IGNORE_INDEX` is left out.
        test_patches: (M, h, w, D) patch features.
        classifier: "linear", a linear probe on patches, or "knn", their 20 nearest neighbors.
        max_patches: largest number of training patches; of more, as many are used, evenly spaced.

    Returns:
        (M, h, w) int64 classes.
    """
    labels = labels_at_patch_centers(train_masks, train_patches.shape[1:3]).flatten().to(train_patches.device)
    indices = (labels != IGNORE_INDEX).nonzero()[:, 0]
    num_patches = min(max_patches, len(indices))
    indices = indices[torch.arange(num_patches) * len(indices) // num_patches]  # evenly spaced
    features, labels = train_patches.flatten(0, 2)[indices], labels[indices]
    test_features = test_patches.flatten(0, 2)
    if classifier == "knn":
        predictions = knn(features, labels, test_features)
    else:  # patches are many and alike, so the penalty grows with their number
        predictions = linear_probe(features, labels, test_features, min(1.0, 200 / len(features)))
    return predictions.unflatten(0, test_patches.shape[:3])


def mean_iou(predictions: Tensor, masks: Tensor) -> float:
    """Compute the intersection over union of each class over all images together, averaged over the classes in `masks`.

    Args:
        predictions: (M, h, w) int64 classes, resized to the masks by nearest neighbor.
        masks: (M, H, W) int64; `IGNORE_INDEX` is left out.

    Returns:
        mIoU, 0 to 1.
    """
    predictions = F.interpolate(predictions[:, None].double(), masks.shape[-2:], mode="nearest")[:, 0].long()
    predictions, masks = predictions[masks != IGNORE_INDEX], masks[masks != IGNORE_INDEX]
    n = int(torch.maximum(predictions.max(), masks.max())) + 1
    confusion = torch.bincount(masks * n + predictions, minlength=n * n).view(n, n)  # (true class, predicted class)
    intersection, true, predicted = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
    return float((intersection / (true + predicted - intersection))[true > 0].mean())


def mutual_nearest_neighbors(a: Tensor, b: Tensor) -> Tensor:
    """Find pairs of patches that are each other's nearest neighbor by cosine.

    Args:
        a: (N, D) features of the N patches of one image.
        b: (M, D), of the M patches of the other.

    Returns:
        (P, 2) int64 indices into `a` and `b`, in descending order of cosine.
    """
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT  # (N, M)
    nearest_b, nearest_a = cosines.argmax(dim=1), cosines.argmax(dim=0)  # of each of a, of each of b
    indices = torch.arange(len(a), device=a.device)
    order = cosines[indices, nearest_b].argsort(descending=True)
    return torch.stack([indices, nearest_b], dim=1)[order[nearest_a[nearest_b[order]] == order]]


def correspondence_accuracy(a: Tensor, b: Tensor, parts_a: Tensor, parts_b: Tensor) -> float:
    """Compute how often the nearest patch in another image, by cosine, shows the same object part.

    Args:
        a: (P, h, w, D) patch features of the first images of P pairs, each of two images of one class.
        b: (P, h, w, D), of the second images.
        parts_a: (P, H, W) integers, the object part, 0 for background.
        parts_b: (P, H, W), likewise.

    Returns:
        Accuracy, 0 to 1, over the object patches of `a` whose part is visible in `b`; NaN if there are none.
    """
    grid = a.shape[1:3]
    a, b = (F.normalize(x.flatten(1, 2), dim=-1) for x in (a, b))  # (P, N, D)
    parts_a, parts_b = (
        labels_at_patch_centers(parts, grid).flatten(1).to(a.device) for parts in (parts_a, parts_b)
    )  # (P, N)
    predictions = parts_b.gather(1, (a @ b.mT).argmax(dim=-1))  # (P, N)
    visible_in_both = (parts_a[:, :, None] == parts_b[:, None, :]).any(dim=-1) & (parts_a > 0)
    return float((predictions == parts_a)[visible_in_both].float().mean())


def classify_patches_by_text(patches: Tensor, texts: Tensor) -> Tensor:
    """Classify patch embeddings (B, h, w, E) by the text embedding (T, E) with the largest cosine.

    Returns:
        (B, h, w) int64 indices, 0 to T - 1.
    """
    return (F.normalize(patches, dim=-1) @ F.normalize(texts, dim=-1).mT).argmax(dim=-1)
