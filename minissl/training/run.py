"""Train a run in its directory: from options to a trained encoder, its metrics and figures::

    runs/NAME/config.json              the options, and the plan
              log.jsonl                terms of the loss and evaluations, one JSON object per line
              checkpoint.safetensors   everything needed to continue; checkpoint.previous.safetensors is the one before
              encoder.safetensors      the trained encoder; `hub.pretrained.load_encoder` reads it
              metrics.json             evaluation of the trained encoder and of the same encoder with random weights
              *.png                    attention, PCA of patch features, training curves, collapse

The command line describes a run by a RunConfig, see `start_run`. In Python a method and a data set are given, see
`train`. Both lead to the same directory and can be resumed.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from minissl import distributed
from minissl.data.adapter import from_dataset
from minissl.data.images import ImageDataset
from minissl.data.streaming import report_dead_workers
from minissl.errors import InputError
from minissl.evaluation import extract_features, rank_me
from minissl.evaluation.benchmark import evaluate_encoder, evaluate_zero_shot, quick_evaluation
from minissl.hub import export, pretrained
from minissl.methods.base import ImageTextMethod, Method
from minissl.methods.registry import get_method_class
from minissl.models.outputs import Encoder
from minissl.training import checkpoint, diagnostics, trainer
from minissl.training.config import TrainConfig, check_train_config
from minissl.training.device import check_compile, choose_device, choose_precision, fits_on_device
from minissl.training.logger import Logger, read_log
from minissl.training.plan import Plan
from minissl.training.run_config import CUSTOM as CUSTOM
from minissl.training.run_config import RunConfig as RunConfig
from minissl.training.run_config import check_run_dir as check_run_dir
from minissl.training.run_config import load_run_method as load_run_method
from minissl.training.run_config import random_init_encoder as random_init_encoder
from minissl.training.run_config import read_run as read_run
from minissl.training.sampler import check_batch_split
from minissl.training.threads import Threads

RUN_FILES = ("encoder", "checkpoint", "checkpoint.previous", "config", "metrics", "dataset_stats")  # without suffix


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        output_dir: the run directory.
        config: the options.
        plan: length and cost, as revised last.
        metrics: content of metrics.json; {} without test images, and in all processes but the first.
    """

    output_dir: Path
    config: RunConfig
    plan: Plan
    metrics: dict[str, Any]
    _encoder: Encoder | None = field(default=None, repr=False, compare=False)  # one that cannot be loaded by name

    @property
    def encoder(self) -> Encoder:
        """Return the trained encoder, in evaluation mode, without gradients."""
        return self._encoder or pretrained.load_encoder(self.output_dir)

    @property
    def log(self) -> list[dict[str, float]]:
        """Return the lines of log.jsonl."""
        return read_log(self.output_dir / "log.jsonl")


@dataclass(frozen=True)
class _Trained:
    """Networks of a finished run, in evaluation mode."""

    encoder: Encoder
    baseline: Encoder
    baseline_name: Literal["random", "initial"]  # random weights, or what an encoder made in Python was given with
    text_method: ImageTextMethod | None  # for zero-shot evaluation


def start_run(
    run: RunConfig,
    output_dir: Path,
    device: str | torch.device | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
) -> Run:
    """Train a run, or continue it, then evaluate it and draw its figures.

    Args:
        run: the options.
        output_dir: the run directory; it is created.
        device: the device or its name; None takes the first available of cuda, mps and cpu.
        resume: continue the run that is in the directory.
        loggers: receive the same metrics as log.jsonl.

    Returns:
        The finished run.

    Raises:
        InputError: for options that are wrong, data that does not fit, and everything else that can be corrected.
        KeyboardInterrupt: after Ctrl-C, when the step is finished and saved.
    """
    torch_device = distributed.init_distributed(choose_device(device))
    check_run_dir(run, output_dir, resume)
    method = run.build()
    if run.init_from and not checkpoint.checkpoint_exists(output_dir / "checkpoint.safetensors"):
        pretrained.init_from_run(Path(run.init_from), method)
    method.to(torch_device)
    config = _resolve_config(run, torch_device)
    data = run.load_dataset("train"), run.load_dataset("test")
    return _train_and_evaluate(run, method, config, data, output_dir, loggers)


