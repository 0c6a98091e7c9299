"""Classify images zero-shot by the similarity of their embeddings with those of sentences, and measure retrieval.

Radford et al., CLIP, 2021 (arXiv:2103.00020), section 3.1. Several prompts of one class can be combined in two ways.
The paper averages their embeddings, so that each class has a single embedding. The alternative is the mean of their
softmax probabilities, which is large if any of the prompts fits.

Shapes: M images, C classes, P prompts per class, E dimensions of the shared embedding space.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close photo of a {}.", "there is a {}.", "{}")


def fill_templates(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """Insert each of C class names into each of P templates, which contain {}. Returns C lists of P prompts."""
    return [[template.format(name) for template in templates] for name in names]


@torch.no_grad()
def prompt_embeddings(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Embed the prompts of each class.

    Args:
        embed_text: maps P sentences to embeddings (P, E), not necessarily L2-normalized.
        prompts: the sentences of each class.

    Returns:
        For each class (P, E) float32, L2-normalized; P may differ between classes.
    """
    return [F.normalize(embed_text(list(texts)).float(), dim=-1) for texts in prompts]


def class_embeddings(embed_text: Callable[[list[str]], Tensor], prompts: Sequence[Sequence[str]]) -> Tensor:
    """Average the prompt embeddings of each class to (C, E) float32, and L2-normalize these means.

    The arguments are as for `prompt_embeddings`.
    """
    means = [embeddings.mean(dim=0) for embeddings in prompt_embeddings(embed_text, prompts)]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot_classify(images: Tensor, classes: Tensor) -> Tensor:
    """Classify image embeddings by the class embedding with the largest cosine.

    Args:
        images: (M, E), not necessarily L2-normalized.
        classes: (C, E), L2-normalized, as `class_embeddings` returns them.

    Returns:
        (M,) int64 labels, 0 to C - 1.
    """
    return (F.normalize(images, dim=-1) @ classes.mT).argmax(dim=-1)


def zero_shot_classify_sum(images: Tensor, prompt_embeddings: Sequence[Tensor], logit_scale: Tensor | float) -> Tensor:
    """Classify image embeddings by the mean probability of each class's prompts, in a softmax over all prompts.

    Args:
        images: (M, E), not necessarily L2-normalized.
        prompt_embeddings: for each class (P, E), L2-normalized.
        logit_scale: factor on the cosines, as in training (not its logarithm).

    Returns:
        (M,) int64 labels, 0 to C - 1.
    """
    images = F.normalize(images, dim=-1)
    logits = [  # C times (M,); the softmax's denominator is the same for all classes
        (logit_scale * images @ embeddings.mT).logsumexp(dim=-1) - math.log(len(embeddings))
        for embeddings in prompt_embeddings
    ]
    return torch.stack(logits, dim=-1).argmax(dim=-1)


def retrieval_recall(queries: Tensor, candidates: Tensor, ids: Tensor, group_size: int = 100) -> float:
    """Compute recall at 1: how often the nearest of `group_size` candidates, by cosine, has the query's id.

    Args:
        queries: (M, E) embeddings of images or texts, not necessarily L2-normalized.
        candidates: (M, E), likewise, of which the i-th belongs to the i-th query.
        ids: (M,) int64; every candidate with the query's id is correct, as when images share a caption.
        group_size: the M pairs are split into groups of this size; a remainder is left out.

    Returns:
        Recall, 0 to 1.

    Raises:
        ValueError: if there are fewer pairs than one group.
    """
    if len(queries) < group_size:
        raise ValueError(
            f"{len(queries)} pairs are fewer than one group of {group_size}; give more, or a smaller group."
        )
    queries, candidates = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
    correct = []
    for indices in torch.arange(len(queries) // group_size * group_size, device=queries.device).split(group_size):
        nearest = indices[(queries[indices] @ candidates[indices].mT).argmax(dim=-1)]
        correct.append(ids[nearest] == ids[indices])
    return float(torch.cat(correct).float().mean())
