"""Compare the linear-probe accuracy of several runs, and write a report's figure with its JSON file."""

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from minissl.errors import InputError
from minissl.training import checkpoint
from minissl.visualization import bars_figure

FIGURE_FORMATS = (".png", ".svg", ".pdf")


def compare_runs(run_dirs: list[Path], out: Path) -> dict[str, dict[str, float]]:
    """Compare the linear-probe accuracy of several runs, and of the first run's encoder at random initialization.

    Prints a table, and writes a figure and a JSON file.

    Args:
        run_dirs: evaluated runs.
        out: the figure, PNG, SVG or PDF; a JSON file of the same name is written beside it.

    Returns:
        "random init" and each run, by name -> target ("linear" for labels, or a factor's name) -> accuracy in [0, 1].

    Raises:
        InputError: for a folder without metrics, runs evaluated on different data sets or without labels, and a figure
            that cannot be written.
    """
    check_figure_path(out)
    metrics = _read_metrics(run_dirs)
    first = next(iter(metrics.values()))
    keys = [key for key in first if key.startswith("linear_")] or ["linear"]
    for name, values in metrics.items():
        if not values.keys() >= {*keys, *(f"random_{key}" for key in keys)}:
            raise InputError(f"{name} was evaluated on images without labels; evaluate it with another --data.")
    rows = {"random init": {key.removeprefix("linear_"): first[f"random_{key}"] for key in keys}}
    rows |= {name: {key.removeprefix("linear_"): values[key] for key in keys} for name, values in metrics.items()}
    write_figure(out, rows, bars_figure(rows, f"Linear probe on frozen features, test images of {first['data']}"))
    print(f"{'accuracy (%)':16}" + "".join(f"{target:>10}" for target in rows["random init"]))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{100 * value:10.1f}" for value in row.values()))
    return rows


def _read_metrics(run_dirs: list[Path]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each run by its folder's name, or by its path where names repeat.

    Raises:
        InputError: if a run has not been evaluated, or the runs were evaluated on different data sets.
    """
    names_differ = len({run_dir.name for run_dir in run_dirs}) == len(run_dirs)
    metrics = {}
    for run_dir in run_dirs:
        path = run_dir / "metrics.json"
        if not path.is_file():
            raise InputError(f"{run_dir} has no metrics.json; evaluate it with: minissl evaluate {run_dir}")
        metrics[run_dir.name if names_differ else str(run_dir)] = checkpoint.read_json(path)
    if len({values["data"] for values in metrics.values()}) > 1:
        listed = ", ".join(f"{name} on {values['data']}" for name, values in metrics.items())
        raise InputError(f"The runs were evaluated on different data sets ({listed}); evaluate them with one --data.")
    return metrics


def check_figure_path(out: Path) -> None:
    """Make the folder of a figure. Raises InputError if the file's suffix or its folder is not possible."""
    if out.suffix not in FIGURE_FORMATS:
        raise InputError(f"--out {out} is not the name of a figure; end it in {', '.join(FIGURE_FORMATS)}.")
    checkpoint.make_folder(out.parent)


def write_figure(out: Path, content: dict[str, Any], figure: Figure) -> None:
    """Write a figure, and its numbers into a JSON file of the same name.

    Raises:
        InputError: if they cannot be written.
    """
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130, format=out.suffix[1:])
    checkpoint.write_json(out.with_suffix(".json"), content)
    checkpoint.write_atomic(out, buffer.getvalue())
    print(f"Written: {out} and {out.with_suffix('.json')}")
