"""The numbers of one encoder on one data set: what `metrics.json` holds; and those of many on the scoreboard.

All methods are measured alike: 20,000 training and 5,000 test images at most, k = 20, frozen features.
"""

import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data import Images
from minissl.evaluate import (
    attention_iou,
    attention_share,
    class_vectors,
    correspondence,
    extract,
    few,
    fine_attention,
    fine_patches,
    in_templates,
    knn,
    linear_probe,
    mean_iou,
    pointing,
    rank_me,
    retrieval,
    segment,
    sentence_vectors,
    zero_shot,
    zero_shot_sum,
)
from minissl.evaluate.segment import IGNORED
from minissl.method import Tokens

STORY = {
    "knn": "k-NN, object", "linear": "object", "linear_color": "color", "linear_action": "action",
    "linear_place": "place", "J&F": "J&F of clips",
}  # fmt: skip


def accuracy(found: Tensor, true: Tensor) -> float:
    return float((found == true).float().mean())


def watch(encoder: nn.Module, train_set: Images, test_set: Images, size: int, pool: str = "cls") -> dict[str, float]:
    """A look while training: k-NN, or RankMe where there are no labels."""
    features, tests = (extract(encoder, x.images, size, pool=pool) for x in (train_set, test_set))
    if train_set.labels is None or test_set.labels is None:
        return {"rank_me": rank_me(features)}
    found = knn(features, train_set.labels, tests)
    return {"knn": accuracy(found, test_set.labels)}


def score(encoder: nn.Module, train_set: Images, test_set: Images, size: int, pool: str = "cls") -> dict[str, float]:
    """k-NN and a linear classifier on the labels and on every other factor that is known, rank, attention.

    Args:
        encoder: images -> Tokens.
        train_set, test_set: on the encoder's device.
        size: pixels the encoder sees.
        pool: what is read of an image's tokens, as for `evaluate.extract`.
    """
    features, tests = (extract(encoder, x.images, size, pool=pool) for x in (train_set, test_set))
    metrics = {"rank_me": rank_me(tests)}
    if train_set.labels is not None and test_set.labels is not None:
        metrics["knn"] = accuracy(knn(features, train_set.labels, tests), test_set.labels)
        metrics["linear"] = accuracy(linear_probe(features, train_set.labels, tests), test_set.labels)
        metrics["few_10"] = few_score(features, train_set.labels, tests, test_set.labels)
    for name, factor in train_set.factors.items():
        labels, truth = factor.labels.to(tests.device), test_set.factors[name].labels.to(tests.device)
        asked = "linear" in metrics and torch.equal(labels, train_set.labels)  # the labels are of this factor
        metrics[f"linear_{name}"] = (
            metrics["linear"] if asked else accuracy(linear_probe(features, labels, tests), truth)
        )
    return metrics | (score_attention(encoder, test_set.some(500), size) if test_set.masks is not None else {})


def few_score(features: Tensor, labels: Tensor, tests: Tensor, truth: Tensor, draws: int = 3) -> float:
    """A linear classifier from 10 labels a class, the mean of some draws of them."""
    found = [few(labels, 10, seed).to(labels.device) for seed in range(draws)]
    return sum(accuracy(linear_probe(features[r], labels[r], tests, strength=0.1), truth) for r in found) / draws


def score_attention(encoder: nn.Module, images: Images, size: int) -> dict[str, float]:
    """Where the class token looks, against the true masks.

    `attention_iou` is of the heads' mean. `attention_share` is of the head that has most of its attention on objects,
    on these images, which flatters it a little. So `attention_head_iou` (at 60 % of the mass) and `attention_pointing`
    are of the head with the highest share on the first half of the images, measured on the other half.
    """
    maps = fine_attention(encoder, images.images, size)
    masks = images.masks.to(maps.device)
    by_image, half = attention_share(maps, masks), len(maps) // 2  # (N, heads)
    shares = by_image.mean(dim=0)  # (heads,)
    chosen = by_image[: max(half, 1)].mean(dim=0).argmax()
    one, its_masks = maps[half:, chosen, None], masks[half:]  # (N - half, 1, h, w)
    elsewhere = attention_share(maps, masks.roll(1, dims=0)).mean(dim=0)  # on the place of another image's object
    return {
        "attention_iou": float(attention_iou(maps.mean(dim=1, keepdim=True), masks).mean()),
        "attention_share": float(shares.max()),
        "attention_elsewhere": float(elsewhere[shares.argmax()]),  # a head that looks at the middle has as much
        "attention_head_iou": float(attention_iou(one, its_masks).mean()),
        "attention_pointing": float(pointing(one, its_masks).float().mean()),
        "object_share": float((masks > 0).float().mean()),  # what attention spread evenly would have
    }


