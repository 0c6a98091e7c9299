"""A look at a folder of pictures, and at the machine, before anything is trained: the facts that advice rests on.

All pictures are counted, and their sizes read from their headers; how grey they are, how much they repeat each other
and how much a part shows of the whole is measured on a thousand. How fast a step goes is tried. No labels are needed.

Shapes: N pictures (N, 3, S, S) uint8.
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
from torch import Tensor, nn

from minissl import train
from minissl.data import Images, folder
from minissl.data.curation import copies, nearest, thumbnails
from minissl.data.images import UNREADABLE, UNSCALED
from minissl.errors import InputError
from minissl.machine import choose_precision

LOOK, RUN = 1000, 10  # pictures that are looked at, in runs of neighbours: copies often lie side by side
SIDE = 64  # pixels they are looked at
COPY = 0.95  # cosine of two thumbnails of near-copies; precision 0.92, recall 0.62 among scenes that were copied


@dataclass(frozen=True)
class Facts:
    """What was measured of a folder and of the machine, and what was asked for.

    Attributes:
        data: the folder, as folder:DIR.
        train, test: pictures to learn from, and those that are kept back.
        broken: files that cannot be read.
        classes: class folders; 0 where there are no labels.
        smallest, low, middle: short side in pixels of the smallest picture, of that at 5 %, of the median one.
        aspect: long side by short side, the median.
        looked: how many pictures the next ones are of.
        grey: share of pictures without colour.
        copies: share of pictures that nearly repeat an earlier one.
        alike: cosine of a picture's thumbnail with that of the most similar other, the median.
        texture: how well the quarters of a picture agree; 0: like those of any two, 1: it looks the same everywhere.
        device: cuda, mps or cpu.
        cores: of the CPU.
        free: bytes of memory, of the device.
        minutes, method: as asked for; 0 and "" where that is left open.
        rate: images a second of the method that is advised; 0 before it was tried.
        took: bytes of memory while it was tried.
    """

    data: str
    train: int
    test: int
    broken: int
    classes: int
    smallest: int
    low: int
    middle: int
    aspect: float
    looked: int
    grey: float
    copies: float
    alike: float
    texture: float
    device: str
    cores: int
    free: int
    minutes: float = 0.0
    method: str = ""
    rate: float = 0.0
    took: int = 0

    @property
    def different(self) -> int:
        """Pictures to learn from that repeat no other, as far as those that were looked at tell."""
        return round(self.train * (1 - self.copies))

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")


def look(data: str, device: torch.device, minutes: float = 0.0, method: str = "") -> Facts:
    """Measure a folder, folder:DIR, and the machine.

    Raises:
        InputError: if it is no folder, or holds no picture that can be read.
    """
    root = folder_of(data)
    listed = {split: folder.list_files(root, split) for split in ("train", "test")}
    sizes = {split: _sizes(files) for split, files in listed.items()}
    files = list(sizes["train"])
    if not files:
        raise InputError(f"None of the {len(listed['train'])} files in {root} is an image that can be read.")
    shorts = sorted(min(size) for part in sizes.values() for size in part.values())
    runs = torch.arange(len(files)).split(RUN)
    rows = torch.cat(runs[:: max(1, -(-len(runs) * RUN // LOOK))])
    _, images = folder.decode_all([files[row] for row in rows], root, SIDE, len(rows))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return Facts(
        data, len(files), len(sizes["test"]), sum(len(listed[s]) - len(sizes[s]) for s in listed),
        len(folder.read_labels(files, root, "train")[1]), shorts[0], shorts[len(shorts) // 20], median_low(shorts),
        median(max(size) / min(size) for size in sizes["train"].values()), len(images),
        grey_share(images), *likeness(images), texture(images), str(device), os.cpu_count() or 1, free, minutes, method,
    )  # fmt: skip


def some(data: str, split: str, n: int, size: int) -> tuple[list[Path], Images]:
    """At most n pictures of a folder's split, evenly spaced in the order of names: their files, and they, (n, 3, S, S).

    Args:
        data: folder:DIR.
        split: "train" or "test".
        n: how many; what cannot be read is left out.
        size: pixels a side to keep, the middle square.
    """
    root = folder_of(data)
    listed = folder.list_files(root, split)
    files = [listed[i * len(listed) // n] for i in range(n)] if n < len(listed) else listed
    files, images = folder.decode_all(files, root, size, len(files))
    return files, Images(images, *folder.read_labels(files, root, split))


def folder_of(data: str) -> Path:
    """DIR of folder:DIR. Raises InputError for other data."""
    if not data.startswith("folder:"):
        raise InputError(f"Advice is for folders of pictures; give folder:{data}, if that is one.")
    return Path(data.removeprefix("folder:")).expanduser()


def _sizes(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Width and height of those that are pictures, from their headers alone."""

    def size(file: Path) -> tuple[int, int] | None:
        try:
            with Image.open(file) as image:
                return None if image.mode in UNSCALED else image.size
        except UNREADABLE:
            return None

    with ThreadPoolExecutor() as pool:
        return {file: found for file, found in zip(files, pool.map(size, files)) if found}


