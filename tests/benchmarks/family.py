"""Encoders side by side: what the class token and the patches are worth at several resolutions, and what they cost.

    python -m tests.benchmarks.family ENCODER ... [--sizes 64 128] [--out runs/family.json]

An encoder is a run's folder, an exported file, or a name as in scenes/dino. What is there is not measured again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from minissl import checkpoint, pretrained
from tests.benchmarks.decay import Ruler


@torch.no_grad()
def seconds_an_image(encoder: torch.nn.Module, size: int, n: int = 20) -> float:
    """Of the CPU, of one image at a time, after two to warm up."""
    image = torch.zeros(1, 3, size, size)
    for i in range(n + 2):
        if i == 2:
            start = time.process_time()
        encoder(image)
    return (time.process_time() - start) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoders", nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--trained", type=int, default=32, help="pixels at which class tokens are compared")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--out", type=Path, default=Path("runs/family.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    for size in asked.sizes:
        missing = [name for name in asked.encoders if str(size) not in done.get(name, {}).get("sizes", {})]
        ruler = Ruler(asked.split, size) if missing else None
        for name in missing:
            encoder = pretrained.load(name)
            parameters = sum(p.numel() for p in encoder.parameters())
            row = done.setdefault(name, {"parameters": parameters, "sizes": {}})
            row["sizes"][str(size)] = ruler(encoder, asked.trained) | {"seconds": seconds_an_image(encoder, size)}
            checkpoint.write_json(asked.out, done)
            print(name, size, row["sizes"][str(size)], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
