"""Record the collapse lab: all sixteen combinations of removed components with one seed, the four main ones with five.

    python -m tests.benchmarks.collapse [--steps 120] [--out data/recorded/collapse.jsonl]

An existing experiment is not run again. All take a quarter of an hour on one core.
"""

import argparse
import itertools
from pathlib import Path

import torch

from minissl.data import load_dataset
from minissl.notebook import collapse_lab


def experiments() -> list[tuple[tuple[str, ...], int]]:
    """Return the removed components and the seed of every experiment."""
    combinations = [removed for n in range(5) for removed in itertools.combinations(collapse_lab.COMPONENTS, n)]
    return [
        (removed, seed) for seed in range(5) for removed in (combinations if seed == 0 else collapse_lab.MAIN_ABLATIONS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("data/recorded/collapse.jsonl"))
    options = parser.parse_args()
    train_set = load_dataset("scenes:place", "train", 64)
    test_set = load_dataset("scenes:place", "test", 64).subsample(500)
    runs = {(run.removed, run.seed): run for run in collapse_lab.load_runs(options.out)}
    for removed, seed in experiments():
        if (removed, seed) not in runs:
            run = collapse_lab.run_experiment(train_set, test_set, removed, options.steps, seed)
            runs[removed, seed] = run
            collapse_lab.save_runs(runs.values(), options.out)
            print(f"without {', '.join(removed) or 'nothing'}, seed {seed}: collapse {run.collapse_type}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
