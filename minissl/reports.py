"""Several runs side by side, and one run where labels are few: the tables that chapters speak of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minissl import checkpoint, pretrained, runs
from minissl.errors import InputError
from minissl.evaluate import few_labels
from minissl.machine import choose_device
from minissl.visualize import bars_figure, lines_figure

COUNTS = (1, 5, 10, 50, 100, 500)


def compare(folders: list[Path], out: Path) -> dict[str, dict[str, float]]:
    """What a linear classifier reads from the features of several runs, and of the first one's encoder untrained.

    Args:
        folders: of finished runs.
        out: a picture, PNG; a JSON file of the same name goes beside it.

    Raises:
        InputError: for a folder that has not been measured, or runs measured on different data.
    """
    found = {}
    for folder in folders:
        path = folder / "metrics.json"
        if not path.is_file():
            raise InputError(f"{folder} has no metrics.json; measure it with: python -m minissl evaluate {folder}")
        found[folder.name] = json.loads(path.read_text(encoding="utf-8"))
    if len({metrics["data"] for metrics in found.values()}) > 1:
        said = ", ".join(f"{name} on {metrics['data']}" for name, metrics in found.items())
        raise InputError(f"These were measured on different data ({said}); evaluate them with one --data.")
    first = next(iter(found.values()))
    asked = [name for name in first if name.startswith("linear_")] or ["linear"]
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
    tables, device = [], choose_device()
    for i, folder in enumerate(folders):
        run, _ = runs.read(folder)
        train, test = (replace(run, data=data).images(split).to(device) for split in ("train", "test"))
        test = test.some(1000)
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


def _keep(out: Path, rows: dict, figure) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out.with_suffix(".json"), rows)
    figure.savefig(out, dpi=130)
    print(f"Written: {out} and {out.with_suffix('.json')}")
