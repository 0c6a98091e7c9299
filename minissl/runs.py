"""A run and its folder: from the options to a trained encoder, its numbers and its pictures.

runs/NAME/config.json              what was asked for, and the plan that was measured at the start
          log.jsonl                the loss and what was watched, line by line
          checkpoint.safetensors   everything needed to go on; checkpoint.previous.safetensors is the one before it
          encoder.safetensors      what is kept of it; `pretrained.load` reads it
          metrics.json             how good it is
          *.png                    attention, PCA of patches, curves, collapse
"""

from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minissl import checkpoint, doctor, formats, parallel, pretrained, train
from minissl.config import Run, check_folder, load_method, read, untrained
from minissl.data import Images
from minissl.data.stream import decoders_alive
from minissl.errors import InputError
from minissl.evaluate import extract
from minissl.machine import Plan, choose_device, choose_precision, fits
from minissl.method import find
from minissl.order import check_parts
from minissl.record import read_log
from minissl.scores import score, score_text, watch

OWN = ("encoder", "checkpoint", "checkpoint.previous", "config", "metrics", "facts")  # files of a run, without suffix


def start(run: Run, out: Path, device_name: str | None = None, resume: bool = False) -> dict[str, float]:
    """Train a run, or go on with it, then measure it and draw its pictures. Returns the metrics."""
    device = parallel.join(choose_device(device_name))
    check_folder(run, out, resume)
    method = run.build()
    if run.start and not checkpoint.there(out / "checkpoint.safetensors"):
        pretrained.begin_from(Path(run.start), method)
    method.to(device)
    config = train.TrainConfig(**run.loop)
    check_loop(config)
    config = replace(config, precision=choose_precision(config.precision, device))
    parallel.say(f"Training {run.method} on the {device} in {config.precision}, {threads()}.")
    data, test = run.images("train"), run.images("test")
    check_data(run, data)
    check_parts(method, config.batch_size, config.accumulate)
    prepare(method, data)
    checkpoint.make_folder(out)
    with checkpoint.alone(out), decoders_alive():
        return _go(run, method, config, out, data, test)


def _go(
    run: Run, method: nn.Module, config: train.TrainConfig, out: Path, data: Images, test: Images
) -> dict[str, float]:
    """What `start` does in the folder, which is its own now."""
    device = next(method.parameters()).device
    size = sum(t.nbytes for t in method.state_dict().values()) + 2 * sum(p.nbytes for p in method.parameters())
    checkpoint.need_space(out, 3 * size)
    resident = data.to(device) if fits(data.nbytes, device) else data
    plan = read(out)[1] if (out / "config.json").exists() else train.plan(method, resident, config)
    plan = parallel.from_first(plan)
    parallel.say(f"{len(data)} images of {run.data}; {plan}.")
    if parallel.rank() == 0:
        _write_down(run, plan, data, out / "config.json")
    for finding in doctor.on_options(asdict(run), plan.steps, method):
        parallel.say(finding)
    among = doctor.guesses(method, config.batch_size)
    few, fewer = data.some(4000).to(device), test.some(1000).to(device)
    train.fit(
        method, resident, config, plan.steps, out,
        watch=lambda encoder: watch(encoder, few, fewer, run.size, run.reads),
        export=lambda encoder: pretrained.save(encoder, run.encoder, out / "encoder.safetensors"),
        look=lambda lines: doctor.on_log(lines, plan.steps, run.options, among),
    )  # fmt: skip
    if parallel.rank():
        return {}
    metrics = measure(out, data=(data, test), device=device)
    show(out, test)
    return metrics


def _write_down(run: Run, plan: Plan, data: Images, path: Path) -> None:
    """Write config.json, and say so if the images are no longer those that the run began with."""
    now = data.fingerprint
    began = checkpoint.read_json(path).get("data", now)
    if any(began[what] != now[what] for what in began.keys() & now.keys()):
        parallel.say(
            f"The images of {run.data} are not those the run began with ({began['images']} then, {now['images']} now); "
            "it goes on with what is there, and ends with other weights than it would have."
        )
    checkpoint.write_json(path, {"run": asdict(run), "plan": asdict(plan), "data": began})


def threads() -> str:
    """How many threads there are, of how many processes."""
    many = f"{parallel.world()} processes of " if parallel.together() else ""
    return f"{many}{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def prepare(method: nn.Module, data: Images) -> None:
    """Let a method that wants to look at its training data before the first step do so."""
    if hasattr(method, "prepare"):
        method.prepare(data)


def check_loop(config: train.TrainConfig) -> None:
    """Raises InputError for a number that is negative, or 0 where something is divided by it."""
    for name, value in asdict(config).items():
        above = name in ("batch_size", "accumulate", "cool")
        if isinstance(value, (int, float)) and not (value > 0 if above else value >= 0):
            raise InputError(f"--{name} is {value}; give a number {'above 0' if above else 'that is not negative'}.")


