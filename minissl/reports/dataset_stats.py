"""Measure a folder of images and the machine before training; `recommend` chooses the options from these numbers.

All images are counted, and their sizes are read from the file headers. Color, near-duplicates and texture are measured
on a sample of 1,000 images. The speed is measured on a few training steps. No labels are needed.

Shapes: N images (N, 3, S, S) uint8.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, median_low

import psutil
import torch
from PIL import Image
from torch import Tensor

from minissl.data import folder
from minissl.data.curation import find_near_duplicates, nearest_neighbors, thumbnail_descriptors
from minissl.data.images import UNREADABLE, UNSCALED, Images
from minissl.errors import InputError
from minissl.methods.base import Method
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision

STATS_FILE = "dataset_stats.json"  # in the folder of a recommended run
SAMPLE_SIZE = 1000  # images
RUN_LENGTH = 10  # the sample takes runs of this many neighbors, because near-duplicates often have neighboring names
SAMPLE_PIXELS = 64  # side of the sample's images
DUPLICATE_THRESHOLD = 0.95  # cosine of thumbnails; precision 0.92 and recall 0.62 for scenes with known copies


@dataclass(frozen=True)
class DatasetStats:
    """Measurements of a folder and of the machine, and the user's wishes.

    Attributes:
        data: the folder, as folder:DIR.
        num_train: training images.
        num_test: test images.
        num_unreadable: files that cannot be read as images.
        num_classes: class folders; 0 without labels.
        min_side: short side in pixels of the smallest image.
        p5_side: 5th percentile of the short sides.
        median_side: median of the short sides.
        aspect_ratio: long side divided by short side, median.
        sample_size: number of images that the next four were measured on.
        gray_fraction: fraction of images without color.
        duplicate_fraction: fraction of images that are near-duplicates of an earlier one.
        nearest_similarity: cosine of an image's thumbnail with the most similar other one, median.
        texture_agreement: see the function of this name, in [0, 1].
        device: cuda, mps or cpu.
        num_cores: of the CPU.
        free_memory: bytes, of the device.
        minutes: training time the user asked for; 0 if none.
        method: method the user asked for; "" if none.
        images_per_second: training speed of the recommended method; 0 before `measure_speed`.
        peak_memory: bytes during `measure_speed`.
    """

    data: str
    num_train: int
    num_test: int
    num_unreadable: int
    num_classes: int
    min_side: int
    p5_side: int
    median_side: int
    aspect_ratio: float
    sample_size: int
    gray_fraction: float
    duplicate_fraction: float
    nearest_similarity: float
    texture_agreement: float
    device: str
    num_cores: int
    free_memory: int
    minutes: float = 0.0
    method: str = ""
    images_per_second: float = 0.0
    peak_memory: int = 0

    @property
    def num_distinct(self) -> int:
        """Estimated number of training images that are not near-duplicates of an earlier one."""
        return round(self.num_train * (1 - self.duplicate_fraction))

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.startswith("cuda")


def compute_dataset_stats(data: str, device: torch.device, minutes: float = 0.0, method: str = "") -> DatasetStats:
    """Measure a folder of images and the machine.

    Args:
        data: folder:DIR.
        device: to train on.
        minutes: training time the user asked for; 0 if none.
        method: method the user asked for; "" if none.

    Raises:
        InputError: if `data` is not a folder, or the folder holds no readable image.
    """
    root = folder_path(data)
    files = {split: folder.list_files(root, split) for split in ("train", "test")}
    sizes = {split: _image_sizes(files[split]) for split in files}
    train_files = list(sizes["train"])
    if not train_files:
        raise InputError(f"None of the {len(files['train'])} files in {root} is a readable image; give another folder.")
    sides = sorted(min(size) for split_sizes in sizes.values() for size in split_sizes.values())
    runs = torch.arange(len(train_files)).split(RUN_LENGTH)
    indices = torch.cat(runs[:: max(1, -(-len(runs) * RUN_LENGTH // SAMPLE_SIZE))])
    _, images = folder.decode_all([train_files[i] for i in indices], root, SAMPLE_PIXELS, len(indices))
    duplicate_fraction, nearest_similarity = near_duplicate_stats(images)
    return DatasetStats(
        data=data,
        num_train=len(train_files),
        num_test=len(sizes["test"]),
        num_unreadable=sum(len(files[split]) - len(sizes[split]) for split in files),
        num_classes=len(folder.read_labels(train_files, root, "train")[1]),
        min_side=sides[0],
        p5_side=sides[len(sides) // 20],
        median_side=median_low(sides),
        aspect_ratio=median(max(size) / min(size) for size in sizes["train"].values()),
        sample_size=len(images),
        gray_fraction=gray_fraction(images),
        duplicate_fraction=duplicate_fraction,
        nearest_similarity=nearest_similarity,
        texture_agreement=texture_agreement(images),
        device=str(device),
        num_cores=os.cpu_count() or 1,
        free_memory=_free_memory(device),
        minutes=minutes,
        method=method,
    )


def _free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or in the machine's memory."""
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free


