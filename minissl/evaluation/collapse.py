"""Measure collapse of features and of a teacher's target distributions.

Caron et al., DINO, 2021 (arXiv:2104.14294), section 5.3: a collapse is uniform targets, or the same target for all
images.

Shapes: N images, D the encoder's width, K prototypes.
"""

import math

import torch
from torch import Tensor

from minissl.evaluation.classification import knn
from minissl.evaluation.features import rank_me
from minissl.evaluation.representation import alignment, feature_std, uniformity


def measure_collapse(
    features: Tensor,
    flipped_features: Tensor,
    target_probs: Tensor,
    labels: Tensor,
    train_features: Tensor,
    train_labels: Tensor,
) -> dict[str, float]:
    """Compute the quantities that distinguish a collapse from learning.

    Args:
        features: (N, D), of the test images.
        flipped_features: (N, D), of the same images, mirrored left to right.
        target_probs: (N, K), the teacher's target distributions of the test images, which sum to 1 over K.
        labels: (N,) int64, of the test images.
        train_features: (M, D), of the images in which k-NN searches.
        train_labels: (M,) int64.

    Returns:
        - "entropy", of a target, mean over images, and "entropy_of_mean", of the mean target, both 0 to ln K in nats.
          Their difference is the mutual information of image and prototype.
        - "rank_me", 1 to "embed_dim" (D).
        - "feature_std", "uniformity", and "alignment" of images with their mirror images.
        - "knn", the accuracy of k-NN, 0 to 1.
    """
    return {
        "entropy": float(torch.special.entr(target_probs).sum(-1).mean()),
        "entropy_of_mean": float(torch.special.entr(target_probs.mean(dim=0)).sum()),
        "rank_me": rank_me(features),
        "feature_std": feature_std(features),
        "alignment": alignment(features, flipped_features),
        "uniformity": uniformity(features),
        "embed_dim": features.shape[1],
        "knn": float((knn(train_features, train_labels, features) == labels).float().mean()),
    }


def collapse_type(entropy: float, entropy_of_mean: float, num_prototypes: int) -> str:
    """Classify a collapse by the entropies of `measure_collapse`.

    A low entropy alone is not a collapse: a sharp teacher that assigns images to different prototypes has it too. It is
    a collapse if the mean target has about the same entropy, because then all images have the same target.

    Args:
        entropy: mean entropy of the targets in nats.
        entropy_of_mean: entropy of the mean target in nats.
        num_prototypes: K.

    Returns:
        "none" if the entropies differ by more than 5 % of ln K. Else "uniform", if `entropy` is above 95 % of ln K;
        "one-hot" below 10 %, all images have one prototype; or "constant" in between, the same target for all images.
    """
    max_entropy = math.log(num_prototypes)
    if entropy_of_mean - entropy > 0.05 * max_entropy:
        return "none"
    return "uniform" if entropy > 0.95 * max_entropy else "one-hot" if entropy < 0.1 * max_entropy else "constant"
