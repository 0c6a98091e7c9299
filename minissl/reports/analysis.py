"""Analyze a folder of images with a trained encoder, without labels: clusters, neighbors, outliers and duplicates.

Crop retrieval measures, without labels, whether the encoder learned anything: whether the two crops of one image are
nearest neighbors. `summary` describes the results in sentences, and begins with any failure of the training.

Shapes: N images (N, 3, S, S) uint8, features (N, D).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.data.curation import cluster, find_near_duplicates, nearest_neighbors
from minissl.data.images import Images
from minissl.data.transforms.multi_view import random_resized_crops
from minissl.evaluation import extract_features, rank_me
from minissl.hub import pretrained
from minissl.models.outputs import Encoder
from minissl.reports.dataset_stats import DUPLICATE_THRESHOLD, DatasetStats, duplicate_descriptors, load_sample
from minissl.reports.diagnose import diagnose_run
from minissl.training import checkpoint
from minissl.training.device import choose_device
from minissl.training.diagnostics import MIN_STEPS, Finding
from minissl.training.logger import read_log
from minissl.training.run import RunConfig, random_init_encoder, read_run

MAX_IMAGES = 4000  # training images that are analyzed
NUM_RANK_IMAGES = 1000  # of these, for RankMe
MAX_TEST_IMAGES = 500
MIN_RETRIEVAL_IMAGES = 20  # with fewer, crop retrieval is not reported


@dataclass(frozen=True)
class FolderAnalysis:
    """The results of analyzing a run's folder of images.

    Attributes:
        stats: of the folder.
        run: configuration of the run.
        steps: length of the run.
        encoder: the trained encoder, on the CPU.
        files: N training images, evenly spaced.
        images: their pixels and labels.
        features: (N, D) of these.
        sample_features: (M, D) of M of these.
        random_features: (M, D) of the same images, by the randomly initialized encoder.
        groups: indices of the images of each cluster.
        duplicates: sets of indices of near-duplicates.
        test_files, test_images: images that were not trained on.
        crop_retrieval: `crop_retrieval` of the test images, by the trained and the randomly initialized encoder.
        log, metrics, findings: the run's log, its metrics, and the findings of `diagnose_run`.
    """

    stats: DatasetStats
    run: RunConfig
    steps: int
    encoder: Encoder
    files: list[Path]
    images: Images
    features: Tensor
    sample_features: Tensor
    random_features: Tensor
    groups: list[Tensor]
    duplicates: list[Tensor]
    test_files: list[Path]
    test_images: Images
    crop_retrieval: tuple[float, float]
    log: list[dict[str, float]]
    metrics: dict[str, float]
    findings: list[Finding]


def analyze_run(run_dir: Path, stats: DatasetStats) -> FolderAnalysis:
    """Analyze the folder of images with the encoder of a finished run.

    Raises:
        InputError: if the folder holds no run, or no readable image.
    """
    run, plan = read_run(run_dir)
    device, pooling, size = choose_device(stats.device), run.feature_pooling, run.crop_size
    trained, random_init = pretrained.load_encoder(run_dir).to(device), random_init_encoder(run).to(device)
    kept_size = max(size, min(run.image_size, stats.median_side))
    files, images = load_sample(stats.data, "train", MAX_IMAGES, kept_size)
    test_files, test_images = load_sample(stats.data, "test", MAX_TEST_IMAGES, kept_size)

    def extract(encoder: Encoder, images: Images) -> Tensor:
        return extract_features(encoder, images.images.to(device), size, pooling=pooling).cpu()

    sample, features = images.subsample(NUM_RANK_IMAGES), extract(trained, images)
    return FolderAnalysis(
        stats=stats,
        run=run,
        steps=plan.steps,
        files=files,
        images=images,
        features=features,
        sample_features=extract(trained, sample),
        random_features=extract(random_init, sample),
        groups=cluster_groups(center_features(features), max(2, min(10, len(files) // 40))),
        duplicates=duplicate_sets(images.images),
        test_files=test_files,
        test_images=test_images,
        crop_retrieval=(
            crop_retrieval(trained, test_images.images.to(device), size, pooling),
            crop_retrieval(random_init, test_images.images.to(device), size, pooling),
        ),
        encoder=trained.cpu(),
        log=read_log(run_dir / "log.jsonl"),
        metrics=checkpoint.read_json(run_dir / "metrics.json"),
        findings=diagnose_run(run_dir),
    )


def center_features(features: Tensor) -> Tensor:
    """Subtract the mean from features (N, D): the part that all images share does not distinguish them."""
    return features - features.mean(dim=0)


def cluster_groups(features: Tensor, k: int) -> list[Tensor]:
    """Cluster features (N, D) by k-means on directions.

    Returns:
        The indices of each of at most k clusters, the largest first; within one, the nearest to its mean first.
    """
    unit, assignments = F.normalize(features, dim=-1), cluster(features, k)
    groups = [(assignments == i).nonzero()[:, 0] for i in assignments.unique()]
    groups = [rows[(unit[rows] @ unit[rows].mean(dim=0)).argsort(descending=True)] for rows in groups]
    return sorted(groups, key=len, reverse=True)


def nearest_images(features: Tensor, rows: Tensor, n: int) -> Tensor:
    """Find the n most similar other images of each query, most similar first.

    Args:
        features: (N, D).
        rows: (Q,) indices of the queries.
        n: at most N - 1.

    Returns:
        (Q, n) indices.
    """
    _, neighbors = nearest_neighbors(features[rows], features, min(n + 1, len(features)))
    is_query = neighbors == rows[:, None]
    is_query[~is_query.any(dim=1), -1] = True  # exact duplicates may come before the query itself
    return neighbors[~is_query].unflatten(0, (len(rows), -1))


def outliers(features: Tensor, n: int, k: int = 10) -> Tensor:
    """Return the indices (n,) of the features (N, D) whose k-th nearest neighbor is farthest.

    The k-th rather than the first, so that an outlier with a duplicate is still found.
    """
    cosines, _ = nearest_neighbors(features, features, min(k + 1, len(features)))
    return cosines[:, -1].argsort()[:n]


def duplicate_sets(images: Tensor) -> list[Tensor]:
    """Find sets of near-duplicates by thumbnails: indices of two or more images, the most similar first."""
    descriptors = F.normalize(duplicate_descriptors(images), dim=-1)
    representatives = find_near_duplicates(descriptors, DUPLICATE_THRESHOLD)
    indices, counts = representatives.unique(return_counts=True)
    sets = [(representatives == i).nonzero()[:, 0] for i in indices[counts > 1].tolist()]
    return sorted(sets, key=lambda rows: float(descriptors[rows[0]] @ descriptors[rows[1]]), reverse=True)


def crop_retrieval(encoder: Encoder, images: Tensor, image_size: int, pooling: Literal["cls", "both"] = "cls") -> float:
    """Measure how often one crop of an image retrieves the image's other crop, among those of all images.

    Args:
        encoder: on the images' device.
        images: (N, 3, S, S) uint8 that the encoder was not trained on.
        image_size: side of a crop in pixels.
        pooling: as for `extract_features`.

    Returns:
        Top-1 accuracy by cosine similarity, in [0, 1]; the chance level is 1 / N.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crops = [random_resized_crops(images, (0.3, 1.0), image_size)[0] for _ in range(2)]  # (N, 3, size, size)
    queries, gallery = (
        extract_features(encoder, (255 * crop).round().to(torch.uint8), image_size, pooling=pooling) for crop in crops
    )
    _, nearest = nearest_neighbors(queries, gallery, 1)
    return float((nearest[:, 0] == torch.arange(len(images), device=nearest.device)).float().mean())


