"""Define the options of a run, and read them from config.json, the file that holds them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal

import torch

from minissl.data.images import ImageDataset
from minissl.data.registry import load_dataset
from minissl.errors import InputError, suggestion
from minissl.hub import pretrained
from minissl.methods.base import Method
from minissl.methods.registry import create_method, get_method_class, method_options
from minissl.models.factory import create_encoder
from minissl.models.outputs import Encoder
from minissl.training import checkpoint
from minissl.training.config import TrainConfig
from minissl.training.plan import Plan

CUSTOM = "custom"  # name of a method, an encoder or a data set that was made in Python and cannot be built by name


@dataclass(frozen=True)
class RunConfig:
    """Options of a run, as config.json holds them.

    Attributes:
        method: name of the method, or the absolute path of the Python file that defines it.
        data: name of the data set.
        image_size: side in pixels at which the images are stored.
        encoder: arguments of `create_encoder`, with image_size.
        method_options: keyword arguments of the method; crop_size is the side in pixels of what the encoder sees.
        train: arguments of TrainConfig.
        init_from: directory of the run whose final weights this one starts from; "" for none.
        teacher: directory of the run, or exported file of the method, that is distilled; "" for none.
    """

    method: str
    data: str
    image_size: int
    encoder: dict[str, Any]
    method_options: dict[str, Any]
    train: dict[str, Any]
    init_from: str = ""
    teacher: str = ""

    def __post_init__(self) -> None:
        if self.method.endswith(".py"):
            object.__setattr__(self, "method", str(Path(self.method).expanduser().resolve()))

    @property
    def crop_size(self) -> int:
        """Return the side in pixels of the images that the encoder sees."""
        return int(self.method_options.get("crop_size", self.encoder["image_size"]))

    @property
    def feature_pooling(self) -> Literal["cls", "both"]:
        """Return which tokens make an image's feature, see `Method`."""
        if self.method == CUSTOM:
            return "both" if self.method_options["feature_pooling"] == "both" else "cls"
        return get_method_class(self.method).feature_pooling

    def build(self) -> Method:
        """Build the method as it is before the first step; identical at every call.

        Raises:
            InputError: if the method or the encoder was made in Python, if an option is wrong, or if the method needs a
                pretrained encoder.
        """
        if CUSTOM in (self.method, self.encoder["name"]):
            raise InputError(
                "The method or the encoder of this run was made in Python and cannot be built from config.json; "
                "build it in Python and call minissl.train(..., resume=True)."
            )
        torch.manual_seed(self.train["seed"])
        weights = self.encoder.get("weights", "none")
        if get_method_class(self.method).requires_pretrained_encoder and weights == "none":
            raise InputError(f"{self.method} needs a pretrained encoder; give one, as --encoder.weights runs/dinov3.")
        pretrained_encoder = weights not in ("none", "imagenet")
        encoder = create_encoder(**self.encoder | ({"weights": "none"} if pretrained_encoder else {}))
        if pretrained_encoder:
            pretrained.load_weights(encoder, weights)
        method = create_method(self.method, encoder, **self.method_options)
        if self.teacher:
            method.set_distillation_teacher(load_run_method(self.teacher))
        return method

    def load_dataset(self, split: str) -> ImageDataset:
        """Load the "train" or "test" split of the data set. Raises InputError if it was made in Python."""
        if self.data == CUSTOM:
            raise InputError(
                "The data set of this run was made in Python and cannot be loaded by name; give --data NAME."
            )
        return load_dataset(self.data, split, self.image_size, min_size=self.crop_size)


def read_run(output_dir: Path) -> tuple[RunConfig, Plan]:
    """Read the options and the plan of a run directory. Options that are missing in the file take their defaults.

    Raises:
        InputError: if there is no run, or its config.json is damaged, of a newer format or has an unknown option.
    """
    path = output_dir / "config.json"
    if not path.is_file():
        raise InputError(f"{output_dir} holds no run; train one with --out {output_dir}.")
    content = checkpoint.read_json(path)
    checkpoint.check_format_version(path, content.get("format_version", checkpoint.FORMAT_VERSION))
    try:
        options = dict(content["run"])
        _check_known(path, options, signature(RunConfig).parameters)
        run, plan = RunConfig(**options), Plan(**content["plan"])
        plan = replace(plan, revisions=tuple((step, steps) for step, steps in plan.revisions))
        encoder, method, train = dict(run.encoder), dict(run.method_options), dict(run.train)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise checkpoint.damaged_file_error(path) from None
    if encoder.get("name") != CUSTOM:
        encoder = _complete(path, encoder, signature(create_encoder).parameters)
    if run.method != CUSTOM:
        method = _complete(path, method, method_options(get_method_class(run.method)))
    train = _complete(path, train, signature(TrainConfig).parameters)
    return replace(run, encoder=encoder, method_options=method, train=train), plan


def _complete(path: Path, options: dict[str, Any], known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return the options and the defaults of those that are missing. Raises InputError for an unknown option."""
    _check_known(path, options, known)
    return {name: p.default for name, p in known.items() if p.default is not p.empty} | options


def _check_known(path: Path, options: dict[str, Any], known: Mapping[str, Parameter]) -> None:
    for name in options:
        if name not in known:
            raise InputError(
                f"{path} has the unknown option {name!r}{suggestion(name, known)}; correct it, or train again in "
                "another --out."
            )


def check_run_dir(run: RunConfig, output_dir: Path, resume: bool) -> None:
    """Raise InputError if training in `output_dir` would overwrite another run, or continue it with other options."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir} is a file; choose another --out.")
    if not (output_dir / "config.json").exists():
        return
    previous, _ = read_run(output_dir)
    if not resume:
        raise InputError(
            f"{output_dir} holds a run of {previous.method} already; continue with --resume, or choose another --out."
        )
    new, old = _flatten(run), _flatten(previous)
    for name in new | old:
        if new.get(name) != old.get(name):
            raise InputError(
                f"{output_dir} holds a run with {name} {old.get(name)}, not {new.get(name)}; "
                "continue it with the options it was started with, or choose another --out."
            )


def _flatten(run: RunConfig) -> dict[str, Any]:
    """Return all options in one level, with tuples as lists, as JSON has them."""
    options = asdict(run)
    encoder, method, train = (options.pop(section) for section in ("encoder", "method_options", "train"))
    flat = options | {f"encoder.{name}": value for name, value in encoder.items()} | method | train
    return dict(json.loads(json.dumps(flat)))


def load_run_method(name_or_path: str | Path) -> Method:
    """Load a method with all its networks from the last checkpoint of a run directory, or from an exported file.

    Returns:
        The method in evaluation mode, without gradients.

    Raises:
        InputError: if there is none, or it was made in Python.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        return pretrained.load_method(name_or_path)
    method = read_run(path)[0].build()
    checkpoint.load_method_state(path / "checkpoint.safetensors", method)
    return method.eval().requires_grad_(False)


def random_init_encoder(run: RunConfig) -> Encoder:
    """Return the run's encoder with random weights of the run's seed, in evaluation mode, without gradients."""
    torch.manual_seed(run.train["seed"])
    return create_encoder(**run.encoder | {"weights": "none"}).eval().requires_grad_(False)
