"""Is the world hard for a shortcut and learnable in minutes? `make calibration` measures it and prints the table.

Shortcuts are k-NN on what nobody trained: raw pixels, colour histograms, random encoders. Learning is a small CNN with
labels: the kind of object within one minute, and all four factors with more time.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.augment import flip, normalize, random_resized_crop
from minissl.convnet import SmallCNN
from minissl.data import Images
from minissl.data.scenes import FACTORS, Scenes
from minissl.evaluate import extract, knn
from minissl.train import TrainConfig, batches, make_optimizer, seed_step, set_schedules
from minissl.vit import vit

SIZE = 32  # pixels the encoders see, as in the course


def small(images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 to (N, 3, 32, 32) float in [0, 1]."""
    return F.interpolate(images.float() / 255, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def raw_pixels(images: Tensor) -> Tensor:
    """(N, 3072), each image less its own mean and the set's."""
    flat = small(images).flatten(1)
    return flat - flat.mean(dim=0)


def color_histogram(images: Tensor) -> Tensor:
    """(N, 64): shares of 4 x 4 x 4 colours, square root (Hellinger)."""
    bins = (images.long() // 64).flatten(2)  # (N, 3, S * S)
    index = bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]
    return torch.zeros(len(images), 64).scatter_add_(1, index, torch.ones(index.shape)).div(index.shape[1]).sqrt()


class Supervised(nn.Module):
    """One classifier for each of the factors asked for, on one small CNN."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.encoder = SmallCNN()
        self.heads = nn.ModuleDict({name: nn.Linear(self.encoder.dim, len(FACTORS[name])) for name in names})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        vector = self.encoder(normalize(images)).cls
        return {name: head(vector) for name, head in self.heads.items()}


def accuracy_after(seconds: float, names: list[str], data: tuple[Scenes, Scenes], seed: int) -> dict[str, float]:
    """Train for so many seconds, then the share of test scenes named rightly."""
    torch.manual_seed(seed)
    model, config = Supervised(names), TrainConfig(batch_size=64, lr=3e-3, final_weight_decay=0.04, seed=seed)
    optimizer, start = make_optimizer(model, config), time.monotonic()
    numbered = Images(data[0].images, torch.arange(len(data[0])))  # a label is a row of the factors
    for step, batch in enumerate(batches(numbered, config.batch_size, seed)):
        progress = (time.monotonic() - start) / seconds
        if progress >= 1:
            break
        seed_step(seed, step)
        set_schedules(optimizer, config, progress)
        found = model(flip(random_resized_crop(batch.images, SIZE, (0.7, 1.0))))
        loss = sum(F.cross_entropy(found[name], data[0].factors[name][batch.labels]) for name in names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(small(data[1].images))
    return {name: 100 * float((found[name].argmax(1) == data[1].factors[name]).float().mean()) for name in names}


def calibrate(seed: int, minutes: float) -> dict[str, float]:
    """Every number of the table for one seed of the world and of the networks."""
    data = (Scenes("train", seed=seed), Scenes("test", seed=seed))
    torch.manual_seed(seed)
    encoders = {
        "random ViT": vit("nano", 8, SIZE, stem="conv", init_std=0.088),
        "random small CNN": SmallCNN(),
    }
    looks = {"raw pixels": raw_pixels, "colour histogram": color_histogram}
    looks |= {name: lambda images, e=encoder: extract(e, images, SIZE) for name, encoder in encoders.items()}
    out = {}
    for name, look in looks.items():
        found = knn(look(data[0].images), data[0].labels, look(data[1].images))
        out[f"k-NN, {name}: object"] = 100 * float((found == data[1].labels).float().mean())
    out["small CNN, 1 minute: object"] = accuracy_after(60, ["object"], data, seed)["object"]
    found = accuracy_after(60 * minutes, list(FACTORS), data, seed)
    return out | {f"small CNN, {minutes:g} minutes, all at once: {name}": value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0)
    options = parser.parse_args()
    runs = [calibrate(seed, options.minutes) for seed in range(options.seeds)]
    print(f"| {options.seeds} seeds, {torch.get_num_threads()} threads | mean (%) | deviation |\n|---|---|---|")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"| {name} | {statistics.mean(values):.1f} | {statistics.pstdev(values):.1f} |")


if __name__ == "__main__":
    main()
