"""What features are worth where labels are few: a linear classifier on them, fine-tuning, and training from nothing.

Kornblith et al., Do Better ImageNet Models Transfer Better?, 2018 (arXiv:1805.08974), compares the same three.
Shapes: N training and M test images, C classes.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.augment import flip, normalize, random_resized_crop
from minissl.evaluate.classify import linear_probe
from minissl.evaluate.features import extract
from minissl.method import class_token
from minissl.teacher import warmup_cosine
from minissl.transformer import layer_rates


def few(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Rows of `per_class` images of each class, or of all there are if they are fewer; drawn from `seed`."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    found = [order[labels.cpu()[order] == c][:per_class] for c in labels.unique().tolist()]
    return torch.cat(found)


def fine_tune(
    encoder: nn.Module,
    images: Tensor,
    labels: Tensor,
    tests: Tensor,
    size: int,
    *,
    steps: int = 150,
    lr: float = 1e-3,
    layer_decay: float = 0.7,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Train a copy of an encoder and a linear classifier on it together, then ask it.

    Args:
        encoder: images -> Tokens, with its width as `dim`; it is not changed.
        images: (N, 3, H, W) uint8, training.
        labels: (N,) int64.
        tests: (M, 3, H, W) uint8.
        size: pixels the encoder sees.
        steps, lr, batch_size: of AdamW, with a warm-up of a tenth and a cosine.
        layer_decay: factor on the encoder's learning rate from each block to the one before.
        seed: of the classifier, the order and the crops; torch's generator goes on from there.

    Returns:
        (M,) int64 labels.
    """
    torch.manual_seed(seed)
    network = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": nn.Linear(encoder.dim, int(labels.max()) + 1)})
    network = network.to(images.device).requires_grad_(True).train()
    rates = layer_rates(network["encoder"], layer_decay, "encoder.")
    optimizer = torch.optim.AdamW(
        [{"params": [p], "rate": rates.get(name, 1.0)} for name, p in network.named_parameters()], weight_decay=0.05
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * warmup_cosine(0.0, lr, 0.0, step / steps, 0.1)
        rows = torch.randint(len(images), (min(batch_size, len(images)),), device=images.device)
        crops = normalize(flip(random_resized_crop(images[rows], size, (0.5, 1.0))))
        loss = F.cross_entropy(network["head"](class_token(network["encoder"], crops)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return network["head"](extract(network["encoder"], tests, size)).argmax(dim=-1)


def few_labels(
    encoder: nn.Module,
    untrained: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    size: int,
    counts: Sequence[int] = (1, 5, 10, 50, 100, 500),
    seeds: int = 3,
    first: int = 0,
) -> dict[str, Tensor]:
    """Accuracy at so many labels a class, three ways.

    Args:
        encoder: with the features to be judged.
        untrained: the same before it learnt anything, for the control.
        train: images (N, 3, H, W) uint8 and labels (N,), to draw the few from.
        test: images and labels (M,).
        size: pixels the encoders see.
        counts: labels a class.
        seeds: draws of the few, each with its own start of the classifier.
        first: the first one's seed.

    Returns:
        "frozen", "fine-tuned" and "from nothing" -> (len(counts), seeds), 0 to 1.
    """
    (images, labels), (tests, truth) = train, test
    features, test_features = extract(encoder, images, size), extract(encoder, tests, size)
    out = {name: torch.zeros(len(counts), seeds) for name in ("frozen", "fine-tuned", "from nothing")}
    for i, count in enumerate(counts):
        for j, seed in enumerate(range(first, first + seeds)):
            rows = few(labels, count, seed).to(images.device)
            few_images, few_truth = images[rows], labels[rows]
            found = {
                "frozen": linear_probe(features[rows], few_truth, test_features, strength=0.1),
                "fine-tuned": fine_tune(encoder, few_images, few_truth, tests, size, seed=seed),
                "from nothing": fine_tune(untrained, few_images, few_truth, tests, size, layer_decay=1.0, seed=seed),
            }
            for name, labels_found in found.items():
                out[name][i, j] = (labels_found == truth).float().mean()
    return out
