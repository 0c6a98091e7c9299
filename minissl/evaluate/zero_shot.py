"""Words as classifiers: an image is what the sentence says that it agrees with most.

Radford et al., CLIP, 2021 (arXiv:2103.00020), section 3.1. Many sentences of a class may be asked in two ways: their
vectors are averaged, which is the paper's and costs one vector a class; or their shares of the softmax are added up,
which asks whether any of them is true.
Shapes: M images, C classes, P sentences a class, E dimensions of the space that images and sentences share.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close photo of a {}.", "there is a {}.", "{}")


def in_templates(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """Each of C names in each of P templates."""
    return [[template.format(name) for template in templates] for name in names]


@torch.no_grad()
def sentence_vectors(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Sentences as directions.

    Args:
        embed_text: sentences to vectors (P, E).
        prompts: for each class its sentences.

    Returns:
        For each class (P, E), of length 1.
    """
    return [F.normalize(embed_text(list(texts)).float(), dim=-1) for texts in prompts]


def class_vectors(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> Tensor:
    """The classes as directions (C, E) of length 1: each the mean of its sentences; arguments as above."""
    return F.normalize(torch.stack([of.mean(dim=0) for of in sentence_vectors(embed_text, prompts)]), dim=-1)


def zero_shot(images: Tensor, classes: Tensor) -> Tensor:
    """Labels (M,) of image vectors (M, E), of any length, by class vectors (C, E)."""
    return (F.normalize(images, dim=-1) @ classes.mT).argmax(dim=-1)


def zero_shot_sum(images: Tensor, sentences: Sequence[Tensor], scale: Tensor | float) -> Tensor:
    """Labels (M,) by the share that a class's sentences have of the softmax over all, on average over its P.

    Args:
        images: (M, E), of any length.
        sentences: for each class (P, E), of length 1.
        scale: multiplies the cosines, as in training.
    """
    images = F.normalize(images, dim=-1)
    shares = [(scale * images @ of.mT).logsumexp(dim=-1) - math.log(len(of)) for of in sentences]  # C times (M,)
    return torch.stack(shares, dim=-1).argmax(dim=-1)


def retrieval(queries: Tensor, found: Tensor, true: Tensor, group: int = 100) -> float:
    """How often the nearest of `group` candidates is right, 0 to 1.

    Args:
        queries: (M, E), of any length; images, or texts.
        found: (M, E), the i-th belongs to the i-th query.
        true: (M,) numbers; a candidate of the same number as the query is as right as its own.
        group: the M are taken in groups of so many, and a rest is left out.

    Raises:
        ValueError: if there are fewer than one group.
    """
    if len(queries) < group:
        raise ValueError(f"{len(queries)} pairs are fewer than one group of {group}.")
    queries, found = F.normalize(queries, dim=-1), F.normalize(found, dim=-1)
    right = []
    for rows in torch.arange(len(queries) // group * group, device=queries.device).split(group):
        nearest = rows[(queries[rows] @ found[rows].mT).argmax(dim=-1)]
        right.append(true[nearest] == true[rows])
    return float(torch.cat(right).float().mean())
