"""Evaluate video object segmentation, and how stable patch features are over time.

Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, 2017 (arXiv:1704.00675): region similarity (J)
and contour accuracy (F).

Shapes: T frames of H x W pixels, a grid (h, w) of patch features of D dimensions.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minissl.errors import InputError
from minissl.evaluation.segmentation import IGNORE_INDEX, labels_at_patch_centers, segment_patches
from minissl.evaluation.zero_shot import retrieval_recall

Mask = NDArray[np.bool_]


def j_and_f(predicted: Tensor, truth: Tensor, void: int = 255) -> dict[str, Any]:
    """Compute J, F and J&F of semi-supervised video object segmentation, as DAVIS 2017 does.

    J and F of each object in the first frame are averaged over all frames except the first, which is given, and the
    last. They are then averaged over objects.

    Args:
        predicted: (T, H, W) integers, object ids; 0 is the background.
        truth: (T, H, W) integers.
        void: id of pixels in `truth` that are not evaluated.

    Returns:
        "J", the intersection over union; "F", the F-measure of the boundary; "J&F", their mean; all 0 to 1. "objects"
        holds the same three for each object id.

    Raises:
        InputError: if the shapes differ, there are fewer than 3 frames, or no object in the first.
    """
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise InputError(
            f"The masks are {tuple(predicted.shape)} and {tuple(truth.shape)}; give two of the same shape (T, H, W)."
        )
    if len(truth) < 3:
        raise InputError(f"The clip has {len(truth)} frames; give 3 or more, as the first and the last do not count.")
    object_ids = [n for n in truth[0].unique().tolist() if n not in (0, void)]
    if not object_ids:
        raise InputError("The first frame's mask has no object; give one with an id besides 0 and void.")
    predicted_masks, true_masks = (x[1:-1].cpu().numpy() for x in (predicted, truth))
    valid, objects = true_masks != void, {}
    for n in object_ids:
        pairs = [((a == n) & ok, (b == n) & ok) for a, b, ok in zip(predicted_masks, true_masks, valid)]
        j, f = (float(np.mean([measure(*pair) for pair in pairs])) for measure in (region_similarity, contour_accuracy))
        objects[n] = {"J": j, "F": f, "J&F": (j + f) / 2}
    means = {name: sum(scores[name] for scores in objects.values()) / len(objects) for name in ("J", "F", "J&F")}
    return means | {"objects": objects}


def region_similarity(predicted: Mask, truth: Mask) -> float:
    """Compute the intersection over union of two bool masks (H, W); 1 if both are empty."""
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


def contour_accuracy(predicted: Mask, truth: Mask) -> float:
    """Compute the F-measure of the boundaries of two bool masks (H, W); 1 if both are empty, 0 if one is.

    A boundary pixel is correct if the other boundary is within 0.8 % of the image diagonal, rounded up to whole pixels.
    """
    from sklearn.neighbors import KDTree

    a, b = np.argwhere(mask_boundary(predicted)), np.argwhere(mask_boundary(truth))
    if len(a) == 0 or len(b) == 0:
        return float(len(a) == len(b))
    tolerance = math.ceil(0.008 * math.hypot(*truth.shape))
    precision, recall = ((KDTree(y).query(x)[0] <= tolerance).mean() for x, y in ((a, b), (b, a)))
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def mask_boundary(mask: Mask) -> Mask:
    """Return where a bool mask (H, W) differs from its right, lower or lower right neighbor, as in DAVIS's code."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    boundary: Mask = (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
    return boundary


def temporal_coherence(colors: Tensor, masks: Tensor) -> float:
    """Compute the temporal autocorrelation of patch colors, such as those of `visualization.pca_rgb`.

    1 - (mean squared difference of the same patch in successive frames) / (that of two random patches of the clip).
    The numerator is over the patches whose center shows the same object, or the background, in both frames. It is
    1 without any change and about 0 if successive frames are independent. Motion lowers it a little.

    Args:
        colors: (T, C, h, w) float.
        masks: (T, H, W) integers, object ids.

    Returns:
        At most 1.

    Raises:
        InputError: if no patch shows the same object in two successive frames, as in a clip of one frame.
    """
    object_ids = labels_at_patch_centers(masks, colors.shape[-2:])  # (T, h, w)
    unchanged = object_ids[1:] == object_ids[:-1]
    if not unchanged.any():
        raise InputError(
            f"In {len(colors)} frame(s) no patch shows the same object twice in succession; give a longer clip."
        )
    differences = (colors[1:] - colors[:-1]).square().sum(dim=1)[unchanged].mean()
    expected = 2 * colors.transpose(0, 1).flatten(1).var(dim=1, correction=0).sum()  # of two random patches
    return float(1 - differences / expected.clamp_min(1e-12))


def segment_clip(
    features: Tensor, first_mask: Tensor, classifier: Literal["knn", "linear"] = "knn", void: int = 255
) -> Tensor:
    """Segment a clip with a classifier of single patches that is trained on its first frame.

    Args:
        features: (T, h, w, D) patch features; they are L2-normalized here.
        first_mask: (H, W) integers, object ids.
        classifier: "knn" or "linear", as for `segment_patches`.
        void: id of pixels that are left out of training.

    Returns:
        (T, H, W) int64 object ids; the first frame is the first mask.

    Raises:
        InputError: for an unknown classifier, or a mask that is void at every patch center.
    """
    if classifier not in ("knn", "linear"):
        raise InputError(f"Unknown classifier {classifier!r}; choose knn or linear.")
    mask = first_mask.long().to(features.device)
    known = mask.masked_fill(mask == void, IGNORE_INDEX)[None]  # (1, H, W)
    object_ids = labels_at_patch_centers(known, features.shape[1:3]).unique()
    object_ids = object_ids[object_ids != IGNORE_INDEX]
    if len(object_ids) == 0:
        raise InputError(
            "The first mask is void at the center of every patch; give one with at least one labeled patch."
        )
    if len(object_ids) == 1:  # a linear probe needs two classes
        predictions = object_ids.expand(features.shape[:3])
    else:
        normalized = F.normalize(features, dim=-1)
        predictions = segment_patches(F.normalize(features[:1], dim=-1), known, normalized, classifier)
    rows, columns = (torch.arange(size) * n // size for size, n in zip(mask.shape, features.shape[1:3]))
    return torch.cat([mask[None], predictions[1:, rows[:, None], columns]])


def half_clip_retrieval(clips: Sequence[Tensor]) -> float:
    """Compute recall at 1 of retrieving the second half of a clip by its first half, among all clips, and vice versa.

    The feature of a half is the mean of all its patch features; halves are compared by cosine.

    Args:
        clips: (T, h, w, D) patch features of each clip, with T of 2 or more.

    Returns:
        0 to 1, the mean of both directions; the chance level is one over the number of clips.

    Raises:
        InputError: for no clips, or a clip of one frame.
    """
    if not clips or min(len(clip) for clip in clips) < 2:
        lengths = ", ".join(str(len(clip)) for clip in clips) or "none"
        raise InputError(f"The clips' numbers of frames are {lengths}; give at least one clip, each of 2 or more.")
    first, second = (
        torch.stack([part.mean(dim=(0, 1, 2)) for part in parts])  # (N, D)
        for parts in zip(*(clip.tensor_split(2) for clip in clips))
    )
    ids = torch.arange(len(clips), device=first.device)
    return (retrieval_recall(first, second, ids, len(clips)) + retrieval_recall(second, first, ids, len(clips))) / 2
