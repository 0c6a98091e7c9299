"""What does an augmentation destroy? Ask a linear classifier that sees nothing but pixels.

A contrastive method learns what views have in common. What an augmentation leaves readable tells images apart without
a look at what they show; what it destroys cannot be learnt at all. So every image is given a known tint, turn or shift,
is augmented, and what it was given is guessed from coarse statistics of the result. The guess is a lower bound: a
network may read what a linear classifier cannot. Shapes: N images, V variants of each, F statistics.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.augment import grey, to_float
from minissl.errors import InputError
from minissl.evaluate.classify import linear_probe

# Red, cyan, blue, yellow; all of luma 0 (ITU-R 601), so that grey keeps nothing of them.
TINTS = ((0.25, -0.1273, 0.0), (-0.25, 0.1273, 0.0), (0.0, -0.0486, 0.25), (0.0, 0.0486, -0.25))


def tinted(images: Tensor, k: int) -> Tensor:
    """Half the contrast, so that no channel is cut off, and a little of the tint k."""
    return 0.25 + 0.5 * images + torch.tensor(TINTS[k], device=images.device).view(3, 1, 1)


def turned(images: Tensor, k: int) -> Tensor:
    """By k quarters of a circle."""
    return images.rot90(k, (-2, -1))


def moved(images: Tensor, k: int) -> Tensor:
    """By a sixteenth of a side along both axes, towards the corner k; the pixels of the edge are repeated."""
    (height, width), (y, x) = images.shape[-2:], (side // 16 for side in images.shape[-2:])
    top, left = 2 * y * (k // 2), 2 * x * (k % 2)
    return F.pad(images, (x, x, y, y), mode="replicate")[..., top : top + height, left : left + width]


def what_survives(
    images: Tensor,
    augmentations: Mapping[str, Callable[[Tensor], Tensor]],
    labels: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How often colour, orientation and position are guessed right, of four each, from augmented images.

    Args:
        images: (N, 3, H, W) uint8 or float in [0, 1], 8 or more of 16 pixels a side or more, in no order: the
            classifier learns from the first half and is asked about the second.
        augmentations: name -> what it does to float images (b, 3, H, W), by torch's and Python's generators.
        labels: more questions, name -> (N,) int64, about the images as they are.
        seed: of every augmentation's draws; the generators go on afterwards as if nothing had been drawn.

    Returns:
        name -> question -> accuracy in [0, 1]; "chance" is always the same answer, "nothing" no augmentation.

    Raises:
        InputError: for fewer or smaller images.
    """
    if len(images) < 8 or min(images.shape[-2:]) < 16:
        raise InputError(f"8 images of 16 x 16 pixels are needed; got {len(images)} of {tuple(images.shape[-2:])}.")
    images, half, state = to_float(images), len(images) // 2, random.getstate()
    four = torch.arange(4, device=images.device)[:, None].expand(-1, len(images))
    asked = {"color": tinted, "orientation": turned, "position": moved}
    asked = {name: ([change(images, k) for k in range(4)], four) for name, change in asked.items()}
    asked |= {name: ([images], known[None]) for name, known in (labels or {}).items()}
    rest = {name: answers[:, half:].flatten() for name, (_, answers) in asked.items()}
    table = {"chance": {name: float(x.bincount().max() / len(x)) for name, x in rest.items()}}
    for name, augment in {"nothing": lambda x: x, **augmentations}.items():
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(seed)
            random.seed(seed)
            table[name] = {question: _accuracy(augment, *given) for question, given in asked.items()}
    random.setstate(state)
    return table


def _accuracy(augment: Callable[[Tensor], Tensor], variants: Sequence[Tensor], answers: Tensor) -> float:
    """Of guessing the answers (V, N) from V variants of N images; no image is both learnt from and asked about."""
    half = answers.shape[1] // 2
    # In small batches, because the order of a jitter is drawn for a batch.
    found = torch.stack([torch.cat([_statistics(augment(b)) for b in images.split(50)]) for images in variants])
    (train, test), (known, truth) = ([x[:, :half].flatten(0, 1), x[:, half:].flatten(0, 1)] for x in (found, answers))
    return float((linear_probe(train, known, test, strength=0.1) == truth).float().mean())


def _statistics(images: Tensor, cells: int = 6) -> Tensor:
    """(B, F): the mean of each channel and the deviation of the luma, in every cell of a grid."""
    luma = grey(images)
    mean, square, colors = (F.adaptive_avg_pool2d(x, cells) for x in (luma, luma**2, images))
    return torch.cat([colors, (square - mean**2).clamp_min(0).sqrt()], dim=1).flatten(1)