def score_patches(encoder: nn.Module, train_set: Images, test_set: Images, size: int) -> dict[str, float]:
    """What patches tell, by a linear classifier on them and by their nearest patches in other images.

    Patches are taken at 16 places a side or more, by moving the images under the encoder's grid. Asked is the object's
    kind (or that there is none), its part, and the place where no object is.
    """
    sets = {"train": train_set, "test": test_set}
    patches = {name: fine_patches(encoder, part.images, size, 0).cpu() for name, part in sets.items()}
    truth = {name: pixel_classes(part) for name, part in sets.items()}
    metrics = {}
    for question in truth["train"]:
        found = segment(patches["train"], truth["train"][question], patches["test"])
        metrics[f"miou_{question}"] = mean_iou(found, truth["test"][question])
    kinds, rows = test_set.labels.cpu().sort(stable=True)
    a, b = (part[kinds[:-1] == kinds[1:]] for part in (rows[:-1], rows[1:]))  # pairs of one kind
    pairs = (patches["test"][a], patches["test"][b], test_set.masks[a], test_set.masks[b])
    return metrics | {"correspondence": correspondence(*pairs)}


def pixel_classes(images: Images) -> dict[str, Tensor]:
    """Questions about every pixel, and their answers (N, H, W)."""
    labels, masks = images.labels.cpu()[:, None, None], images.masks.cpu().long()  # masks were uint8: 256 parts at most
    found = {"object": torch.where(masks > 0, 1 + labels, 0), "part": torch.where(masks > 0, labels * 256 + masks, 0)}
    if "place" in images.factors:
        place = images.factors["place"].labels.cpu()[:, None, None]
        found["place"] = torch.where(masks > 0, IGNORED, place)
    return found


def score_text(method: nn.Module, images: Images, size: int) -> dict[str, float]:
    """What a method can do that embeds images and sentences alike: zero-shot classification, and retrieval.

    Args:
        method: with `encoder`, `embed_images`, `embed_text` and `logit_scale`.
        images: on its device, with classes, factors or captions.
        size: pixels the encoder sees.
    """
    vectors, metrics = shared_vectors(method, images.images, size), {}
    prompts = {name: factor.prompts for name, factor in images.factors.items()}
    labels = {name: factor.labels for name, factor in images.factors.items()}
    if not prompts and images.labels is not None:
        prompts, labels = {"classes": in_templates(images.classes)}, {"classes": images.labels}
    for name in prompts:
        truth = labels[name].to(vectors.device)
        averaged, sentences = (f(method.embed_text, prompts[name]) for f in (class_vectors, sentence_vectors))
        metrics[f"zero_shot_{name}"] = accuracy(zero_shot(vectors, averaged), truth)
        summed = zero_shot_sum(vectors, sentences, method.logit_scale.detach().exp())
        metrics[f"zero_shot_sum_{name}"] = accuracy(summed, truth)
    if images.captions is not None and len(images) >= 100:
        number = {texts: i for i, texts in enumerate(dict.fromkeys(images.captions))}
        true = torch.tensor([number[texts] for texts in images.captions], device=vectors.device)
        sentences = class_vectors(method.embed_text, [texts[:1] for texts in images.captions])
        metrics["image_to_text"] = retrieval(vectors, sentences, true)
        metrics["text_to_image"] = retrieval(sentences, vectors, true)
    return metrics


def shared_vectors(method: nn.Module, images: Tensor, size: int) -> Tensor:
    """Images (N, 3, H, W) uint8 as vectors (N, E) in the space a method shares with sentences."""
    return extract(_Shared(method), images, size)


def agreement(method: nn.Module, images: Tensor, texts: list[str], size: int) -> Tensor:
    """The cosines of N images with T sentences, (N, T)."""
    sentences = class_vectors(method.embed_text, [[text] for text in texts])
    return F.normalize(shared_vectors(method, images, size), dim=-1) @ sentences.mT


def table_so_far(board: Path, rows: int) -> str:
    """The first rows of a scoreboard and the columns that every chapter shows: mean and deviation over seeds, in %."""
    lines = [" " * 12 + "".join(f"{name:>14}" for name in STORY.values())]
    for name, seeds in list(json.loads(board.read_text(encoding="utf-8"))["rows"].items())[:rows]:
        numbers = [[100 * found[key] for found in seeds.values()] for key in STORY]
        cells = (f"{statistics.mean(x):.1f} ± {statistics.stdev(x):4.1f}" for x in numbers)
        lines.append(f"{name:12}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


class _Shared(nn.Module):
    """The image half of a method as an encoder whose vector is in the space it shares with sentences."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method
        self.training = method.training  # `extract` puts that back

    def forward(self, images: Tensor) -> Tokens:
        vectors = self.method.embed_images(images)  # (B, E)
        return Tokens(vectors, vectors[:, None, None])
