"""What a trained encoder finds in a folder of pictures, without labels: what belongs together, and what to no other.

Vectors say which pictures are neighbours, which form groups and which are far from all; whether two crops of one
picture find each other among all says, without a label, whether anything was learnt. `headline` says it in words, and
says first when a run went wrong.

Shapes: N pictures (N, 3, S, S) uint8, vectors (N, D).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl import checkpoint, pretrained, reports, runs
from minissl.data import Images
from minissl.data.curation import clusters, copies, nearest
from minissl.doctor import LEAST, Finding
from minissl.evaluate import extract, rank_me
from minissl.machine import choose_device
from minissl.record import read_log
from minissl.survey import COPY, Facts, marks, some
from minissl.views import cut

MOST, SAMPLE, KEPT = 4000, 1000, 500  # pictures that are shown from, that ranks are of, and of those kept back


@dataclass(frozen=True)
class Album:
    """A run's pictures and what it says of them.

    Attributes:
        facts: of the folder.
        run, steps: what was trained, and how long.
        encoder: what it made, on the CPU.
        files, pictures: N of those it learnt from, evenly spaced.
        features: (N, D) of these.
        sample, before: (M, D) of M of these, evenly spaced, by the encoder as it is and as it was before training.
        groups: rows of these, by their features.
        copies: rows of these that nearly repeat each other.
        kept_files, kept: some that were kept back.
        reunited: `reunited` of these by the encoder, and by one untrained.
        log, metrics, findings: the run's, and what the doctor says of it.
    """

    facts: Facts
    run: runs.Run
    steps: int
    encoder: nn.Module
    files: list[Path]
    pictures: Images
    features: Tensor
    sample: Tensor
    before: Tensor
    groups: list[Tensor]
    copies: list[Tensor]
    kept_files: list[Path]
    kept: Images
    reunited: tuple[float, float]
    log: list[dict[str, float]]
    metrics: dict[str, float]
    findings: list[Finding]


def open_album(out: Path, facts: Facts) -> Album:
    """Look at the folder with the encoder of a finished run."""
    run, plan = runs.read(out)
    device = choose_device(facts.device)
    trained, before = pretrained.load(out).to(device), runs.untrained(run).to(device)
    size = max(run.size, min(run.image_size, facts.middle))
    files, pictures = some(facts.data, "train", MOST, size)
    kept_files, kept = some(facts.data, "test", KEPT, size)
    few = pictures.some(SAMPLE).images.to(device)
    features = extract(trained, pictures.images.to(device), run.size, pool=run.reads).cpu()
    sample, first = (extract(encoder, few, run.size, pool=run.reads).cpu() for encoder in (trained, before))
    sorted_out = groups(centred(features), max(2, min(10, len(files) // 40)))
    met = tuple(reunited(encoder, kept.images.to(device), run.size, run.reads) for encoder in (trained, before))
    metrics = checkpoint.read_json(out / "metrics.json")
    return Album(
        facts, run, plan.steps, trained.cpu(), files, pictures, features, sample, first, sorted_out,
        repeats(pictures.images), kept_files, kept, met, read_log(out / "log.jsonl"), metrics, reports.diagnose(out),
    )  # fmt: skip


def centred(features: Tensor) -> Tensor:
    """Vectors (N, D) less their mean: what all pictures share tells none from another."""
    return features - features.mean(dim=0)


def groups(features: Tensor, k: int) -> list[Tensor]:
    """Rows of vectors (N, D) in k groups by k-means, the largest first; in each the nearest to its middle first."""
    unit, number = F.normalize(features, dim=-1), clusters(features, k)
    found = [(number == i).nonzero()[:, 0] for i in number.unique()]
    found = [rows[(unit[rows] @ unit[rows].mean(dim=0)).argsort(descending=True)] for rows in found]
    return sorted(found, key=len, reverse=True)


def neighbours(features: Tensor, rows: Tensor, n: int) -> Tensor:
    """For each of some rows (Q,) of vectors (N, D) the n others that are most like it, nearest first, (Q, n)."""
    _, found = nearest(features[rows], features, min(n + 1, len(features)))
    own = found == rows[:, None]
    own[~own.any(dim=1), -1] = True  # a copy may have come before the row itself
    return found[~own].unflatten(0, (len(rows), -1))


def odd_ones(features: Tensor, n: int, k: int = 10) -> Tensor:
    """Rows (n,) of vectors (N, D) whose k-th nearest other is farthest, so that one copy does not hide a stranger."""
    cosines, _ = nearest(features, features, min(k + 1, len(features)))
    return cosines[:, -1].argsort()[:n]


def repeats(images: Tensor) -> list[Tensor]:
    """Rows of pictures that nearly repeat each other, by thumbnails: sets of two and more, the most alike first."""
    vectors = F.normalize(marks(images), dim=-1)
    first = copies(vectors, COPY)
    counted = zip(*(found.tolist() for found in first.unique(return_counts=True)))
    sets = [(first == i).nonzero()[:, 0] for i, n in counted if n > 1]
    return sorted(sets, key=lambda rows: float(vectors[rows[0]] @ vectors[rows[1]]), reverse=True)


def reunited(encoder: nn.Module, images: Tensor, size: int, pool: str = "cls") -> float:
    """The share of pictures of which one crop finds the other among the crops of all, by cosine; by chance, 1 / N.

    Args:
        encoder: images -> Tokens, on the pictures' device.
        images: (N, 3, S, S) uint8, that it was not trained on.
        size: pixels of a crop.
        pool: as for `evaluate.extract`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crops = [cut(images, (0.3, 1.0), size)[0] for _ in range(2)]  # (N, 3, size, size) each, mirrored or not
    one, other = (extract(encoder, (255 * crop).round().to(torch.uint8), size, pool=pool) for crop in crops)
    _, found = nearest(one, other, 1)
    return float((found[:, 0] == torch.arange(len(images), device=found.device)).float().mean())


