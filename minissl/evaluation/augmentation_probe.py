"""Measure which information augmentations destroy, with a linear probe on image statistics.

Contrastive methods learn what the views of an image share. Information that the augmentation keeps can tell images
apart without their content. Information that it destroys cannot be learned. Here every image is given a known tint,
rotation or shift and is augmented; a linear probe predicts it from coarse statistics of the result. Its accuracy is
a lower bound, because a network may use what a linear probe cannot.

Shapes: N images, V variants of each, F statistics.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.data.transforms.functional import rgb_to_grayscale, to_float
from minissl.errors import InputError
from minissl.evaluation.classification import linear_probe

# Red, cyan, blue, yellow; all of luma 0 (ITU-R 601), so that grayscale keeps nothing of them.
TINTS = ((0.25, -0.1273, 0.0), (-0.25, 0.1273, 0.0), (0.0, -0.0486, 0.25), (0.0, 0.0486, -0.25))

Augmentation = Callable[[Tensor], Tensor]


def tint(images: Tensor, k: int) -> Tensor:
    """Halve the contrast of images (B, 3, H, W) in [0, 1], so that they stay in [0, 1], and add tint k, 0 to 3."""
    return 0.25 + 0.5 * images + torch.tensor(TINTS[k], device=images.device).view(3, 1, 1)


def rotate(images: Tensor, k: int) -> Tensor:
    """Rotate images (B, 3, H, W) by k times 90 degrees counterclockwise."""
    return images.rot90(k, (-2, -1))


def shift(images: Tensor, k: int) -> Tensor:
    """Shift images (B, 3, H, W) by a sixteenth of the side along both axes; border pixels are repeated.

    For k = 0 to 3 the content moves down and right, down and left, up and right, or up and left.
    """
    (height, width), (y, x) = images.shape[-2:], (side // 16 for side in images.shape[-2:])
    top, left = 2 * y * (k // 2), 2 * x * (k % 2)
    return F.pad(images, (x, x, y, y), mode="replicate")[..., top : top + height, left : left + width]


def probe_augmentations(
    images: Tensor,
    augmentations: Mapping[str, Augmentation],
    labels: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Compute how accurately a linear probe predicts color, orientation and position from augmented images.

    Each of the three targets has four classes, made by `tint`, `rotate` and `shift`.

    Args:
        images: (N, 3, H, W), uint8 or float in [0, 1], in random order; at least 8 of at least 16 x 16 pixels. The
            probe is trained on the first half and tested on the second.
        augmentations: name -> function of float images (b, 3, H, W); it uses torch's and Python's generators.
        labels: further targets of the unchanged images, name -> (N,) int64.
        seed: of every augmentation; both generators' states are restored afterwards.

    Returns:
        Accuracies, 0 to 1, by augmentation and by target, "color", "orientation", "position" and the names of `labels`.
        Besides `augmentations` there are "chance", which predicts the most frequent label, and "nothing", without
        augmentation.

    Raises:
        InputError: for fewer or smaller images.
    """
    if len(images) < 8 or min(images.shape[-2:]) < 16:
        raise InputError(
            f"Got {len(images)} images of {images.shape[-2]} x {images.shape[-1]} pixels; give at least 8 of at least "
            "16 x 16."
        )
    images, half, state = to_float(images), len(images) // 2, random.getstate()
    targets = _targets(images, labels or {})
    test_labels = {name: answers[:, half:].flatten() for name, (_, answers) in targets.items()}
    accuracies = {"chance": {name: float(x.bincount().max() / len(x)) for name, x in test_labels.items()}}
    for name, augment in {"nothing": _identity, **augmentations}.items():
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(seed)
            random.seed(seed)
            accuracies[name] = {target: _accuracy(augment, *variants) for target, variants in targets.items()}
    random.setstate(state)
    return accuracies


def _identity(images: Tensor) -> Tensor:
    return images


def _targets(images: Tensor, labels: Mapping[str, Tensor]) -> dict[str, tuple[list[Tensor], Tensor]]:
    """Return for each target V variants of the images, and their labels (V, N)."""
    four = torch.arange(4, device=images.device)[:, None].expand(-1, len(images))
    changes = {"color": tint, "orientation": rotate, "position": shift}
    targets = {name: ([change(images, k) for k in range(4)], four) for name, change in changes.items()}
    return targets | {name: ([images], known[None]) for name, known in labels.items()}


def _accuracy(augment: Augmentation, variants: Sequence[Tensor], labels: Tensor) -> float:
    """Predict labels (V, N) of V variants of N images; no image is in both the training and the test half."""
    half = labels.shape[1] // 2
    # In small batches, because color jitter samples one order per batch.
    batches = ([_statistics(augment(batch)) for batch in images.split(50)] for images in variants)
    features = torch.stack([torch.cat(statistics) for statistics in batches])  # (V, N, F)
    (train, test), (train_labels, test_labels) = (
        [x[:, :half].flatten(0, 1), x[:, half:].flatten(0, 1)] for x in (features, labels)
    )
    predictions = linear_probe(train, train_labels, test, inverse_regularization=0.1)
    return float((predictions == test_labels).float().mean())


def _statistics(images: Tensor, cells: int = 6) -> Tensor:
    """Return the mean of each channel and the standard deviation of the luma in every cell of a grid, (B, F)."""
    luma = rgb_to_grayscale(images)
    mean, square, colors = (F.adaptive_avg_pool2d(x, cells) for x in (luma, luma**2, images))
    return torch.cat([colors, (square - mean**2).clamp_min(0).sqrt()], dim=1).flatten(1)