def load_sample(data: str, split: str, n: int, size: int) -> tuple[list[Path], Images]:
    """Load at most n images of a folder's split, evenly spaced in the order of file names.

    Args:
        data: folder:DIR.
        split: "train" or "test".
        n: maximum number of images; unreadable files are left out.
        size: pixels a side; the center square is kept.

    Returns:
        The m files, and their images (m, 3, size, size) with labels.

    Raises:
        InputError: if `data` is not a folder, or no file is a readable image.
    """
    root = folder_path(data)
    files = folder.list_files(root, split)
    if n < len(files):
        files = [files[i * len(files) // n] for i in range(n)]
    files, images = folder.decode_all(files, root, size, len(files))
    return files, Images(images, *folder.read_labels(files, root, split))


def folder_path(data: str) -> Path:
    """Return DIR of folder:DIR. Raises InputError for any other data set."""
    if not data.startswith("folder:"):
        raise InputError(f"Recommendations need a folder of images, not {data!r}; if it is one, give folder:{data}.")
    return Path(data.removeprefix("folder:")).expanduser()


def _image_sizes(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Read width and height in pixels of the files that are images, from their headers."""

    def read_size(file: Path) -> tuple[int, int] | None:
        try:
            with Image.open(file) as image:
                return None if image.mode in UNSCALED else image.size
        except UNREADABLE:
            return None

    with ThreadPoolExecutor() as pool:
        return {file: size for file, size in zip(files, pool.map(read_size, files)) if size}


def gray_fraction(images: Tensor) -> float:
    """Return the fraction of images whose three channels differ by less than 3 of 255 levels on average."""
    color_range = (images.amax(dim=1) - images.amin(dim=1)).float().mean(dim=(1, 2))  # (N,)
    return float((color_range < 3).float().mean())


def duplicate_descriptors(images: Tensor) -> Tensor:
    """Compute descriptors (N, 385) that near-duplicates share: a thumbnail, and 1 for an image of a single color."""
    uniform = (images.float().std(dim=(2, 3)).amax(dim=1) < 1)[:, None].float()  # (N, 1); less than 1 of 255 levels
    return torch.cat([thumbnail_descriptors(images) * (1 - uniform), uniform], dim=-1)


def near_duplicate_stats(images: Tensor) -> tuple[float, float]:
    """Return the fraction of near-duplicates, and the median cosine of an image with the most similar other one.

    Both are 0 for a single image.
    """
    if len(images) < 2:
        return 0.0, 0.0
    descriptors = duplicate_descriptors(images)
    cosines, _ = nearest_neighbors(descriptors, descriptors, 2)
    is_duplicate = find_near_duplicates(descriptors, DUPLICATE_THRESHOLD) != torch.arange(len(images))
    return float(is_duplicate.float().mean()), float(cosines[:, 1].median())


def texture_agreement(images: Tensor) -> float:
    """Measure how similar the quarters of an image are to each other, relative to the quarters of other images.

    This is the intraclass correlation ICC(1) of 12 statistics of a quarter (the mean, standard deviation and mean
    gradient magnitudes of each channel), averaged and clamped to [0, 1]. It is 1 for gratings, 0.5 for CIFAR-10's
    photographs and 0.3 for scenes with one object. A high value means that a crop shows the whole.
    """
    if len(images) < 2:
        return 0.0
    half = images.shape[-1] // 2
    quarters = images.float().unfold(2, half, half).unfold(3, half, half).flatten(2, 3) / 255  # (N, 3, 4, h, h)
    statistics = [quarters.mean(dim=(-2, -1)), quarters.std(dim=(-2, -1))]
    statistics += [quarters.diff(dim=dim).abs().mean(dim=(-2, -1)) for dim in (-2, -1)]
    values = torch.cat(statistics, dim=1)  # (N, 12, 4)
    between, within = 4 * values.mean(dim=-1).var(dim=0), values.var(dim=-1).mean(dim=0)  # (12,)
    varies = between + 3 * within > 1e-9  # the gradient along stripes, for example, is constant
    icc = (between - within)[varies] / (between + 3 * within)[varies]
    return float(icc.mean().clamp(0, 1)) if len(icc) else 0.0


def measure_speed(stats: DatasetStats, method: Method, image_size: int, config: TrainConfig) -> DatasetStats:
    """Measure speed and memory of a few training steps on random images.

    Args:
        stats: of the folder.
        method: on its device; it is not changed.
        image_size: pixels a side of the images before cropping.
        config: of the training.

    Returns:
        The statistics with `images_per_second` and `peak_memory`.
    """
    device = next(method.parameters()).device
    config = replace(config, precision=choose_precision(config.precision, device))
    shape = (config.batch_size, 3, image_size, image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    plan = trainer.plan(method, Images(images), config)
    return replace(stats, images_per_second=config.batch_size / plan.seconds_per_step, peak_memory=plan.memory)
