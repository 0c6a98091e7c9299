"""Difficulty of Scenes: baselines without learning fail, and a small network learns the labels in minutes.

The baselines are k-NN on raw pixels, on color histograms and on features of random-init encoders. A small CNN is
trained with labels: on the object for one minute, and on all four factors for longer. `make calibration` prints the
table.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.synthetic.scenes import FACTORS, Scenes
from minissl.data.transforms.functional import normalize, random_horizontal_flip, random_resized_crop
from minissl.evaluation import accuracy, extract_features, knn
from minissl.methods.base import Batch, Method
from minissl.models.convnets import SmallCNN
from minissl.models.outputs import Encoder
from minissl.models.vit import vit
from minissl.training.config import TrainConfig
from minissl.training.sampler import iterate_batches, seed_step
from minissl.training.trainer import create_optimizer, training_step

SIZE = 32  # side in pixels of the encoders' input, as in the course


def downsample(images: Tensor) -> Tensor:
    """Resize uint8 images (N, 3, S, S) to float (N, 3, 32, 32) in [0, 1]."""
    return F.interpolate(images.float() / 255, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def pixel_features(images: Tensor) -> Tensor:
    """Return pixels (N, 3072), minus their mean over the data set."""
    flat = downsample(images).flatten(1)
    return flat - flat.mean(dim=0)


def color_histograms(images: Tensor) -> Tensor:
    """Return the square roots (Hellinger) of histograms (N, 64) of 4 x 4 x 4 colors."""
    bins = (images.long() // 64).flatten(2)  # (N, 3, S * S)
    index = bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]
    return torch.zeros(len(images), 64).scatter_add_(1, index, torch.ones(index.shape)).div(index.shape[1]).sqrt()


class SupervisedCNN(Method):
    """A linear classifier for each of some factors on one small CNN."""

    def __init__(self, factors: Sequence[str]):
        super().__init__()
        self.encoder: Encoder = SmallCNN()
        self.heads = nn.ModuleDict({name: nn.Linear(self.encoder.embed_dim, len(FACTORS[name])) for name in factors})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(normalize(images)).cls
        return {name: head(features) for name, head in self.heads.items()}

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        logits = self(random_horizontal_flip(random_resized_crop(batch.images, SIZE, (0.7, 1.0))))
        return {"loss": sum(F.cross_entropy(logits[name], batch.factors[name]) for name in logits)}


def supervised_accuracy(
    seconds: float, factors: Sequence[str], train_set: Scenes, test_set: Scenes, seed: int
) -> dict[str, float]:
    """Train for so many seconds, and return the test accuracy of each factor in %."""
    torch.manual_seed(seed)
    model = SupervisedCNN(factors)
    config = TrainConfig(batch_size=64, lr=3e-3, final_weight_decay=0.04, clip_grad=0.0, precision="fp32", seed=seed)
    optimizer, start = create_optimizer(model, config), time.monotonic()
    for step, batch in enumerate(iterate_batches(train_set, config.batch_size, seed)):
        progress = (time.monotonic() - start) / seconds
        if progress >= 1:
            break
        seed_step(seed, step)
        training_step(model, optimizer, batch, progress, config)
    with torch.no_grad():
        logits = model.eval()(downsample(test_set.images))
    return {name: accuracy_percent(logits[name].argmax(1), test_set.factors[name].labels) for name in factors}


def accuracy_percent(predictions: Tensor, labels: Tensor) -> float:
    return 100 * accuracy(predictions, labels)


def calibrate(seed: int, minutes: float) -> dict[str, float]:
    """Return every number of the table, in %, for one seed of the scenes and the networks."""
    train_set, test_set = Scenes("train", seed=seed), Scenes("test", seed=seed)
    torch.manual_seed(seed)
    encoders = {
        "random-init ViT": vit("nano", 8, SIZE, stem="conv", init_std=0.088),
        "random-init small CNN": SmallCNN(),
    }
    features: dict[str, Callable[[Tensor], Tensor]] = {
        "raw pixels": pixel_features,
        "color histograms": color_histograms,
    }
    features |= {name: partial(extract_features, encoder, image_size=SIZE) for name, encoder in encoders.items()}
    results = {}
    for name, function in features.items():
        predictions = knn(function(train_set.images), train_set.labels, function(test_set.images))
        results[f"k-NN, {name}: object"] = accuracy_percent(predictions, test_set.labels)
    data = train_set, test_set, seed
    results["small CNN, 1 minute: object"] = supervised_accuracy(60, ["object"], *data)["object"]
    all_factors = supervised_accuracy(60 * minutes, list(FACTORS), *data)
    return results | {f"small CNN, {minutes:g} minutes, all four: {name}": x for name, x in all_factors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training on all four factors")
    options = parser.parse_args()
    results = [calibrate(seed, options.minutes) for seed in range(options.seeds)]
    print(
        f"| accuracy in %, {options.seeds} seeds, {torch.get_num_threads()} threads | mean | standard deviation (n) |"
    )
    print("|---|---|---|")
    for name in results[0]:
        values = [by_name[name] for by_name in results]
        print(f"| {name} | {statistics.mean(values):.1f} | {statistics.pstdev(values):.1f} |")


if __name__ == "__main__":
    main()
