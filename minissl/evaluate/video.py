"""What features are worth in a video: how well objects are followed, and whether patches stay what they are.

Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, 2017 (arXiv:1704.00675): regions (J) and
contours (F). Shapes: T frames of H x W pixels, a grid (h, w) of patches of D numbers.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.errors import InputError
from minissl.evaluate.segment import IGNORED, at_patches, segment
from minissl.evaluate.zero_shot import retrieval


def j_and_f(predicted: Tensor, truth: Tensor, void: int = 255) -> dict:
    """How well the objects of the first frame are followed, as DAVIS 2017 measures it where the first mask is given.

    Of each object, the mean over all frames but the first, which is given, and the last; then the mean over objects.

    Args:
        predicted: (T, H, W) integers, numbers of objects.
        truth: (T, H, W) integers.
        void: in the truth: what this pixel shows is not asked.

    Returns:
        "J", the intersection over union; "F", the harmonic mean of precision and recall of the outline; "J&F", their
        mean; all 0 to 1. And "objects": the same three for each number.

    Raises:
        InputError: if the shapes differ, there are fewer than 3 frames, or no object in the first.
    """
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise InputError(
            f"Masks to compare are two of (T, H, W); these are {tuple(predicted.shape)} and {tuple(truth.shape)}."
        )
    if len(truth) < 3:
        raise InputError(f"The first and the last frame are not counted, and {len(truth)} frames leave none; give 3.")
    numbers = [n for n in truth[0].unique().tolist() if n not in (0, void)]
    if not numbers:
        raise InputError("The first frame shows no object that could be followed.")
    found, true = (x[1:-1].cpu().numpy() for x in (predicted, truth))
    asked, objects = true != void, {}
    for n in numbers:
        pairs = [((a == n) & ok, (b == n) & ok) for a, b, ok in zip(found, true, asked)]
        j, f = (float(np.mean([measure(*pair) for pair in pairs])) for measure in (region, contour))
        objects[n] = {"J": j, "F": f, "J&F": (j + f) / 2}
    means = {name: sum(of[name] for of in objects.values()) / len(objects) for name in ("J", "F", "J&F")}
    return means | {"objects": objects}


def region(found: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) of bool; 1 where both are empty."""
    either = (found | true).sum()
    return float((found & true).sum() / either) if either else 1.0


def contour(found: np.ndarray, true: np.ndarray) -> float:
    """The F-measure of the outlines of two masks (H, W) of bool; 1 where both are empty, 0 where one is.

    A pixel of an outline is right if the other outline is within 0.8 % of the diagonal, rounded up to whole pixels.
    """
    from sklearn.neighbors import KDTree

    a, b = np.argwhere(outline(found)), np.argwhere(outline(true))
    if len(a) == 0 or len(b) == 0:
        return float(len(a) == len(b))
    reach = math.ceil(0.008 * math.hypot(*true.shape))
    precision, recall = ((KDTree(y).query(x)[0] <= reach).mean() for x, y in ((a, b), (b, a)))
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def outline(mask: np.ndarray) -> np.ndarray:
    """Where a mask (H, W) of bool differs from the next pixel to the right, below, or both; nothing beyond an edge."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != wide[:-1, 1:]) | (mask != wide[1:, :-1]) | (mask != wide[1:, 1:])


def coherence(colors: Tensor, masks: Tensor) -> float:
    """Whether patches keep their colour from frame to frame, as by `visualize.pca_rgb`; anything of few channels does.

    A patch is compared with the patch at the same place in the next frame, where both show the same object or both the
    ground. 1 - (their mean squared distance) / (that of two patches of the clip taken by chance): the correlation
    over time. It is 1 if nothing flickers and 0 if a patch says nothing of the next frame's; motion costs a little.

    Args:
        colors: (T, C, h, w).
        masks: (T, H, W) integers, numbers of objects.

    Raises:
        InputError: if there is one frame only, or no place that shows the same in two of them.
    """
    numbers = at_patches(masks, colors.shape[-2:])  # (T, h, w)
    same = numbers[1:] == numbers[:-1]
    if not same.any():
        raise InputError("No place shows the same thing in two frames after each other, so nothing can be compared.")
    steps = (colors[1:] - colors[:-1]).square().sum(dim=1)[same].mean()
    by_chance = 2 * colors.transpose(0, 1).flatten(1).var(dim=1, correction=0).sum()
    return float(1 - steps / by_chance.clamp_min(1e-12))


def segment_clip(features: Tensor, first_mask: Tensor, way: str = "knn", void: int = 255) -> Tensor:
    """A clip's masks by a classifier that has seen the patches of its first frame, and knows nothing of time.

    Args:
        features: (T, h, w, D).
        first_mask: (H, W) integers.
        way: "knn" or "linear", as for `segment`.
        void: in the mask: nothing is learnt from this pixel.

    Returns:
        (T, H, W) int64; the first frame is the mask as it was given.

    Raises:
        InputError: for an unknown way, or a mask that is void at every patch.
    """
    if way not in ("knn", "linear"):
        raise InputError(f"Patches cannot be told by {way!r}; choose knn or linear.")
    mask = first_mask.long().to(features.device)
    known = mask.masked_fill(mask == void, IGNORED)[None]  # (1, H, W)
    seen = at_patches(known, features.shape[1:3]).unique()
    seen = seen[seen != IGNORED]
    if len(seen) == 0:
        raise InputError("The first mask is void in the middle of every patch, so there is nothing to learn.")
    if len(seen) == 1:
        found = seen.expand(features.shape[:3])
    else:
        found = segment(F.normalize(features[:1], dim=-1), known, F.normalize(features, dim=-1), way)
    rows, columns = (torch.arange(size) * n // size for size, n in zip(mask.shape, features.shape[1:3]))
    return torch.cat([mask[None], found[1:, rows[:, None], columns]])


def halves(clips: Sequence[Tensor]) -> float:
    """How often the first half of a clip finds its own second half among those of all clips, and the other way round.

    A half is one vector, the mean of all its patches; the most similar one is found.

    Args:
        clips: the patches of each, (T, h, w, D) with T of 2 or more.

    Returns:
        0 to 1, the recall at 1; by chance one in the number of clips.

    Raises:
        InputError: for no clips, or a clip of one frame.
    """
    if not clips or min(len(clip) for clip in clips) < 2:
        raise InputError("Halves can be found again among clips of two frames or more.")
    first, second = (
        torch.stack([part.mean(dim=(0, 1, 2)) for part in parts])  # (N, D)
        for parts in zip(*(clip.tensor_split(2) for clip in clips))
    )
    own = torch.arange(len(clips), device=first.device)
    return (retrieval(first, second, own, len(clips)) + retrieval(second, first, own, len(clips))) / 2