def grey_share(images: Tensor) -> float:
    """The share of pictures whose three channels differ by less than 3 of 255 on average."""
    return float(((images.amax(dim=1) - images.amin(dim=1)).float().mean(dim=(1, 2)) < 3).float().mean())


def marks(images: Tensor) -> Tensor:
    """Vectors of near-copies, (N, 385): thumbnails, and one of their own for all plain pictures, of any colour."""
    plain = (images.float().std(dim=(2, 3)).amax(dim=1) < 1)[:, None].float()  # of 255 levels
    return torch.cat([thumbnails(images) * (1 - plain), plain], dim=-1)


def likeness(images: Tensor) -> tuple[float, float]:
    """The share of near-copies, and how alike a picture and the most similar other are, the median; 0 for a single."""
    if len(images) < 2:
        return 0.0, 0.0
    vectors = marks(images)
    cosines, _ = nearest(vectors, vectors, 2)
    again = copies(vectors, COPY) != torch.arange(len(images))
    return float(again.float().mean()), float(cosines[:, 1].median())


def texture(images: Tensor) -> float:
    """How well the quarters of a picture agree in colour, contrast and sharpness, beside those of other pictures.

    The intraclass correlation, ICC(1), of twelve simple measures of a quarter, their mean: 1 for gratings, 0.5 for
    CIFAR-10's photographs, 0.3 for our scenes, which have one object.
    """
    if len(images) < 2:
        return 0.0
    half = images.shape[-1] // 2
    quarters = images.float().unfold(2, half, half).unfold(3, half, half).flatten(2, 3) / 255  # (N, 3, 4, h, h)
    measures = [quarters.mean(dim=(-2, -1)), quarters.std(dim=(-2, -1))]
    measures += [quarters.diff(dim=dim).abs().mean(dim=(-2, -1)) for dim in (-2, -1)]
    found = torch.cat(measures, dim=1)  # (N, 12, 4)
    between, within = 4 * found.mean(dim=-1).var(dim=0), found.var(dim=-1).mean(dim=0)  # (12,)
    varies = between + 3 * within > 1e-9  # sharpness across stripes does, along them it does not
    agree = (between - within)[varies] / (between + 3 * within)[varies]
    return float(agree.mean().clamp(0, 1)) if len(agree) else 0.0


def try_out(facts: Facts, method: nn.Module, image_size: int, config: train.TrainConfig) -> Facts:
    """Measure a few steps of a method, on noise of the pictures' size: how fast they go, and what memory they take.

    Args:
        facts: of the folder.
        method: on its device; it is not changed.
        image_size: pixels a side.
        config: of its training.
    """
    device = next(method.parameters()).device
    config = replace(config, precision=choose_precision(config.precision, device))
    noise = torch.randint(256, (config.batch_size, 3, image_size, image_size), dtype=torch.uint8, device=device)
    plan = train.plan(method, Images(noise), config)
    return replace(facts, rate=config.batch_size / plan.seconds_per_step, took=plan.memory)
