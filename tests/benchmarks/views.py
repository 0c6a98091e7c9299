"""Speed of DINO's augmented views, per second and core: minissl and kornia by batches, torchvision image by image.

Two global crops of 32 pixels and four local crops of 16 are made from images of 32 pixels, with one thread each. Input
is uint8, output normalized float. All start from pixels in memory: a tensor for minissl and kornia, PIL images for
torchvision, whose views are not collated. The blur of both others has the smallest kernel. They take turns, slice by
slice, and CPU time is measured, so that other processes affect all alike.

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


def kornia_recipe(size: int, scale: tuple[float, float], blur_prob: float, solarize_prob: float) -> torch.nn.Module:
    """Return kornia's transform of a batch (B, 3, H, W) in [0, 1] to one view (B, 3, size, size)."""
    import kornia.augmentation as K

    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=scale, resample="bicubic"),
        K.RandomHorizontalFlip(),
        K.ColorJiggle(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((3, 3), (0.1, 2.0 * CROP_SIZE / 224), p=blur_prob),
        K.RandomSolarize(0.0, 0.0, p=solarize_prob),
        K.Normalize(mean, std),
    )


class KorniaMultiCrop:
    """The same views of a batch, by kornia."""

    def __init__(self) -> None:
        local = kornia_recipe(LOCAL_CROP_SIZE, LOCAL_SCALE, 0.5, 0.0)
        global_crops = [kornia_recipe(CROP_SIZE, GLOBAL_SCALE, *probs) for probs in ((1.0, 0.0), (0.1, 0.2))]
        self.recipes = [*global_crops, *[local] * NUM_LOCAL_CROPS]

    def __call__(self, images: Tensor) -> list[Tensor]:
        return [transform(images.float() / 255) for transform in self.recipes]


def cpu_seconds(function: Callable[[Any], None], argument: Any) -> float:
    """Measure the CPU time of a call."""
    start = time.process_time()
    function(argument)
    return time.process_time() - start


def compare(images: Tensor, slices: int) -> dict[str, Tensor]:
    """Return images per second by library, (slices,) each. The first images warm all up."""
    torchvision_transform, kornia_transform = TorchvisionMultiCrop(), KorniaMultiCrop()

    def torchvision_views(pil_images: list[Any]) -> None:
        for image in pil_images:
            torchvision_transform(image)

    def kornia_views(images: Tensor) -> None:
        for batch in images.split(BATCH_SIZE):
            kornia_transform(batch)

    makers = {"minissl": minissl_views, "kornia": kornia_views, "torchvision": torchvision_views}
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for i, part in enumerate([images[:BATCH_SIZE], *images.chunk(slices)]):
        for name, make in makers.items():
            source = [to_pil_image(image) for image in part] if name == "torchvision" else part
            seconds = cpu_seconds(make, source)
            if i:
                rates[name].append(len(part) / seconds)
    return {name: torch.tensor(values) for name, values in rates.items()}


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
    rates = compare(images, slices=max(1, len(images) // 512))
    print(f"{len(images)} images, one thread, images per second of CPU time (median over slices):")
    for name, values in rates.items():
        low, middle, high = (rates["minissl"] / values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"  {name:12}{values.median():8.0f}   minissl is faster by {middle:.1f} (80 %: {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
