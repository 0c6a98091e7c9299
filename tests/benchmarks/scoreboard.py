"""Scoreboard: train every method with the same encoder, data and minutes, and evaluate all alike.

Each cell, a method and a seed, is a run in its own directory, with log and checkpoint. An interrupted cell is resumed,
an evaluated one is not run again, and several cells can run in parallel. On a CPU the budget is CPU time, because
wall-clock time also counts other processes. With --like, each cell takes as many steps as in an existing board,
whatever the speed of the machine, and is compared with it in units of that board's standard deviations.

    python -m tests.benchmarks.scoreboard [--minutes 5] [--seeds 0 1 2] [--jobs 2] [--data scenes] [--preset gpu]
    python -m tests.benchmarks.scoreboard --rows SimCLR --like data/recorded/scoreboard.json
    python -m tests.benchmarks.scoreboard --print data/recorded/scoreboard.json
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minissl.cli import parse_run
from minissl.data.images import ImageDataset
from minissl.data.synthetic.clips import Clips
from minissl.errors import InputError
from minissl.evaluation import benchmark
from minissl.hub.pretrained import save_encoder
from minissl.methods.base import ImageTextMethod, Method
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_device, choose_precision, memory_used
from minissl.training.logger import read_log
from minissl.training.plan import Plan
from minissl.training.run import RunConfig, read_run
from minissl.visualization import results_table_figure
from tests.benchmarks.decay import mean_j_and_f
from tests.benchmarks.ladder import seconds_per_step

Metrics = dict[str, Any]  # numbers by name, and some points of the loss curve
Rows = dict[str, dict[str, Metrics]]  # row -> seed -> metrics

ROWS = {  # row: arguments of `minissl train`
    "random": "transfer",
    "supervised": "transfer",
    "CLIP": "clip",
    "rotation": "rotation",
    "colorization": "colorization",
    "inpainting": "inpainting",
    "MAE": "mae --mask_ratio 0.5",
    "SimCLR": "simclr",
    "DINO": "dino",
    "DINOv2": "dinov2",
    # DINOv3's two phases in one run: the iBOT loss with a decaying rate, then the Gram loss without the iBOT loss. Its
    # preset is for the first phase, at a constant rate of 2e-3.
    "DINOv3": (
        "dinov3 --schedule_fraction 0.4 --ibot_end_fraction 0.4 --lr 1e-3 --final_lr 1e-6 --final_weight_decay 0.4"
    ),
}
ENCODER = {  # of every row, whatever its preset has
    "cpu": "--encoder.name nano --encoder.patch_size 8 --encoder.stem conv --encoder.init_std 0.088",
    "gpu": "--encoder.name small --encoder.patch_size 16",
}
GPU_OPTIONS = {"SimCLR": "--optimizer adamw --lr 5e-4 --weight_decay 0.04"}  # its preset has LARS, for ResNets
IMAGE_COLUMNS = {  # metrics of the image's feature: heading
    "knn": "k-NN, object",
    "linear": "linear, object",
    "few_shot_10": "10 labels per class",
    "linear_color": "linear, color",
    "linear_action": "linear, action",
    "linear_place": "linear, place",
    "zero_shot_object": "zero-shot, object",
    "rank_me": "RankMe",
}
OTHER_COLUMNS = {
    "knn": "k-NN",
    "linear": "linear",
    "few_shot_10": "10 labels per class",
    "rank_me": "RankMe",
}  # not Scenes
PATCH_COLUMNS = {  # metrics of attention and patch features, and the cost
    "attention_head_iou": "attention IoU",
    "miou_object": "object mIoU",
    "miou_part": "part mIoU",
    "miou_place": "place mIoU",
    "correspondence": "correspondence",
    "J&F": "J&F",
    "images_per_second": "images/s",
    "memory": "memory, GB",
}
PUBLISHED = {  # on CIFAR-10 with the authors' full budget: other networks, hundreds of epochs, hours on GPUs
    "supervised": "75.6 (ViT, UvA tutorial 15); linear 93.8 (ResNet-18, SupCon, solo-learn)",
    "SimCLR": "k-NN 84.7 (ResNet-18, 200 epochs, lightly); linear 90.7 (1,000 epochs, solo-learn)",
    "DINO": "k-NN 84.0 (ResNet-18, 200 epochs, lightly); linear 89.5 (1,000 epochs, solo-learn)",
}
LABELS = {"random": "random init"}  # of rows in tables, where they differ
NOT_PERCENT = ("rank_me", "images_per_second", "memory")  # metrics that are not fractions


def cell_config(row: str, seed: int, data: str, preset: str) -> RunConfig:
    """Return the options of a cell's run."""
    args = [*ROWS[row].split(), *ENCODER[preset].split(), "--data", data, "--preset", preset, "--seed", str(seed)]
    return parse_run(args + (GPU_OPTIONS.get(row, "").split() if preset == "gpu" else ["--device", "cpu"]))[0]