def summary(analysis: FolderAnalysis) -> list[str]:
    """Summarize an analysis in sentences; a failure of the training comes first."""
    num_train, sizes = analysis.stats.num_train, [len(rows) for rows in analysis.groups]
    num_duplicates = sum(len(rows) for rows in analysis.duplicates)
    epochs = analysis.steps * analysis.run.train["batch_size"] / num_train
    return [
        f"The network was trained for {epochs:,.1f} epochs on {num_train:,} images, without labels.",
        *training_summary(
            analysis.findings, analysis.steps, rank_me(analysis.sample_features), rank_me(analysis.random_features)
        ),
        *retrieval_summary(analysis.crop_retrieval, len(analysis.test_images)),
        *label_summary(analysis.metrics, analysis.stats.num_classes),
        f"k-means forms {len(sizes)} groups of {sizes[-1]:,} to {sizes[0]:,} images; "
        f"{num_duplicates or 'none'} of {sum(sizes):,} are near-duplicates.",
    ]


def training_summary(findings: list[Finding], steps: int, rank: float, random_rank: float) -> list[str]:
    """Describe whether the training can be trusted.

    Args:
        findings: of `diagnose_run`.
        steps: length of the run.
        rank: RankMe of the features.
        random_rank: RankMe of the randomly initialized encoder's features.
    """
    ranks = (
        f"the effective rank of its features (RankMe; 1 is collapse) is {rank:.0f}, at random init {random_rank:.0f}"
    )
    if findings:
        sentences = [f"{finding.evidence} {finding.meaning} {finding.remedy}" for finding in findings]
        return ["The training failed, and the results below mean little.", *sentences]
    if steps < MIN_STEPS:
        return [f"{steps} steps are too few to judge the training, and the results below are preliminary; {ranks}."]
    if rank < 2:
        return [f"The features have nearly collapsed, and the results below mean little: {ranks}."]
    return [f"No problem was found in the training: {ranks}."]


def retrieval_summary(retrieval: tuple[float, float], num_images: int) -> list[str]:
    """Describe the crop retrieval of the trained and the randomly initialized encoder; nothing for very few images."""
    trained, random_init = retrieval
    if num_images < MIN_RETRIEVAL_IMAGES:
        return []
    sentence = (
        f"For {trained:.0%} of {num_images} test images the features of one crop retrieve the image's other crop, "
    )
    sentence += f"at random init for {random_init:.0%}"
    return [f"{sentence}." if trained > random_init else f"{sentence}: by this measure nothing was learned."]


def label_summary(metrics: dict[str, float], num_classes: int) -> list[str]:
    """Describe the k-NN accuracy, if the folder has labels."""
    if "knn" not in metrics:
        return []
    sentence = f"k-NN accuracy on the test images is {metrics['knn']:.0%} ({num_classes} classes)"
    return [f"{sentence}, at random init {metrics['random_knn']:.0%}."]