def train(
    method: Method,
    dataset: Dataset[Any],
    config: TrainConfig | None = None,
    output_dir: str | Path | None = None,
    *,
    test_set: Dataset[Any] | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
) -> Run:
    """Train a method on a data set, in a run directory as the command line makes it.

    The checkpoint, log, metrics and figures are the same. A method of `create_method` on an encoder of `create_encoder`
    can be rebuilt from config.json, so that all commands work on the directory. Another one is called "custom" there:
    it is trained and resumed from Python only.

    Args:
        method: the method; it is changed.
        dataset: training images: an ImageDataset, or any torch data set, see `data.from_dataset`; one that is not an
            ImageDataset is resized to the crop size of the method.
        config: hyperparameters; None for the defaults.
        output_dir: the run directory; None for runs/METHOD.
        test_set: test images, as `dataset`; without them there are neither metrics nor figures.
        device: the device or its name; None takes the first available of cuda, mps and cpu.
        resume: continue the run that is in the directory; method and data set have to be the same.
        loggers: receive the same metrics as log.jsonl.

    Returns:
        The finished run.

    Raises:
        InputError, KeyboardInterrupt: as `start_run`.
    """
    torch_device = distributed.init_distributed(choose_device(device))
    config = config or TrainConfig()
    crop_size = _crop_size(method) or (dataset.image_size if isinstance(dataset, ImageDataset) else None)
    if crop_size is None:
        raise InputError("The crop size of this method is unknown; give an ImageDataset, as from_dataset makes one.")
    train_set = _to_image_dataset(dataset, crop_size)
    data = train_set, None if test_set is None else _to_image_dataset(test_set, crop_size)
    run = _describe(method, train_set, config, crop_size)
    output_dir = Path(output_dir or Path("runs") / Path(run.method).stem)
    check_run_dir(run, output_dir, resume)
    method.to(torch_device).train()
    return _train_and_evaluate(run, method, _resolve_config(run, torch_device), data, output_dir, loggers)


def _to_image_dataset(dataset: Dataset[Any], size: int) -> ImageDataset:
    return dataset if isinstance(dataset, ImageDataset) else from_dataset(dataset, size)


def _crop_size(method: Method) -> int | None:
    """Return the side in pixels of what the encoder sees, as far as the options of method or encoder tell."""
    options: dict[str, Any] = method.config["options"] if method.config else {}
    size = options.get("crop_size") or (method.encoder.config or {}).get("image_size")
    return None if size is None else int(size)


def _describe(method: Method, dataset: ImageDataset, config: TrainConfig, crop_size: int) -> RunConfig:
    """Return the options of a run that was started in Python; what cannot be built by name is called "custom"."""
    encoder = method.encoder.config or {
        "name": CUSTOM, "class": _class_name(method.encoder), "image_size": crop_size
    }  # fmt: skip
    run = RunConfig(CUSTOM, dataset.name, dataset.image_size, encoder, {}, asdict(config))
    if method.config is not None and method.encoder.config is not None:
        named = replace(run, method=method.config["name"], method_options=method.config["options"])
        if _is_rebuilt_by(method, named):
            return named
    options = {"class": _class_name(method), "crop_size": crop_size, "feature_pooling": method.feature_pooling}
    return replace(run, method_options=options)


def _class_name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_rebuilt_by(method: Method, run: RunConfig) -> bool:
    """Return whether the options can be written as JSON and build a method with the same parameters and buffers.

    They do not if the method was changed after `create_method`, for example by `set_distillation_teacher`.
    """
    try:
        json.dumps(asdict(run))
        rebuilt = run.build().state_dict()
    except (InputError, TypeError):
        return False
    return {name: t.shape for name, t in rebuilt.items()} == {name: t.shape for name, t in method.state_dict().items()}


def _resolve_config(run: RunConfig, device: torch.device) -> TrainConfig:
    """Check the hyperparameters, resolve the precision, and print what is trained where."""
    config = TrainConfig(**run.train)
    check_train_config(config)
    config = replace(config, precision=choose_precision(config.precision, device))
    processes = f" in {distributed.world_size()} processes" if distributed.is_distributed() else ""
    distributed.print_once(f"Training {run.method} on {device} in {config.precision}{processes}.")
    return config