def headline(album: Album) -> list[str]:
    """What was found, in plain sentences."""
    n, sizes, again = album.facts.train, [len(rows) for rows in album.groups], sum(len(rows) for rows in album.copies)
    seen = album.steps * album.run.loop["batch_size"] / n
    return [
        f"A network looked {seen:,.1f} times at each of {n:,} pictures, and nobody told it what they show.",
        *verdict(album.findings, album.steps, rank_me(album.sample), rank_me(album.before)),
        *learnt(album.reunited, len(album.kept)),
        *labelled(album.metrics, album.facts.classes),
        f"It sorts {sum(sizes):,} pictures into {len(sizes)} groups of {sizes[0]:,} to {sizes[-1]:,}; "
        f"{again or 'none'} nearly repeat another.",
    ]


def verdict(findings: list[Finding], steps: int, rank: float, before: float) -> list[str]:
    """Whether to believe what follows: by the doctor, the length of the run, and RankMe now and before training."""
    used = f"its features use about {rank:.0f} directions (RankMe; 1 is collapse), untrained {before:.0f}"
    if findings:
        told = [f"{found.seen} {found.means} {found.turn}" for found in findings]
        return ["Something went wrong, and what is below means little.", *told]
    if steps < LEAST:
        return [f"{steps} steps are too few to judge, and what is below is hardly learnt; {used}."]
    if rank < 2:
        return [f"It has all but collapsed, and what is below means little: {used}."]
    return [f"Nothing looks wrong with the training: {used}."]


def learnt(found: tuple[float, float], among: int) -> list[str]:
    """Whether two crops of a picture are known for the same, which needs no labels; nothing of very few."""
    trained, before = found
    if among < 20:
        return []
    said = f"Shown a crop of one of {among} pictures that were kept back, it finds another crop of the same among all "
    said += f"in {trained:.0%} of cases, an untrained network in {before:.0%}"
    return [f"{said}." if trained > before else f"{said}: by this measure nothing was learnt."]


def labelled(metrics: dict[str, float], classes: int) -> list[str]:
    """What the classes say, if there are any."""
    if "knn" not in metrics:
        return []
    said = f"By its nearest neighbours {metrics['knn']:.0%} of the kept pictures get the right class of {classes}"
    return [f"{said}, by those of an untrained network {metrics['random_knn']:.0%}."]