def run_cell(cell: tuple[str, int, dict[str, Any]]) -> str:
    """Train a cell, or resume it, and write its metrics.json. Returns a line to print.

    Args:
        cell: row, seed, and the options of `main`, with "out", the board's directory, and "steps" of each cell by name.
    """
    row, seed, options = cell
    output_dir = Path(options["out"]) / f"{row}_{seed}"
    torch.set_num_threads(options["threads"])
    device = choose_device("cpu" if options["preset"] == "cpu" else None)
    run = cell_config(row, seed, options["data"], options["preset"])
    train_set, test_set = run.load_dataset("train"), run.load_dataset("test")
    method = run.build().to(device)
    cost = {}
    if row == "random":
        output_dir.mkdir(parents=True, exist_ok=True)
        save_encoder(method.encoder, output_dir / "encoder.safetensors", run.encoder)
    else:
        steps = options["steps"].get(f"{row}_{seed}")
        cost = train_cell(run, method, train_set.to(device), output_dir, options["minutes"], steps)
    metrics = evaluate_cell(run, method.eval(), train_set, test_set, device)
    checkpoint.write_json(output_dir / "metrics.json", {"data": run.data} | metrics | cost)
    percentages = [f"{key} {100 * metrics[key]:.1f} %" for key in ("knn", "linear") if key in metrics]
    return f"{row}, seed {seed}: {', '.join(percentages)}"


def evaluate_cell(
    run: RunConfig, method: Method, train_set: ImageDataset, test_set: ImageDataset, device: torch.device
) -> Metrics:
    """Compute all metrics that the data set allows."""
    encoder, size = method.encoder.eval(), run.crop_size
    train_images, test_images = train_set.subsample(20_000).to(device), test_set.subsample(5_000).to(device)
    metrics = benchmark.evaluate_encoder(encoder, train_images, test_images, size, run.feature_pooling)
    if test_set.masks is not None:
        few = train_set.subsample(300).to(device), test_set.subsample(300).to(device)
        metrics |= benchmark.evaluate_patches(encoder, *few, size)
        clips = (Clips("test", 128, 24, 20)[i] for i in range(20))
        metrics["J&F"] = mean_j_and_f(encoder, [clip for clip in clips if (clip.masks[0] > 0).any()])
    if isinstance(method, ImageTextMethod):
        metrics |= benchmark.evaluate_zero_shot(method, test_images, size)
    return metrics