def check_dataset(run: RunConfig, method: Method, dataset: ImageDataset) -> None:
    """Raise InputError if the images are too few or too small for the run, or lack what the method needs."""
    for name in method.required_fields:
        value = getattr(dataset, name)
        if value is None or (isinstance(value, dict) and not value):
            raise InputError(f"{run.method} needs {name}, which {run.data} does not have; choose another --data.")
    if run.train["batch_size"] > len(dataset):
        raise InputError(
            f"--batch_size {run.train['batch_size']} exceeds the {len(dataset)} images of {run.data}; "
            f"give {len(dataset)} or less."
        )
    if run.crop_size > dataset.image_size:
        raise InputError(
            f"The images are {dataset.image_size} pixels wide, smaller than a crop of {run.crop_size}; "
            "give a smaller --crop_size, or a larger --image_size."
        )


def _train_and_evaluate(
    run: RunConfig,
    method: Method,
    config: TrainConfig,
    data: tuple[ImageDataset, ImageDataset | None],
    output_dir: Path,
    loggers: Sequence[Logger],
) -> Run:
    """Train in the run directory, evaluate and draw. The method is on its device; config has its precision resolved."""
    train_set, test_set = data
    check_dataset(run, method, train_set)
    check_batch_split(method, config.batch_size, config.grad_accum_steps)
    if config.compile:
        check_compile(method)
    method.prepare(train_set)
    initial = copy.deepcopy(method) if CUSTOM in (run.method, run.encoder["name"]) else None
    device = next(method.parameters()).device
    checkpoint.make_folder(output_dir)
    threads = Threads(config.threads, device)
    with checkpoint.lock_run_dir(output_dir), report_dead_workers(), threads:
        plan = _fit(run, method, config, data, output_dir, loggers, threads)
        if distributed.rank():
            return Run(output_dir, run, plan, {})
        trained = _load_trained(run, output_dir) if initial is None else _rebuild_trained(run, initial, output_dir)
        metrics: dict[str, Any] = {}
        if test_set is not None:
            metrics = _evaluate(run, trained, (train_set, test_set), output_dir, device)
            _visualize(run, trained, test_set, output_dir)
    return Run(output_dir, run, plan, metrics, trained.encoder if run.encoder["name"] == CUSTOM else None)


def _fit(
    run: RunConfig,
    method: Method,
    config: TrainConfig,
    data: tuple[ImageDataset, ImageDataset | None],
    output_dir: Path,
    loggers: Sequence[Logger],
    threads: Threads,
) -> Plan:
    """Train in the run directory, which is locked. Returns the plan as it was at the end."""
    (train_set, test_set), device = data, next(method.parameters()).device
    size = sum(t.nbytes for t in method.state_dict().values()) + 2 * sum(p.nbytes for p in method.parameters())
    checkpoint.check_disk_space(output_dir, 3 * size)
    move = train_set.device != device and fits_on_device(train_set.nbytes, device)
    resident = train_set.to(device) if move else train_set  # where nothing moves, Scenes are rendered as they come
    known = (output_dir / "config.json").exists()
    plan = read_run(output_dir)[1] if known else trainer.plan(method, resident, config, threads)
    plan = distributed.broadcast_object(plan)
    threads.count = min(threads.count, plan.threads or threads.count)
    distributed.print_once(f"{len(train_set)} images of {run.data}; {plan}.")
    record = partial(_write_config, run, _original_fingerprint(run, train_set, output_dir), output_dir / "config.json")
    record(plan)
    for finding in diagnostics.check_options(asdict(run), plan.steps, method):
        distributed.print_once(finding)
    candidates = method.num_candidates(config.batch_size)
    return trainer.fit(
        method, resident, config, plan, output_dir, _evaluation_while_training(run, train_set, test_set, device),
        export=lambda encoder: pretrained.save_encoder(encoder, output_dir / "encoder.safetensors", run.encoder),
        diagnose=lambda lines, steps: diagnostics.check_log(lines, steps, run.method_options, candidates),
        loggers=loggers, threads=threads, record=record,
    )  # fmt: skip


def _evaluation_while_training(
    run: RunConfig, train_set: ImageDataset, test_set: ImageDataset | None, device: torch.device
) -> Callable[[Encoder], dict[str, float]]:
    """Return the function that evaluates the encoder now and then; its images are loaded when it is first called."""

    @cache
    def subset(part: ImageDataset, n: int) -> ImageDataset:
        return part.subsample(n).to(device)

    def evaluate(encoder: Encoder) -> dict[str, float]:
        train_subset = subset(train_set, 4000)
        if test_set is None:
            features = extract_features(encoder, train_subset, run.crop_size, pooling=run.feature_pooling)
            return {"rank_me": rank_me(features)}
        return quick_evaluation(encoder, train_subset, subset(test_set, 1000), run.crop_size, run.feature_pooling)

    return evaluate


