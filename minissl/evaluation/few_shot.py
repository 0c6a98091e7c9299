"""Classify frozen features with few labels per class.

Shapes: N training and M test images, D the encoder's width.
"""

import torch
from torch import Tensor

from minissl.evaluation.classification import linear_probe


def sample_per_class(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Sample indices of `per_class` images of each class, or of all images of a class that has fewer.

    Args:
        labels: (N,) int64.
        per_class: number of images per class.
        seed: seed of the sample; torch's global generator is not used.

    Returns:
        (n,) int64 indices on the CPU, class by class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    indices = [order[labels.cpu()[order] == c][:per_class] for c in labels.unique().tolist()]
    return torch.cat(indices)


def few_shot_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    per_class: int = 10,
    num_samples: int = 3,
) -> float:
    """Compute the accuracy of a linear probe that is trained on few labels per class.

    Args:
        train_features: (N, D) float, from which the labeled images are sampled.
        train_labels: (N,) int64.
        test_features: (M, D) float.
        test_labels: (M,) int64.
        per_class: number of labels per class.
        num_samples: number of samples, with seeds 0, 1, ...; their accuracies are averaged.

    Returns:
        Accuracy, 0 to 1.
    """
    total = 0.0
    for seed in range(num_samples):
        indices = sample_per_class(train_labels, per_class, seed).to(train_labels.device)
        predictions = linear_probe(
            train_features[indices], train_labels[indices], test_features, inverse_regularization=0.1
        )
        total += float((predictions == test_labels).float().mean())
    return total / num_samples
