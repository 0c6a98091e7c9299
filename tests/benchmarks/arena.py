"""The same encoder, data and minutes: which task teaches what? `make arena` runs it and prints the table.

Every method trains with its preset for a CPU, from three seeds, and all are measured alike: what is read of an image
is its class token and the mean of its patches, because some tasks train only the one, some only the other. The numbers
are written after each run, and what is there is not run again: the arena goes on where it was stopped.

    python -m tests.benchmarks.arena [--minutes 3] [--seeds 0 1 2] [--out runs/arena.json]
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from minissl import checkpoint, runs, scores, train
from minissl.__main__ import parse_run

ROWS = {
    "untrained": "transfer",
    "rotation": "pretext --task rotation",
    "colorization": "pretext --task colorization",
    "inpainting": "pretext --task mae --ratio 0.5",
    "simclr": "simclr",
    "supervised": "transfer",
}
KEPT = ("knn", "linear_object", "linear_color", "linear_action", "linear_place", "few_10", "rank_me")


def compete(name: str, seed: int, minutes: float) -> dict[str, float]:
    """Train one method from one seed, and measure its encoder."""
    run, _ = parse_run([*ROWS[name].split(), "--device", "cpu", "--seed", str(seed), "--minutes", str(minutes)])
    data, method = run.images("train"), run.build()
    if name != "untrained":
        runs.prepare(method, data)
        config = train.TrainConfig(**run.loop)
        config = replace(config, precision=train.choose_precision(config.precision, torch.device("cpu")))
        train.learn(method, data, config, train.plan(method, data, config).steps)
    found = scores.score(method.encoder.eval(), data, run.images("test"), run.size, pool="both")
    return {key: found[key] for key in KEPT}


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Mean and deviation over the seeds, in % but for RankMe."""
    lines = [f"| |{' | '.join(KEPT)} |", f"|{'---|' * (len(KEPT) + 1)}"]
    for name, by_seed in rows.items():
        cells = []
        for key in KEPT:
            values = [found[key] * (1 if key == "rank_me" else 100) for found in by_seed.values()]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/arena.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    asked = {"minutes": options.minutes, "threads": torch.get_num_threads()}
    kept = json.loads(options.out.read_text()) if options.out.exists() else asked | {"rows": {}}
    for seed in map(str, options.seeds):
        for name in ROWS:
            by_seed = kept["rows"].setdefault(name, {})
            if seed not in by_seed:
                by_seed[seed] = compete(name, int(seed), options.minutes)
                checkpoint.write_json(options.out, kept)
                print(name, seed, {key: round(value, 3) for key, value in by_seed[seed].items()}, flush=True)
    rows = {n: {key: [found[key] for found in r.values()] for key in KEPT} for n, r in kept["rows"].items()}
    seeds = sorted(map(int, kept["rows"]["untrained"]))
    checkpoint.write_json(options.out.with_name("arena_table.json"), asked | {"seeds": seeds, "rows": rows})
    print(table(kept["rows"]))


if __name__ == "__main__":
    main()