def _original_fingerprint(run: RunConfig, dataset: ImageDataset, output_dir: Path) -> dict[str, Any]:
    """Return the fingerprint of the images with which the run began, and warn if they have changed."""
    current = dataset.fingerprint
    path = output_dir / "config.json"
    original: dict[str, Any] = (checkpoint.read_json(path) if path.exists() else {}).get("data", current)
    if any(original[key] != current[key] for key in original.keys() & current.keys()):
        distributed.print_once(
            f"The images of {run.data} are not those with which the run began ({original['images']} then, "
            f"{current['images']} now); it continues with the current ones, and its weights will differ."
        )
    return original


def _write_config(run: RunConfig, fingerprint: dict[str, Any], path: Path, plan: Plan) -> None:
    """Write config.json; the first process does."""
    if distributed.rank() == 0:
        content = {"run": asdict(run), "plan": asdict(plan), "data": fingerprint}
        checkpoint.write_json(path, {"format_version": checkpoint.FORMAT_VERSION} | content)


def _load_trained(run: RunConfig, output_dir: Path) -> _Trained:
    """Load the networks of a finished run from its directory."""
    encoder = pretrained.load_encoder(output_dir)
    method_class = None if run.method == CUSTOM else get_method_class(run.method)
    method = load_run_method(output_dir) if method_class and issubclass(method_class, ImageTextMethod) else None
    assert method is None or isinstance(method, ImageTextMethod)
    return _Trained(encoder, random_init_encoder(run), "random", method)


def _rebuild_trained(run: RunConfig, initial: Method, output_dir: Path) -> _Trained:
    """Load the weights of a finished run into a copy of the method that was made in Python."""
    method = copy.deepcopy(initial)
    checkpoint.load_method_state(output_dir / "checkpoint.safetensors", method)
    for each in (initial, method):
        each.cpu().eval().requires_grad_(False)
    text_method = method if isinstance(method, ImageTextMethod) else None
    if run.encoder["name"] == CUSTOM:
        return _Trained(method.encoder, initial.encoder, "initial", text_method)
    return _Trained(method.encoder, random_init_encoder(run), "random", text_method)


