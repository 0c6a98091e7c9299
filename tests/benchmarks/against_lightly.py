"""SimCLR on a folder of small photographs by lightly's own recipe for CIFAR-10, with our encoder, measured as ours are.

lightly's documented benchmark: its transform on PIL images in a DataLoader, half the colour jitter and no blur, SGD at
6e-2 per 128 images with momentum and a cosine, temperature 0.5. For the same minutes of ours:

    python -m tests.benchmarks.against_lightly --folder FOLDER --minutes 15
    python -m minissl train simclr --data folder:FOLDER --encoder.name cnn --minutes 15 --out runs/simclr
"""

import argparse
import math
import time
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from minissl.data import load
from minissl.encoders import make_encoder
from minissl.scores import watch


def steps_of(loader: DataLoader, seconds: float):
    """(progress, views) until the time is up."""
    start = time.monotonic()
    while True:
        for views, _ in loader:
            progress = (time.monotonic() - start) / seconds
            if progress >= 1:
                return
            yield progress, views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with train and test folders of class folders")
    parser.add_argument("--encoder", default="cnn")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    data = ImageFolder(options.folder / "train", transform)
    loader = DataLoader(data, options.batch_size, shuffle=True, drop_last=True, num_workers=options.workers)
    encoder = make_encoder(options.encoder, 8, 32, stem="conv", init_std=0.088)
    head, criterion = SimCLRProjectionHead(encoder.dim, encoder.dim, 128), NTXentLoss(temperature=0.5)
    peak = 6e-2 * options.batch_size / 128
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, weight_decay=5e-4)
    seen = 0
    for progress, (a, b) in steps_of(loader, 60 * options.minutes):
        optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * progress))
        loss = criterion(head(encoder(a).cls), head(encoder(b).cls))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(a)
    train, test = (load(f"folder:{options.folder}", split, 32) for split in ("train", "test"))
    found = watch(encoder.eval(), train.some(20_000), test.some(5_000), 32)
    print(f"lightly's recipe: {seen} images in {options.minutes:g} minutes, loss {float(loss.detach()):.3f}, {found}")


if __name__ == "__main__":
    main()
