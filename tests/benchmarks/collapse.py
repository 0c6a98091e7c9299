"""The collapse lab on record: all sixteen cells from one seed, the four main ones from five.

    python -m tests.benchmarks.collapse [--steps 160] [--out data/recorded/collapse.jsonl]

What is there is not run again. A quarter of an hour on one core.
"""

import argparse
import itertools
from pathlib import Path

import torch

from minissl import lab
from minissl.data import load


def cells() -> list[tuple[tuple[str, ...], int]]:
    """What is left out, and the seed."""
    every = [left for n in range(5) for left in itertools.combinations(lab.PIECES, n)]
    return [(left, seed) for seed in range(5) for left in (every if seed == 0 else lab.MAIN)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--out", type=Path, default=Path("data/recorded/collapse.jsonl"))
    asked = parser.parse_args()
    data, images = load("scenes:place", "train", 64), load("scenes:place", "test", 64).some(500)
    done = {(cell.without, cell.seed): cell for cell in lab.load(asked.out)}
    for left, seed in cells():
        if (left, seed) not in done:
            done[left, seed] = lab.run(data, images, left, asked.steps, seed)
            lab.save(done.values(), asked.out)
            print(f"without {', '.join(left) or 'nothing'}, seed {seed}: {done[left, seed].verdict}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