def evaluate_run(
    output_dir: Path,
    data_name: str | None = None,
    data: tuple[ImageDataset, ImageDataset] | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Evaluate the encoder of a run and the same encoder with random weights; write metrics.json and print a table.

    Args:
        output_dir: the run directory.
        data_name: name of another data set than the run's own.
        data: train and test images, if they are loaded already.
        device: None takes the first available of cuda, mps and cpu.

    Returns:
        The content of metrics.json, name and sizes of the data set, the metrics of `evaluate_encoder` and, for a method
        with text, of `evaluate_zero_shot`. Metrics with random weights have the prefix `random_`.

    Raises:
        InputError: if there is no run, or its encoder or data set was made in Python.
    """
    run, _ = read_run(output_dir)
    run = replace(run, data=data_name or run.data)
    trained = _load_trained(run, output_dir)
    data = data or (run.load_dataset("train"), run.load_dataset("test"))
    return _evaluate(run, trained, data, output_dir, device or choose_device())


def _evaluate(
    run: RunConfig,
    trained: _Trained,
    data: tuple[ImageDataset, ImageDataset],
    output_dir: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Evaluate the networks of a run; write metrics.json and print a table. Returns the metrics."""
    train_set, test_set = (part.subsample(n).to(device) for part, n in zip(data, (20_000, 5_000)))
    results, baseline = (
        evaluate_encoder(encoder.to(device), train_set, test_set, run.crop_size, run.feature_pooling)
        for encoder in (trained.encoder, trained.baseline)
    )
    if trained.text_method is not None:
        results |= evaluate_zero_shot(trained.text_method.to(device), test_set, run.crop_size)
    metrics = {"data": run.data, "train_images": len(train_set), "test_images": len(test_set), **results}
    metrics |= {f"{trained.baseline_name}_{name}": value for name, value in baseline.items()}
    checkpoint.write_json(output_dir / "metrics.json", metrics)
    print(f"{'':24}{'trained':>10}{trained.baseline_name:>10}   ({len(test_set)} test images of {run.data})")
    for name, value in results.items():
        print(f"{name:24}{value:10.3f}" + (f"{baseline[name]:10.3f}" if name in baseline else ""))
    return metrics


def visualize_run(output_dir: Path, test_set: ImageDataset | None = None, data_name: str | None = None) -> None:
    """Draw attention.png, pca.png, curves.png and collapse.png of a run into its directory.

    Args:
        output_dir: the run directory.
        test_set: test images, if they are loaded already.
        data_name: name of another data set than the run's own.

    Raises:
        InputError: if there is no run, or its encoder or data set was made in Python.
    """
    run, _ = read_run(output_dir)
    run = replace(run, data=data_name or run.data)
    trained = _load_trained(run, output_dir)
    _visualize(run, trained, test_set or run.load_dataset("test"), output_dir)


def _visualize(run: RunConfig, trained: _Trained, test_set: ImageDataset, output_dir: Path) -> None:
    from minissl.visualization import attention_figure, collapse_figure, curves_figure, pca_figure

    encoder, baseline = (network.cpu() for network in (trained.encoder, trained.baseline))
    images = test_set.subsample(2000)
    examples = images.subsample(8)
    metrics = checkpoint.read_json(output_dir / "metrics.json")
    num_prototypes, log = run.method_options.get("num_prototypes"), read_log(output_dir / "log.jsonl")
    features, baseline_features = (
        extract_features(network, images, run.crop_size, pooling=run.feature_pooling) for network in (encoder, baseline)
    )
    figures = {
        "attention": attention_figure(encoder, examples.images, run.crop_size, masks=examples.masks),
        "pca": pca_figure(encoder, images.images[:: max(len(images) // 16, 1)][:16], _pca_size(encoder, run.crop_size)),
        "curves": curves_figure(log, num_prototypes, metrics.get(f"{trained.baseline_name}_knn")),
        "collapse": collapse_figure(features, baseline_features),
    }
    for name, figure in figures.items():
        content = BytesIO()
        figure.savefig(content, dpi=130)
        checkpoint.write_atomic(output_dir / f"{name}.png", content.getvalue())
    print(f"Figures: {', '.join(str(output_dir / name) + '.png' for name in figures)}")


def _pca_size(encoder: Encoder, crop_size: int) -> int:
    """Return twice the crop size, which gives a finer feature map, or the crop size if the encoder needs that size."""
    try:
        encoder(torch.zeros(1, 3, 2 * crop_size, 2 * crop_size))
    except (AssertionError, RuntimeError, ValueError):  # of a network that is not minissl's
        return crop_size
    return 2 * crop_size


def export_run(output_dir: Path, path: Path, form: str = "minissl") -> None:
    """Write a run's method to one small file that `hub.pretrained` loads, with a card beside it (.json).

    Args:
        output_dir: the run directory.
        path: the file; a folder for "huggingface".
        form: "minissl", or "timm" or "huggingface" for the encoder alone in the format of these libraries.

    Raises:
        InputError: if the run cannot be exported in this form, has not been evaluated, or the file cannot be written.
    """
    if form != "huggingface" and path.suffix != ".safetensors":
        raise InputError(f"{path} is not the name of a safetensors file; end it in .safetensors.")
    if path.stem in RUN_FILES:
        checkpoint.refuse_run_dir(path.parent)
    if form != "minissl":
        export.export_encoder(pretrained.load_encoder(output_dir), path, form)
        print(f"Written for {form}: {path}")
        return
    run, plan = read_run(output_dir)
    metrics = checkpoint.read_json(output_dir / "metrics.json")
    if not metrics:
        raise InputError(f"{output_dir} has not been evaluated; wait for the run, or: minissl evaluate {output_dir}")
    checkpoint.make_folder(path.parent)
    pretrained.save_method(load_run_method(output_dir), path)
    card = {"run": asdict(run), "plan": asdict(plan), "metrics": metrics}
    checkpoint.write_json(path.with_suffix(".json"), {"format_version": checkpoint.FORMAT_VERSION} | card)
    print(f"Written: {path}, {path.stat().st_size / 1e6:.1f} MB, and its card {path.with_suffix('.json')}")
