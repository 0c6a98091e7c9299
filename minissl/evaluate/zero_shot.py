"""Words as classifiers: an image is what the sentence says that it agrees with most.

Radford et al., CLIP, 2021 (arXiv:2103.00020), section 3.1: the sentences of a class are embedded, normalised, averaged
and normalised again.
Shapes: M images, C classes, P sentences a class, E dimensions of the space that images and sentences share.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close photo of a {}.", "there is a {}.", "{}")


def in_templates(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """Each of C names in each of P templates."""
    return [[template.format(name) for template in templates] for name in names]


@torch.no_grad()
def class_vectors(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> Tensor:
    """The classes as directions.

    Args:
        embed_text: sentences to vectors (P, E).
        prompts: for each class its sentences.

    Returns:
        (C, E), of length 1.
    """
    means = [F.normalize(embed_text(list(texts)).float(), dim=-1).mean(dim=0) for texts in prompts]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot(images: Tensor, classes: Tensor) -> Tensor:
    """Labels (M,) of image vectors (M, E), of any length, by class vectors (C, E)."""
    return (F.normalize(images, dim=-1) @ classes.mT).argmax(dim=-1)


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