def train_cell(
    run: RunConfig, method: Method, dataset: ImageDataset, output_dir: Path, minutes: float, steps: int | None = None
) -> dict[str, float]:
    """Train in a directory, from its checkpoint if it has one.

    Args:
        run: the options.
        method: on its device; it is changed.
        dataset: training images.
        output_dir: the cell's directory.
        minutes: budget, from which the number of steps follows.
        steps: number of steps instead; None takes `minutes`.

    Returns:
        "images_per_second", "memory" in GB, "steps", "minutes" (planned), "minutes_spent" since the last resume.
    """
    device = next(method.parameters()).device
    config = TrainConfig(**run.train)
    config = replace(config, precision=choose_precision(config.precision, device))
    method.prepare(dataset)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not (output_dir / "config.json").exists():
        seconds = seconds_per_step(method, dataset, config)
        plan = Plan(steps or max(1, int(60 * minutes / seconds)), seconds, memory_used(device))
        checkpoint.write_json(output_dir / "config.json", {"run": asdict(run), "plan": asdict(plan)})
    plan = read_run(output_dir)[1]
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    trainer.fit(
        method, dataset, replace(config, minutes=0.0), plan, output_dir, evaluate=lambda encoder: {},
        export=lambda encoder: save_encoder(encoder, output_dir / "encoder.safetensors", run.encoder),
    )  # fmt: skip
    cost = {"images_per_second": config.batch_size / plan.seconds_per_step, "memory": memory_used(device) / 1e9}
    planned = plan.steps * plan.seconds_per_step / 60
    return cost | {"steps": plan.steps, "minutes": planned, "minutes_spent": (clock() - start) / 60}


