"""Compare encoders: class token, patch features at several resolutions, and inference time.

    python -m tests.benchmarks.family ENCODER ... [--sizes 64 128] [--out runs/family.json]

An encoder is a run's directory, an exported file, or a name such as scenes/dino. An existing result is not computed
again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from minissl.hub.pretrained import load_encoder
from minissl.models.outputs import Encoder
from minissl.training import checkpoint
from tests.benchmarks.decay import PatchEvaluator


@torch.no_grad()
def seconds_per_image(encoder: Encoder, size: int, n: int = 20) -> float:
    """Measure the CPU time of one image at a time, after two to warm up."""
    image = torch.zeros(1, 3, size, size)
    for _ in range(2):
        encoder(image)
    start = time.process_time()
    for _ in range(n):
        encoder(image)
    return (time.process_time() - start) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoders", nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="image sizes for patch features")
    parser.add_argument("--trained", type=int, default=32, help="image size for the class token, as in training")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--out", type=Path, default=Path("runs/family.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for size in options.sizes:
        missing = [name for name in options.encoders if str(size) not in results.get(name, {}).get("sizes", {})]
        evaluator = PatchEvaluator(options.split, size) if missing else None
        for name in missing:
            encoder = load_encoder(name)
            num_parameters = sum(p.numel() for p in encoder.parameters())
            row = results.setdefault(name, {"parameters": num_parameters, "sizes": {}})
            metrics = evaluator(encoder, options.trained) | {"seconds": seconds_per_image(encoder, size)}
            row["sizes"][str(size)] = metrics
            checkpoint.write_json(options.out, results)
            print(name, size, metrics, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
