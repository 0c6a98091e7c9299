"""DINO's views a second and core: ours, a batch at a time, against torchvision's, an image at a time.

Two global crops of 32 pixels and four local ones of 16 from images of 32, uint8 in and normalised floats out, one
thread each. Both start from pixels in memory: a tensor for us, PIL images for torchvision, whose blur gets the smallest
kernel and whose views are not even put into a batch. They take turns, slice by slice, and time is the processor's, so
that what else the machine does weighs little and on both alike.

    python -m tests.benchmarks.views [--folder FOLDER] [--images 10000]
"""

import argparse
import time
from collections.abc import Callable

import torch
import torchvision.transforms.v2 as tv
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from minissl.augment import MEAN, STD
from minissl.data import Scenes, load
from minissl.views import multi_crop

GLOBAL, LOCAL, LOCALS, BATCH = 32, 16, 4, 128
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)


def ours(images: Tensor) -> None:
    """Views of uint8 images (N, 3, H, W), in batches."""
    for batch in images.split(BATCH):
        multi_crop(batch, GLOBAL, LOCAL, LOCALS, GLOBAL_SCALE, LOCAL_SCALE)


def recipe(size: int, scale: tuple[float, float], blur: float, solar: float, of: int = GLOBAL) -> Callable:
    """One view by torchvision: PIL image -> (3, size, size) float; `of` is the size of a large one, for the blur."""
    kernel = tv.GaussianBlur(of // 10 | 1, (0.1, 2.0 * of / 224))  # the smallest that is a blur
    return tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=scale, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            tv.RandomGrayscale(0.2),
            tv.RandomApply([kernel], p=blur),
            tv.RandomSolarize(128, p=solar),
            tv.ToImage(),
            tv.ToDtype(torch.float32, scale=True),
            tv.Normalize(MEAN, STD),
        ]
    )


class SixViews:
    """The same views of one PIL image, by torchvision."""

    def __init__(self, size: int = GLOBAL, local: int = LOCAL, locals: int = LOCALS):
        first, second = recipe(size, GLOBAL_SCALE, 1.0, 0.0, size), recipe(size, GLOBAL_SCALE, 0.1, 0.2, size)
        self.views = [first, second, *[recipe(local, LOCAL_SCALE, 0.5, 0.0, size)] * locals]

    def __call__(self, picture) -> list[Tensor]:
        return [view(picture) for view in self.views]


def seconds(function: Callable, argument: Tensor | list) -> float:
    """Of the processor."""
    start = time.process_time()
    function(argument)
    return time.process_time() - start


def compare(images: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """Images a second of ours and of torchvision's, (slices,) each, in turns; the first images warm both up."""
    six = SixViews()

    def torchvisions(pictures: list) -> None:
        for picture in pictures:
            six(picture)

    ours(images[:BATCH]), torchvisions([to_pil_image(image) for image in images[:8]])
    found = []
    for part in images.chunk(slices):
        pictures = [to_pil_image(image) for image in part]
        found.append((len(part) / seconds(ours, part), len(part) / seconds(torchvisions, pictures)))
    return torch.tensor(found).unbind(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="of images; scenes are drawn if none is given")
    parser.add_argument("--images", type=int, default=10_000, help="at most so many")
    options = parser.parse_args()
    n = options.images
    images = load(f"folder:{options.folder}", "train", 32) if options.folder else Scenes("train", 32, n=n)
    images = images.images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fast, slow = compare(images, slices=max(1, len(images) // 512))
    ratio = fast / slow
    low, middle, high = ratio.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"{len(images)} images in {len(ratio)} slices, one thread, images a second of processor time (median):")
    print(f"  minissl      {fast.median():8.0f}")
    print(f"  torchvision  {slow.median():8.0f}")
    print(f"  ratio        {middle:8.1f}   (80 % of the slices between {low:.1f} and {high:.1f})")


if __name__ == "__main__":
    main()
