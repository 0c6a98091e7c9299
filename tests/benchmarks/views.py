"""Speed of DINO's augmented views, per second and core: minissl by batches, torchvision image by image.

Two global crops of 32 pixels and four local crops of 16 are made from images of 32 pixels, with one thread each. Input
is uint8, output normalized float. Both start from pixels in memory: a tensor for minissl, PIL images for torchvision,
whose blur has the smallest kernel and whose views are not collated. They take turns, slice by slice, and CPU time is
measured, so that other processes affect both alike.

    python -m tests.benchmarks.views [--folder FOLDER] [--images 10000]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision.transforms.v2 as tv
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from minissl.data import Scenes, load_dataset
from minissl.data.transforms.functional import IMAGENET_MEAN, IMAGENET_STD
from minissl.data.transforms.multi_view import multi_crop

CROP_SIZE, LOCAL_CROP_SIZE, NUM_LOCAL_CROPS, BATCH_SIZE = 32, 16, 4, 128
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)


def minissl_views(images: Tensor) -> None:
    """Make the views of uint8 images (N, 3, H, W), in batches."""
    for batch in images.split(BATCH_SIZE):
        multi_crop(batch, CROP_SIZE, LOCAL_CROP_SIZE, NUM_LOCAL_CROPS, GLOBAL_SCALE, LOCAL_SCALE)


def recipe(
    size: int, scale: tuple[float, float], blur_prob: float, solarize_prob: float, global_crop_size: int = CROP_SIZE
) -> Callable[[Any], Tensor]:
    """Return torchvision's transform of a PIL image to one view (3, size, size); blur depends on the global size."""
    blur = tv.GaussianBlur(global_crop_size // 10 | 1, (0.1, 2.0 * global_crop_size / 224))  # the smallest kernel
    return tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=scale, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            tv.RandomGrayscale(0.2),
            tv.RandomApply([blur], p=blur_prob),
            tv.RandomSolarize(128, p=solarize_prob),
            tv.ToImage(),
            tv.ToDtype(torch.float32, scale=True),
            tv.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class TorchvisionMultiCrop:
    """The same views of one PIL image, by torchvision."""

    def __init__(
        self, size: int = CROP_SIZE, local_size: int = LOCAL_CROP_SIZE, num_local_crops: int = NUM_LOCAL_CROPS
    ):
        local = recipe(local_size, LOCAL_SCALE, 0.5, 0.0, size)
        global_crops = [recipe(size, GLOBAL_SCALE, 1.0, 0.0, size), recipe(size, GLOBAL_SCALE, 0.1, 0.2, size)]
        self.recipes = [*global_crops, *[local] * num_local_crops]

    def __call__(self, image: Any) -> list[Tensor]:
        return [transform(image) for transform in self.recipes]


def cpu_seconds(function: Callable[[Any], None], argument: Any) -> float:
    """Measure the CPU time of a call."""
    start = time.process_time()
    function(argument)
    return time.process_time() - start


def compare(images: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """Return images per second of minissl and of torchvision, (slices,) each. The first images warm both up."""
    transform = TorchvisionMultiCrop()

    def torchvision_views(pil_images: list[Any]) -> None:
        for image in pil_images:
            transform(image)

    minissl_views(images[:BATCH_SIZE])
    torchvision_views([to_pil_image(image) for image in images[:8]])
    rates = []
    for part in images.chunk(slices):
        pil_images = [to_pil_image(image) for image in part]
        seconds = cpu_seconds(minissl_views, part), cpu_seconds(torchvision_views, pil_images)
        rates.append([len(part) / s for s in seconds])
    return torch.tensor(rates).unbind(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="of images (default: Scenes)")
    parser.add_argument("--images", type=int, default=10_000, help="at most so many")
    options = parser.parse_args()
    n = options.images
    dataset = load_dataset(f"folder:{options.folder}", "train", 32) if options.folder else Scenes("train", 32, n=n)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    images = dataset.subset(order[:n]).images
    torch.set_num_threads(1)
    torch.manual_seed(0)
    own_rate, torchvision_rate = compare(images, slices=max(1, len(images) // 512))
    ratio = own_rate / torchvision_rate
    low, middle, high = ratio.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"{len(images)} images in {len(ratio)} slices, one thread, images per second of CPU time (median):")
    print(f"  minissl      {own_rate.median():8.0f}")
    print(f"  torchvision  {torchvision_rate.median():8.0f}")
    print(f"  ratio        {middle:8.1f}   (80 % of the slices between {low:.1f} and {high:.1f})")


if __name__ == "__main__":
    main()