def check_data(run: Run, data: Images) -> None:
    """Raises InputError if the images are too few or too small for the run, or lack what its method needs."""
    for name in getattr(find(run.method), "needs", ()):
        if getattr(data, name) is None:
            raise InputError(f"{run.method} needs {name}, and {run.data} has none; choose another --data.")
    if run.loop["batch_size"] > len(data):
        raise InputError(
            f"A batch of {run.loop['batch_size']} is larger than the data ({len(data)} images); "
            f"give --batch_size {len(data)} or less."
        )
    if run.size > data.size:
        raise InputError(
            f"The images are {data.size} pixels wide, smaller than a crop of {run.size}; "
            "give a smaller --size, or a larger --image_size."
        )


def measure(
    out: Path, data_name: str | None = None, data: tuple[Images, Images] | None = None, device: Any = None
) -> dict[str, Any]:
    """Measure the encoder of a run beside the same encoder before training; writes metrics.json and prints a table.

    Args:
        out: the run's folder.
        data_name: another data set than the run's own.
        data: its train and test images, if they are at hand.
        device: where to measure; chosen if None.
    """
    run, _ = read(out)
    run = replace(run, data=data_name or run.data)
    device = choose_device() if device is None else device
    trained = pretrained.load(out)
    parts = data or (run.images("train"), run.images("test"))
    parts = [part.some(n).to(device) for part, n in zip(parts, (20_000, 5_000))]
    ours, theirs = (score(e.to(device), *parts, run.size, run.reads) for e in (trained, untrained(run)))
    if hasattr(find(run.method), "embed_text"):
        ours |= score_text(load_method(out).to(device), parts[1], run.size)
    metrics = {"data": run.data, "train_images": len(parts[0]), "test_images": len(parts[1]), **ours}
    metrics |= {f"random_{name}": value for name, value in theirs.items()}
    checkpoint.write_json(out / "metrics.json", metrics)
    print(f"{'':20}{'trained':>10}{'random':>10}   ({metrics['test_images']} test images of {run.data})")
    for name in ours:
        print(f"{name:20}{ours[name]:10.3f}" + (f"{theirs[name]:10.3f}" if name in theirs else ""))
    return metrics


def export(out: Path, path: Path, form: str = "minissl") -> None:
    """Write a run's method into one small file that `pretrained` loads, and a card of it beside, .json.

    Or its encoder alone, in the form of `timm` (a file) or `huggingface` (a folder).
    """
    if form != "huggingface" and path.suffix != ".safetensors":
        raise InputError(f"{path} is to be a safetensors file; end its name in .safetensors.")
    if path.stem in OWN:
        checkpoint.keep_off(path.parent)
    if form != "minissl":
        formats.export(pretrained.load(out), path, form)
        print(f"Written for {form}: {path}")
        return
    run, plan = read(out)
    metrics = checkpoint.read_json(out / "metrics.json")
    if not metrics:
        raise InputError(f"{out} has not been measured; wait for the run, or: python -m minissl evaluate {out}")
    checkpoint.make_folder(path.parent)
    pretrained.save_method(load_method(out), run.method, run.options, run.encoder, path)
    card = {"run": asdict(run), "plan": asdict(plan), "metrics": metrics}
    checkpoint.write_json(path.with_suffix(".json"), card)
    print(f"Written: {path}, {path.stat().st_size / 1e6:.1f} MB, and its card {path.with_suffix('.json')}")


def show(out: Path, test: Images | None = None) -> None:
    """Draw attention.png, pca.png, curves.png and collapse.png of a run into its folder."""
    from minissl.visualize import attention_figure, collapse_figure, curves_figure, pca_figure

    run, _ = read(out)
    encoder, before = pretrained.load(out), untrained(run)
    test = (test or run.images("test")).some(2000)
    images, eight = test.images, test.some(8)
    metrics = checkpoint.read_json(out / "metrics.json")
    look = run.size * 2  # twice the crop: a finer map, and still a size the positions stretch to
    figures = {
        "attention": attention_figure(encoder, eight.images, run.size, masks=eight.masks),
        "pca": pca_figure(encoder, images[:: max(len(images) // 16, 1)][:16], look),
        "curves": curves_figure(read_log(out / "log.jsonl"), run.options.get("prototypes"), metrics.get("random_knn")),
        "collapse": collapse_figure(*(extract(e, images, run.size, pool=run.reads) for e in (encoder, before))),
    }
    for name, figure in figures.items():
        picture = BytesIO()
        figure.savefig(picture, dpi=130)
        checkpoint.write(out / f"{name}.png", picture.getvalue())
    print(f"Pictures: {', '.join(str(out / name) + '.png' for name in figures)}")