def collect_rows(folder: Path) -> Rows:
    """Read the metrics of all evaluated cells, in the order of `ROWS`, with about 20 points of each loss curve."""
    rows: Rows = {row: {} for row in ROWS}
    for path in sorted(folder.glob("*_*/metrics.json")):
        row, seed = re.fullmatch(r"(.*)_(\d+)", path.parent.name).groups()
        lines = [line for line in read_log(path.parent / "log.jsonl") if "loss" in line]
        curve = [[line["step"], round(line["loss"], 4)] for line in lines[:: max(1, len(lines) // 20)]]
        rows[row][seed] = json.loads(path.read_text(encoding="utf-8")) | ({"loss": curve} if curve else {})
    return {row: by_seed for row, by_seed in rows.items() if by_seed}


def markdown_table(rows: Rows, columns: dict[str, str], published: dict[str, str] | None = None) -> str:
    """Format means and standard deviations (n - 1) over seeds, fractions in %.

    Args:
        rows: of a board.
        columns: metric -> heading; metrics that no row has are left out.
        published: a last column by row; None for none.
    """
    known = {key for by_seed in rows.values() for metrics in by_seed.values() for key in metrics}
    columns = {key: name for key, name in columns.items() if key in known}
    headings = [*columns.values(), *(["published, full budget"] if published else [])]
    lines = [f"| | {' | '.join(headings)} |", f"|{'---|' * (len(headings) + 1)}"]
    for row, by_seed in rows.items():
        cells = [_format_cell(key, by_seed) for key in columns]
        cells += [published.get(row, "-")] if published else []
        lines.append(f"| {LABELS.get(row, row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def board_tables(rows: Rows, data: str) -> tuple[str, str]:
    """Return the table of image features and that of patch features and cost."""
    columns = IMAGE_COLUMNS if data.startswith("scenes") else OTHER_COLUMNS
    published = PUBLISHED if data == "cifar10" else None
    return markdown_table(rows, columns, published), markdown_table(rows, PATCH_COLUMNS)


def _format_cell(key: str, by_seed: dict[str, Metrics]) -> str:
    scale = 1 if key in NOT_PERCENT else 100
    values = [metrics[key] * scale for metrics in by_seed.values() if key in metrics]
    digits = {"images_per_second": 0, "memory": 2}.get(key, 1)
    mean = f"{statistics.mean(values):.{digits}f}" if values else "-"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def compare_with_board(rows: Rows, board: Rows, columns: dict[str, str]) -> str:
    """Report by how many of a board's standard deviations the means of some rows differ from the board's means."""
    lines = []
    for row, by_seed in rows.items():
        deviations = {}
        for key in (key for key in columns if key not in NOT_PERCENT):
            new, old = ([x[key] for x in by.values() if key in x] for by in (by_seed, board.get(row, {})))
            if new and len(old) > 1:
                difference = abs(statistics.mean(new) - statistics.mean(old))
                deviations[key] = difference / max(statistics.stdev(old), 1e-9)
        if deviations:
            largest = max(deviations, key=deviations.get)
            one, two = (sum(x <= limit for x in deviations.values()) for limit in (1, 2))
            lines.append(
                f"{row}: of {len(deviations)} metrics {one} differ by at most one standard deviation, {two} by at most "
                f"two; {largest} differs by {deviations[largest]:.1f}"
            )
    return "\n".join(lines)


def steps_of_board(board: Rows, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, int]:
    """Return the steps of each cell of a board, by ROW_SEED. Raises InputError for a cell that it lacks."""
    cells = [(row, seed) for row in rows if row != "random" for seed in seeds]
    missing = [f"{row} with seed {seed}" for row, seed in cells if str(seed) not in board.get(row, {})]
    if missing:
        raise InputError(
            f"--like: the board lacks {', '.join(missing)}; change --rows or --seeds, or leave --like out."
        )
    return {f"{row}_{seed}": board[row][str(seed)]["steps"] for row, seed in cells}


def board_figure(rows: Rows, data: str, minutes: float):
    """Draw the means of all fractions as a table."""
    columns = {key: name for key, name in (IMAGE_COLUMNS | PATCH_COLUMNS).items() if key not in NOT_PERCENT}
    values = {
        row: {key: v for key in columns if (v := [100 * x[key] for x in by_seed.values() if key in x])}
        for row, by_seed in rows.items()
    }
    columns = {key: name for key, name in columns.items() if any(key in by_key for by_key in values.values())}
    title = f"{data}, {minutes:g} minutes of training each: means over seeds, in %"
    return results_table_figure(values, columns, title)


def parse_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of training per cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--preset", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--jobs", type=int, default=1, help="cells in parallel")
    parser.add_argument("--threads", type=int, default=1, help="per cell")
    parser.add_argument(
        "--out", type=Path, help="directory (default: runs/scoreboard, with the data set if not scenes)"
    )
    parser.add_argument("--like", type=Path, help="an existing board: take its numbers of steps, and compare with it")
    parser.add_argument("--print", type=Path, help="print the tables of an existing board, and train nothing")
    return parser, parser.parse_args()


def main() -> None:
    parser, options = parse_options()
    if options.print:
        board = checkpoint.read_json(options.print)
        print(*board_tables(board["rows"], board["data"]), sep="\n\n")
        return
    try:
        other = checkpoint.read_json(options.like).get("rows", {}) if options.like else {}
        steps = steps_of_board(other, options.rows, options.seeds) if options.like else {}
    except InputError as error:
        parser.error(str(error))
    settings = {key: getattr(options, key) for key in ("minutes", "data", "preset", "threads")}
    settings["like"] = options.like and str(options.like)
    suffix = "" if options.data == "scenes" else "_" + Path(options.data.replace(":", "/")).name
    board = (options.out or Path(f"runs/scoreboard{suffix}")) / "scoreboard.json"
    existing = json.loads(board.read_text(encoding="utf-8")) if board.exists() else settings
    if any(existing.get(key) != value for key, value in settings.items()):
        used = f"--data {existing['data']} --minutes {existing['minutes']} --like {existing.get('like')}"
        parser.error(f"{board} was made with other options ({used}); choose another --out")
    board.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(board, settings | {"rows": collect_rows(board.parent)})
    cell_options = settings | {"out": str(board.parent), "steps": steps}
    cells = [(row, seed, cell_options) for seed in options.seeds for row in options.rows]
    cells = [cell for cell in cells if not (board.parent / f"{cell[0]}_{cell[1]}" / "metrics.json").exists()]
    # A process per cell, so that memory is measured per cell.
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(run_cell, cells):
            print(line, flush=True)
            checkpoint.write_json(board, settings | {"rows": collect_rows(board.parent)})
    rows = collect_rows(board.parent)
    board_figure(rows, options.data, options.minutes).savefig(board.with_suffix(".png"), dpi=130)
    comparison = compare_with_board(rows, other, IMAGE_COLUMNS | PATCH_COLUMNS)
    print(*board_tables(rows, options.data), comparison, sep="\n\n")


if __name__ == "__main__":
    main()
