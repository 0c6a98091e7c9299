"""One table for the whole course: every method with the same encoder, data and minutes, measured alike.

Each cell, a method from a seed, is a run in a folder of its own, with its log and its checkpoint: what was stopped goes
on, what is measured is not run again, and several cells may run side by side. On a CPU the budget is the CPU's time,
not the clock's, which counts what else the machine does. With --like, a row takes as many steps as in a board that is
there already, whatever the machine does in a minute, and is told apart from it by that board's own deviations.

    python -m tests.benchmarks.scoreboard [--minutes 5] [--seeds 0 1 2] [--jobs 2] [--data scenes] [--preset gpu]
    python -m tests.benchmarks.scoreboard --rows SimCLR --like data/recorded/scoreboard.json
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minissl import checkpoint, pretrained, runs, scores, train
from minissl.__main__ import parse_run
from minissl.data.video import Clips
from minissl.errors import InputError
from minissl.machine import Plan, choose_device, choose_precision, memory_used
from minissl.record import read_log
from minissl.visualize import board_figure
from tests.benchmarks.decay import tracked
from tests.benchmarks.ladder import seconds_a_step

ROWS = {
    "random": "transfer",
    "supervised": "transfer",
    "CLIP": "clip",
    "rotation": "pretext --task rotation",
    "colorization": "pretext --task colorization",
    "inpainting": "pretext --task mae --ratio 0.5",
    "SimCLR": "simclr",
    "DINO": "dino",
    "DINOv2": "dinov2",
    # Hidden patches first, cooled, then whole pictures beside the anchor; the preset, at 2e-3 throughout, starts later.
    "DINOv3": "dinov3 --cool 0.4 --ibot_until 0.4 --final_lr 1e-6 --final_weight_decay 0.4 --lr 1e-3",
}
ENCODER = {  # whatever a preset has
    "cpu": "--encoder.name nano --encoder.patch_size 8 --encoder.stem conv --encoder.init_std 0.088",
    "gpu": "--encoder.name small --encoder.patch_size 16",
}
LARGE = {"SimCLR": "--optimizer adamw --lr 5e-4 --weight_decay 0.04"}  # on a GPU: LARS is for convolutions
IMAGE = {  # what is read of the vector of an image
    "knn": "k-NN, object",
    "linear": "linear, object",
    "few_10": "10 labels a kind",
    "linear_color": "linear, color",
    "linear_action": "action",
    "linear_place": "place",
    "zero_shot_object": "zero-shot, object",
    "rank_me": "RankMe",
}
PATCHES = {  # of its patches, and what it cost
    "attention_head_iou": "attention, IoU",
    "miou_object": "patches, object (mIoU)",
    "miou_part": "part (mIoU)",
    "miou_place": "place (mIoU)",
    "correspondence": "correspondence",
    "J&F": "J&F, clips",
    "images_per_second": "images/s",
    "memory": "memory, GB",
}
PUBLISHED = {  # on CIFAR-10 with the whole budget of others: other networks, hundreds of epochs, hours on GPUs
    "supervised": "75.6 (ViT, UvA's tutorial 15); linear 93.8 (ResNet-18, SupCon, solo-learn)",
    "SimCLR": "k-NN 84.7 (ResNet-18, 200 epochs, lightly); linear 90.7 (1,000, solo-learn)",
    "DINO": "k-NN 84.0 (ResNet-18, 200 epochs, lightly); linear 89.5 (1,000, solo-learn)",
}
PLAIN = ("rank_me", "images_per_second", "memory")  # numbers that are not shares of one


def asked_of(row: str, seed: int, data: str, preset: str) -> runs.Run:
    """The run of a cell."""
    words = [*ROWS[row].split(), *ENCODER[preset].split(), "--data", data, "--preset", preset, "--seed", str(seed)]
    return parse_run(words + (LARGE.get(row, "").split() if preset == "gpu" else ["--device", "cpu"]))[0]


def fill(cell: tuple[str, int, dict]) -> str:
    """Train one row from one seed, or go on with it, and measure it; says what was found."""
    row, seed, options = cell
    out = Path(options["out"]) / f"{row}_{seed}"
    torch.set_num_threads(options["threads"])
    device = choose_device("cpu" if options["preset"] == "cpu" else None)
    run = asked_of(row, seed, options["data"], options["preset"])
    data, test = run.images("train"), run.images("test")
    method = run.build().to(device)
    if row != "random":
        speed = learn(run, method, data.to(device), out, options["minutes"], options["like"].get(f"{row}_{seed}"))
    else:
        out.mkdir(parents=True, exist_ok=True)
        pretrained.save(method.encoder, run.encoder, out / "encoder.safetensors")
        speed = {}
    encoder, parts = method.encoder.eval(), (data.some(20_000).to(device), test.some(5_000).to(device))
    found = scores.score(encoder, *parts, run.size, run.reads)
    if test.masks is not None:
        found |= scores.score_patches(encoder, data.some(300).to(device), test.some(300).to(device), run.size)
        clips = (Clips("test", 128, 24, 20)[i] for i in range(20))
        found["J&F"] = tracked(encoder, [clip for clip in clips if (clip.masks[0] > 0).any()])
    if hasattr(method, "embed_text"):
        found |= scores.score_text(method.eval(), parts[1], run.size)
    checkpoint.write_json(out / "metrics.json", {"data": run.data} | found | speed)
    return f"{row} {seed}: " + ", ".join(f"{key} {100 * found[key]:.1f}" for key in ("knn", "linear") if key in found)


def learn(
    run: runs.Run, method: torch.nn.Module, data, out: Path, minutes: float, steps: int | None = None
) -> dict[str, float]:
    """Train in the folder, from its checkpoint if there is one, for the minutes or steps. Returns what it cost."""
    device = next(method.parameters()).device
    config = train.TrainConfig(**run.loop)
    config = replace(config, precision=choose_precision(config.precision, device))
    runs.prepare(method, data)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        each = seconds_a_step(method, data, config)
        plan = Plan(steps or max(1, int(60 * minutes / each)), each, memory_used(device))
        checkpoint.write_json(out / "config.json", {"run": asdict(run), "plan": asdict(plan)})
    plan = runs.read(out)[1]
    start = time.process_time() if device.type == "cpu" else time.perf_counter()
    train.fit(
        method, data, config, plan.steps, out, watch=lambda encoder: {},
        export=lambda encoder: pretrained.save(encoder, run.encoder, out / "encoder.safetensors"),
    )  # fmt: skip
    spent = (time.process_time() if device.type == "cpu" else time.perf_counter()) - start  # of the last stretch
    speed = {"images_per_second": config.batch_size / plan.seconds_per_step, "memory": memory_used(device) / 1e9}
    return speed | {"steps": plan.steps, "minutes": plan.steps * plan.seconds_per_step / 60, "spent": spent / 60}


def gather(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> seed -> numbers, of all cells that are measured, with some points of each one's loss."""
    rows = {row: {} for row in ROWS}
    for path in sorted(folder.glob("*_*/metrics.json")):
        row, seed = re.fullmatch(r"(.*)_(\d+)", path.parent.name).groups()
        lines = [line for line in read_log(path.parent / "log.jsonl") if "loss" in line]
        curve = [[line["step"], round(line["loss"], 4)] for line in lines[:: max(1, len(lines) // 20)]]
        rows[row][seed] = json.loads(path.read_text(encoding="utf-8")) | ({"loss": curve} if curve else {})
    return {row: by_seed for row, by_seed in rows.items() if by_seed}


def table(rows: dict[str, dict[str, dict]], columns: dict[str, str], published: dict[str, str] | None = None) -> str:
    """Mean and deviation over the seeds, in % where it is a share; a dash where it cannot be asked or none has."""
    columns = {key: name for key, name in columns.items() if any(key in x for r in rows.values() for x in r.values())}
    names = [*columns.values(), *(["published, full budget"] if published else [])]
    lines = [f"| | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for row, by_seed in rows.items():
        cells = []
        for key in columns:
            values = [found[key] * (1 if key in PLAIN else 100) for found in by_seed.values() if key in found]
            digits = {"images_per_second": 0, "memory": 2}.get(key, 1)
            said = f"{statistics.mean(values):.{digits}f}" if values else "-"
            cells.append(f"{said} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else said)
        cells += [published.get(row, "-")] if published else []
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def repeated(rows: dict[str, dict[str, dict]], before: dict[str, dict[str, dict]], columns: dict[str, str]) -> str:
    """How far the means of some rows are from those of a board before, in its deviations over seeds."""
    lines = []
    for row, by_seed in rows.items():
        off = {}
        for key in (key for key in columns if key not in PLAIN):
            now, then = ([x[key] for x in by.values() if key in x] for by in (by_seed, before.get(row, {})))
            if now and len(then) > 1:
                off[key] = abs(statistics.mean(now) - statistics.mean(then)) / max(statistics.stdev(then), 1e-9)
        if off:
            far = max(off, key=off.get)
            within = f"{sum(x <= 1 for x in off.values())} of {len(off)} numbers within one deviation"
            lines.append(
                f"{row}: {within}, {sum(x <= 2 for x in off.values())} within two; {far} is {off[far]:.1f} off"
            )
    return "\n".join(lines)


def steps_of(before: dict[str, dict[str, dict]], rows: list[str], seeds: list[int]) -> dict[str, int]:
    """Steps of each cell in a board before. Raises InputError for one that it lacks."""
    learning = [(row, seed) for row in rows if row != "random" for seed in seeds]
    lacking = [f"{row} from seed {seed}" for row, seed in learning if str(seed) not in before.get(row, {})]
    if lacking:
        raise InputError(f"--like: that board lacks {', '.join(lacking)}; change --rows or --seeds, or leave it out.")
    return {f"{row}_{seed}": before[row][str(seed)]["steps"] for row, seed in learning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of training for each cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--preset", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side, each on --threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a folder; runs/scoreboard, with the name of the data if not scenes")
    parser.add_argument("--like", type=Path, help="a board that is there: as many steps, and how far from its numbers")
    asked = parser.parse_args()
    try:
        before = checkpoint.read_json(asked.like).get("rows", {}) if asked.like else {}
        like = steps_of(before, asked.rows, asked.seeds) if asked.like else {}
    except InputError as problem:
        parser.error(str(problem))
    about = {key: getattr(asked, key) for key in ("minutes", "data", "preset", "threads")}
    about["like"] = asked.like and str(asked.like)
    named = "" if asked.data == "scenes" else "_" + Path(asked.data.replace(":", "/")).name
    board = (asked.out or Path(f"runs/scoreboard{named}")) / "scoreboard.json"
    there = json.loads(board.read_text(encoding="utf-8")) if board.exists() else about
    if any(there.get(key) != value for key, value in about.items()):
        of = f"{there['data']}, {there['minutes']} minutes, --like {there.get('like')}"
        parser.error(f"{board} was made with other options ({of}); choose --out")
    board.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(board, about | {"rows": gather(board.parent)})
    cells = [
        (row, seed, about | {"out": str(board.parent), "like": like}) for seed in asked.seeds for row in asked.rows
    ]
    cells = [cell for cell in cells if not (board.parent / f"{cell[0]}_{cell[1]}" / "metrics.json").exists()]
    with multiprocessing.get_context("spawn").Pool(asked.jobs, maxtasksperchild=1) as pool:  # memory is a cell's own
        for said in pool.imap_unordered(fill, cells):
            print(said, flush=True)
            checkpoint.write_json(board, about | {"rows": gather(board.parent)})
    rows = gather(board.parent)
    shares = {key: name for key, name in (IMAGE | PATCHES).items() if key not in PLAIN}
    found = {row: {k: [100 * x[k] for x in by.values() if k in x] for k in shares} for row, by in rows.items()}
    found = {row: {key: values for key, values in of.items() if values} for row, of in found.items()}
    shares = {key: name for key, name in shares.items() if any(key in of for of in found.values())}
    figure = board_figure(found, shares, f"{about['data']}, {about['minutes']:g} minutes each: means over seeds, in %")
    figure.savefig(board.with_suffix(".png"), dpi=130)
    print(table(rows, IMAGE), table(rows, PATCHES), repeated(rows, before, IMAGE | PATCHES), sep="\n\n")


if __name__ == "__main__":
    main()
