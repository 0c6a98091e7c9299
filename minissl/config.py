"""What was asked for: the options of a run, and the file that keeps them."""

import json
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minissl import checkpoint, pretrained
from minissl.data import Images, load
from minissl.encoders import make_encoder
from minissl.errors import InputError
from minissl.machine import Plan
from minissl.method import find, options
from minissl.train import TrainConfig


@dataclass(frozen=True)
class Run:
    """What was asked for; `config.json` holds it.

    Attributes:
        method: its name.
        data: the data set's name.
        image_size: pixels a side the images are kept at.
        encoder: arguments of `make_encoder`, `img_size` among them.
        options: keyword arguments of the method; `size` is the pixels its encoder sees.
        loop: arguments of `train.TrainConfig`.
        start: folder of a run whose end this one begins at; "" for none.
        teacher: a run's folder, or a method's exported file, that this one distils; "" for none.
    """

    method: str
    data: str
    image_size: int
    encoder: dict[str, Any]
    options: dict[str, Any]
    loop: dict[str, Any]
    start: str = ""
    teacher: str = ""

    @property
    def size(self) -> int:
        return self.encoder["img_size"]

    @property
    def reads(self) -> str:
        """What the features of its encoder are, for `evaluate.extract`."""
        return getattr(find(self.method), "reads", "cls")

    def build(self) -> nn.Module:
        """The method as it is before the first step; the same every time."""
        torch.manual_seed(self.loop["seed"])
        kind = find(self.method)
        if getattr(kind, "frozen", False) and self.encoder.get("weights", "none") == "none":
            raise InputError(f"{self.method} learns on a trained encoder; say which, as --encoder.weights runs/dinov3.")
        weights = self.encoder.get("weights", "none")
        trained = weights not in ("none", "imagenet")
        encoder = make_encoder(**self.encoder | ({"weights": "none"} if trained else {}))
        if trained:
            pretrained.put(encoder, weights)
        method = kind(encoder, **self.options)
        if self.teacher and not hasattr(method, "learn_from"):
            raise InputError(f"{self.method} does not distil; leave --teacher out, or train dinov3.")
        if self.teacher:
            method.learn_from(load_method(self.teacher))
        return method

    def images(self, split: str) -> Images:
        return load(self.data, split, self.image_size, at_least=self.size)


def read(out: Path) -> tuple[Run, Plan]:
    """The run a folder holds. Raises InputError if it holds none, or its config.json is damaged."""
    path = out / "config.json"
    if not path.is_file():
        raise InputError(f"{out} holds no run; train one with --out {out}.")
    content = checkpoint.read_json(path)
    try:
        run, plan = Run(**content["run"]), Plan(**content["plan"])
        kept = dict(run.encoder), dict(run.options), dict(run.loop)
    except (KeyError, TypeError, ValueError):
        raise checkpoint.damaged(path) from None
    # A run from before there was some option was made as its default makes it, and may be gone on with.
    makers = (signature(make_encoder).parameters, options(find(run.method)))
    encoder, own = ({k: p.default for k, p in found.items() if p.default is not p.empty} for found in makers)
    loop = asdict(TrainConfig())
    return replace(run, encoder=encoder | kept[0], options=own | kept[1], loop=loop | kept[2]), plan


def check_folder(run: Run, out: Path, resume: bool) -> None:
    """Raises InputError if training this run here would mix with, or overwrite, another."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out.")
    if not (out / "config.json").exists():
        return
    before, _ = read(out)
    if not resume:
        raise InputError(f"{out} already holds a run of {before.method}; go on with --resume, or choose another --out.")
    new, old = _flat(asdict(run)), _flat(asdict(before))
    for key in new | old:
        if new.get(key) != old.get(key):
            raise InputError(
                f"{out} holds a run with {key} {old.get(key)}, not {new.get(key)}; "
                "go on with the options it was started with, or choose another --out."
            )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """One level, and tuples as the lists that JSON makes of them."""
    flat = {k: v for k, v in config.items() if not isinstance(v, dict)}
    for section in config.values():
        flat |= section if isinstance(section, dict) else {}
    return json.loads(json.dumps(flat))


def load_method(name_or_path: str | Path) -> nn.Module:
    """A whole method in evaluation mode: of a run's folder, as it was last saved there, or of an exported file.

    Raises:
        InputError: if there is none.
    """
    out = Path(name_or_path)
    if not out.is_dir():
        return pretrained.load_method(name_or_path)
    method = read(out)[0].build()
    checkpoint.load_method(out / "checkpoint.safetensors", method)
    return method.eval().requires_grad_(False)


def untrained(run: Run) -> nn.Module:
    """The run's encoder with random weights."""
    torch.manual_seed(run.loop["seed"])
    return make_encoder(**run.encoder | {"weights": "none"}).eval().requires_grad_(False)
