"""Several runs side by side, one run where labels are few, one that does not learn: what is said of finished runs."""

from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minissl import checkpoint, doctor, pretrained, runs
from minissl.data import Images
from minissl.data.stream import Files
from minissl.errors import InputError
from minissl.evaluate import extract, few_labels, rank_me
from minissl.machine import choose_device
from minissl.record import read_log
from minissl.visualize import bars_figure, lines_figure

COUNTS = (1, 5, 10, 50, 100, 500)


def compare(folders: list[Path], out: Path) -> dict[str, dict[str, float]]:
    """What a linear classifier reads from the features of several runs, and of the first one's encoder untrained.

    Args:
        folders: of finished runs.
        out: a picture, PNG; a JSON file of the same name goes beside it.

    Raises:
        InputError: for a folder that has not been measured, runs measured on different data or without labels, and a
            picture that cannot be written.
    """
    check_picture(out)
    found, short = {}, len({folder.name for folder in folders}) == len(folders)
    for folder in folders:
        path = folder / "metrics.json"
        if not path.is_file():
            raise InputError(f"{folder} has no metrics.json; measure it with: python -m minissl evaluate {folder}")
        found[folder.name if short else str(folder)] = checkpoint.read_json(path)
    if len({metrics["data"] for metrics in found.values()}) > 1:
        said = ", ".join(f"{name} on {metrics['data']}" for name, metrics in found.items())
        raise InputError(f"These were measured on different data ({said}); evaluate them with one --data.")
    first = next(iter(found.values()))
    asked = [name for name in first if name.startswith("linear_")] or ["linear"]
    for run, metrics in found.items():
        if not metrics.keys() >= {*asked, *(f"random_{name}" for name in asked)}:
            raise InputError(f"{run} was measured on images without labels; evaluate it with another --data.")
    rows = {"untrained": {name.removeprefix("linear_"): first[f"random_{name}"] for name in asked}}
    rows |= {run: {name.removeprefix("linear_"): m[name] for name in asked} for run, m in found.items()}
    _keep(out, rows, bars_figure(rows, f"a linear classifier on frozen features ({first['data']})"))
    print(f"{'':16}" + "".join(f"{name:>10}" for name in rows["untrained"]))
    for run, row in rows.items():
        print(f"{run:16}" + "".join(f"{100 * value:10.1f}" for value in row.values()))
    return rows


def few(folders: list[Path], data: str, out: Path, seeds: int = 3) -> dict[str, Any]:
    """Accuracy on a task runs were not trained for, by the number of labels a class.

    Args:
        folders: of runs that differ in their seed; the deviation is over all their draws.
        data: the task, a data set's name.
        out: a picture, PNG; a JSON file of the same name goes beside it.
        seeds: draws of the labels for each run.
    """
    tables, device, asked = [], choose_device(), [runs.read(folder)[0] for folder in folders]
    check_picture(out)
    for i, (folder, run) in enumerate(zip(folders, asked)):
        train, test = (replace(run, data=data).images(split) for split in ("train", "test"))
        if train.labels is None or test.labels is None:
            raise InputError(f"{data} has no labels; choose another --data.")
        train = train.some(20_000) if isinstance(train, Files) else train  # too many for the memory
        train, test = train.to(device), test.some(1000).to(device)
        tables += [few_labels(
            pretrained.load(folder).to(device), runs.untrained(run).to(device), (train.images, train.labels),
            (test.images, test.labels), run.size, COUNTS, seeds, first=i * seeds,
        )]  # fmt: skip
    table = {name: torch.cat([found[name] for found in tables], dim=1) for name in tables[0]}
    lines = {name: 100 * values.cpu() for name, values in table.items()}
    figure = lines_figure(COUNTS, lines, "labels a class", "right answers (%)", f"{run.data} to {data}")
    _keep(out, {"labels": list(COUNTS), "data": data} | {name: x.tolist() for name, x in lines.items()}, figure)
    print(f"{'labels a class':16}" + "".join(f"{count:>14}" for count in COUNTS))
    for name, values in lines.items():
        said = zip(values.mean(dim=1).tolist(), torch.std(values, dim=1, correction=0).tolist())
        print(f"{name:16}" + "".join(f"{mean:8.1f} ± {spread:3.1f}" for mean, spread in said))
    return lines


def diagnose(folder: Path) -> list[doctor.Finding]:
    """Say what is wrong with a run, what that means and which option to turn; finished, going on or stopped.

    The options are looked at first; the log, then the measured numbers, then the encoder only as long as nothing is
    found, because what they show follows from what was found before. Only a loss that is no number is always told.

    Args:
        folder: of a run.
    """
    run, plan = runs.read(folder)
    lines, method, looked = read_log(folder / "log.jsonl"), run.build(), ["its options", "its log"]
    found = doctor.on_options(asdict(run), plan.steps, method)
    told = doctor.on_log(lines, plan.steps, run.options, doctor.guesses(method, run.loop["batch_size"]))
    found += [finding for finding in told if not found or finding.name == "not finite"]
    metrics = folder / "metrics.json"
    if not found and metrics.exists() and doctor.ripe(lines, plan.steps):
        looked.append("its measured numbers")
        found = doctor.on_metrics(checkpoint.read_json(metrics))
    if not found and (folder / "checkpoint.safetensors").exists() and doctor.ripe(lines, plan.steps):
        looked.append("its features")
        found = doctor.on_encoder(**_measures(run, runs.load_method(folder), run.images("test").some(500)))
    for finding in found:
        print(finding)
    if not found:
        print(f"Nothing looks wrong with {folder}, by {', '.join(looked)}.")
    return found


def _measures(run: runs.Run, method: nn.Module, images: Images) -> dict[str, Any]:
    """What `doctor.on_encoder` asks for."""
    found, used = extract(method.encoder, images.images, run.size, pool=run.reads), None
    before = extract(runs.untrained(run), images.images, run.size, pool=run.reads)
    if "prototypes" in run.options:
        scores = method.teacher["head"](extract(method.encoder, images.images, run.size))  # (N, K)
        used = len((scores - (0 if run.options["sinkhorn"] else method.center)).argmax(dim=1).unique())
    return {"rank": rank_me(found), "before": rank_me(before), "used": used,
            "prototypes": run.options.get("prototypes", 0), "images": len(images)}  # fmt: skip


def check_picture(out: Path) -> None:
    """Raises InputError if a picture cannot be made there."""
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{out} is no name of a picture; end it in .png, .svg or .pdf.")
    checkpoint.make_folder(out.parent)


def _keep(out: Path, rows: dict, figure) -> None:
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format=out.suffix[1:])
    checkpoint.write_json(out.with_suffix(".json"), rows)
    checkpoint.write(out, picture.getvalue())
    print(f"Written: {out} and {out.with_suffix('.json')}")
