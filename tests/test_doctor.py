"""Runs broken on purpose get the right name, one of them; healthy ones get none."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from minissl.training import checkpoint, run, diagnostics, logger, run, trainer
from minissl.cli import main, train_parser
from minissl.data import registry
from minissl.data.synthetic.scenes import Scenes
from minissl.errors import InputError
from minissl.training.device import Plan
from minissl.methods.registry import list_methods, get_method_class
from minissl.methods.registry import method_options as options_of
from minissl.methods import dino, simclr
from minissl.training.config import TrainConfig
from tests.golden import tiny_vit

# What a tiny run of any method learns with; each takes the options it has.
HEALTHY = {"size": 16, "local_size": 8, "local_crops": 1, "global_scale": (0.5, 1.0), "local_scale": (0.25, 0.6)}
HEALTHY |= {"prototypes": 32, "hidden": 32, "bottleneck": 16, "batch_norm": True, "koleo": 0.3, "sinkhorn": 3}
HEALTHY |= {"teacher_temperature": 0.02, "warmup_temperature": 0.02, "momentum": 0.9, "classes": 10}
HEALTHY |= {"scale": (0.6, 1.0), "strength": 0.5, "blur": 0.0, "temperature": 0.2, "projection": 32}
HEALTHY |= {"embedding": 16, "text_width": 32, "text_depth": 1, "text_heads": 2, "vocabulary": 700, "length": 24}
HEALTHY |= {"decoder_width": 32, "decoder_depth": 1, "anchor_scale": 1.0}


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """A few scenes, a tiny encoder, and a log with a line for every step."""
    monkeypatch.setattr(registry, "Scenes", lambda split, size, seed: Scenes(split, size, 256, seed))
    monkeypatch.setattr(run, "make_encoder", lambda **choices: tiny_vit(4, 16, "conv"))
    monkeypatch.setattr(run.pretrained, "put", lambda encoder, where: None)
    monkeypatch.setattr(logger.Interval, "__call__", lambda self: self.seconds == 1.0)


def write_run(out, name, steps=100, loop=None, **options):
    """A run's folder with nothing but its options. Returns the run."""
    defaults = {p.name: p.default for p in options_of(get_method_class(name)).values()}
    options = defaults | {key: value for key, value in (HEALTHY | options).items() if key in defaults}
    config = TrainConfig(**{"batch_size": 16, "lr": 2e-3, "precision": "fp32", "watch_minutes": 9.0} | (loop or {}))
    encoder = {"name": "nano", "img_size": 16, "weights": "a run's"}  # some methods learn on a trained encoder only
    run = run.RunConfig(name, "scenes", 16, encoder, options, asdict(config))
    out.mkdir(exist_ok=True)
    checkpoint.write_json(out / "config.json", {"run": asdict(run), "plan": asdict(Plan(steps, 0.01, 0))})
    return run


def train_run(out, name, steps=100, spoil=lambda images: images, **options):
    """A run's folder, trained, with what the doctor says meanwhile; of images made by `spoil`, (N, 3, H, W)."""
    run = write_run(out, name, steps, **options)
    method, data, config = run.build(), run.images("train"), TrainConfig(**run.loop)
    data.images.copy_(spoil(data.images))
    run.prepare(method, data)
    among = diagnostics.num_candidates(method, config.batch_size)
    trainer.fit(
        method, data, config, steps, out, lambda encoder: {"knn": 0.5}, lambda encoder: None,
        lambda lines: diagnostics.check_log(lines, steps, run.options, among),
    )  # fmt: skip


def write_log(out, **terms):
    """A log of 200 steps; a term is a function of the share of the run."""
    lines = [{"step": i + 1, **{name: f(i / 200) for name, f in terms.items()}} for i in range(200)]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(out, capsys):
    """What the command says of a run: the names of its findings."""
    capsys.readouterr()
    code = main(["doctor", str(out)])
    text = capsys.readouterr().out
    assert ("Nothing looks wrong" in text) == (code == 0)
    assert code in (0, 1)
    return re.findall(r"^([a-z][\w -]+): ", text, re.MULTILINE)


@pytest.mark.parametrize("name", list_methods())
def test_a_healthy_run_of_every_method_hears_nothing(name, tmp_path, capsys):
    train_run(tmp_path, name)
    meanwhile = capsys.readouterr()
    assert "Turn" not in meanwhile.out + meanwhile.err
    assert said(tmp_path, capsys) == []


OPTIONS = [
    ("dino", {"loop": {"batch_size": 1}}, "lone batch"),
    ("clip", {"loop": {"batch_size": 1}}, "lone batch"),
    ("simclr", {"loop": {"batch_size": 2}}, "lone batch"),
    ("dino", {"loop": {"lr": 2e-3 * (1024 / 128) ** 2, "batch_size": 1024}}, "high rate"),
    ("simclr", {"loop": {"lr": 1.7}}, "high rate"),  # of LARS, with AdamW
    ("dino", {"momentum": 0.996}, "slow teacher"),
    ("dino", {"momentum": 0.0}, "no average"),
    ("dino", {"sinkhorn": 0, "stop_gradient": False}, "moving target"),
    ("dino", {"teacher_temperature": 0.3}, "blunt teacher"),
    ("dino", {"warmup_temperature": 0.1}, "blunt teacher"),
    ("dino", {"sinkhorn": 0, "center_momentum": 1.0}, "slow centre"),
    ("dino", {"prototypes": 65_536}, "many prototypes"),
    ("simclr", {"temperature": 10.0}, "warm contrast"),
    ("dino", {"local_size": 4}, "small crops"),
]


@pytest.mark.parametrize(("name", "options", "cause"), OPTIONS)
def test_a_cause_in_the_options_is_named_before_any_step(name, options, cause, tmp_path, capsys):
    write_run(tmp_path, name, **options)
    assert said(tmp_path, capsys) == [cause]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("transfer", {"loop": {"batch_size": 1}}),  # compares with labels, not with others
        ("dino", {"loop": {"lr": 2e-3 * 1024 / 128, "batch_size": 1024}}),  # scaled once
        ("dino", {"momentum": 0.996, "steps": 3000}),
        ("dino", {"center_momentum": 1.0}),  # Sinkhorn-Knopp stands in
        ("dino", {"local_size": 4, "local_crops": 0}),
        ("dino", {"momentum": 0.996, "prototypes": 4096, "steps": 10}),  # a trial
        *((name, {}) for name in list_methods()),
    ],
)
def test_options_that_may_be_so_are_not_blamed(name, options, tmp_path, capsys):
    write_run(tmp_path, name, **options)
    assert said(tmp_path, capsys) == []


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_presets_are_not_blamed(name, preset, tmp_path, monkeypatch):
    monkeypatch.undo()
    asked = train_parser(name, preset).parse_args([]).as_dict()
    method = nn.Module()
    method.encoder, method.presets, method.guesses = nn.Module(), get_method_class(name).presets, lambda size: {"loss": size}
    method.encoder.patch_size = asked["encoder"]["patch_size"]
    assert (
        diagnostics.check_options({"encoder": asked["encoder"], "loop": {}, "options": {}} | split(asked), 5000, method) == []
    )


def split(asked):
    loop = {key: asked[key] for key in asdict(TrainConfig())}
    return {"loop": loop, "options": {k: v for k, v in asked.items() if k not in loop and k != "encoder"}}


def black(images):
    return torch.zeros_like(images)


@pytest.mark.parametrize("name", ["simclr", "clip", "pretext"])
def test_images_that_are_all_alike_leave_a_loss_at_chance(name, tmp_path, capsys):
    """ln(2B - 1), ln B and ln 4."""
    train_run(tmp_path, name, spoil=black)
    meanwhile = capsys.readouterr()
    assert (meanwhile.out + meanwhile.err).count("guessing: ") == 1
    assert said(tmp_path, capsys) == ["guessing"]


def test_a_teacher_hardly_sharper_than_the_student_ends_uniform(tmp_path, capsys):
    soft = {"teacher_temperature": 0.099, "warmup_temperature": 0.099}
    train_run(tmp_path, "dino", sinkhorn=0, koleo=0.0, batch_norm=False, **soft)
    assert "uniform: " in "".join(capsys.readouterr())
    assert said(tmp_path, capsys) == ["uniform"]


def test_a_forgotten_centre_ends_one_hot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dino, "update_center", lambda center, logits, momentum: center)
    train_run(tmp_path, "dino", sinkhorn=0, koleo=0.0, batch_norm=False)
    assert said(tmp_path, capsys) == ["one-hot"]


def test_too_much_koleo_spreads_and_does_nothing_else(tmp_path, capsys):
    train_run(tmp_path, "dino", koleo=100.0)
    assert said(tmp_path, capsys) == ["spread only"]


def test_a_loss_that_is_no_number_is_in_the_log_and_named(tmp_path, capsys, monkeypatch):
    honest, calls = simclr.nt_xent, []

    def spoilt(*args):
        calls.append(1)
        return honest(*args) * (math.inf if len(calls) == 7 else 1)

    monkeypatch.setattr(simclr, "nt_xent", spoilt)
    with pytest.raises(InputError, match="inf at step 7"):
        train_run(tmp_path, "simclr")
    assert said(tmp_path, capsys) == ["not finite"]


LOGS = [
    ("transfer", {"loss": lambda p: 2.3 + 0.02 * math.sin(40 * p)}, ["guessing"]),
    ("dino", {"loss": lambda p: 8.0, "teacher_entropy": lambda p: 1.8, "koleo": lambda p: 33.0}, ["one vector"]),
    ("dino", {"loss": lambda p: 3.0, "teacher_entropy": lambda p: 1.8, "koleo": lambda p: -0.68}, ["spread only"]),
    ("simclr", {"loss": lambda p: 2 + 1.5 * p}, ["rising"]),
    ("simclr", {"loss": lambda p: 3 - p, "knn": lambda p: 0.3 + p - p * p}, ["forgetting"]),
    ("simclr", {"loss": lambda p: 3 - p, "knn": lambda p: 0.3 + p / 2 + 0.02 * math.sin(40 * p)}, []),
    ("simclr", {"loss": lambda p: math.log(31) - 3 * max(p - 0.4, 0)}, []),  # late to learn, but it does
    # A teacher that sharpens gives a harder task: the loss may rise.
    ("dino", {"loss": lambda p: 0.5 + p, "teacher_entropy": lambda p: 0.3, "koleo": lambda p: 0.5}, []),
    ("dino", {"loss": lambda p: 2.8, "teacher_entropy": lambda p: 0.01, "koleo": lambda p: 0.5}, []),
    ("pretext", {"loss": lambda p: 1.0}, []),
]


@pytest.mark.parametrize(("name", "terms", "causes"), LOGS)
def test_a_log_is_read_as_a_person_would(name, terms, causes, tmp_path, capsys):
    write_run(tmp_path, name, 200)
    write_log(tmp_path, **terms)
    assert said(tmp_path, capsys) == causes


def test_the_same_numbers_early_in_a_run_mean_nothing():
    lines = [{"step": step, "loss": math.log(31)} for step in range(1, 200)]
    assert [f.name for f in diagnostics.check_log(lines, 200, {}, {"loss": 31})] == ["guessing"]
    assert diagnostics.check_log(lines, 1000, {}, {"loss": 31}) == []
    assert diagnostics.check_log(lines[:90], 90, {}, {"loss": 31}) == []
    assert diagnostics.check_log([], 200, {}, {"loss": 31}) == []


def edit(out, change):
    """Change the method that a run has saved."""
    tensors, info = checkpoint.load_tensors(out / "checkpoint.safetensors")
    checkpoint.save_tensors(out / "checkpoint.safetensors", {k: change(k, t) for k, t in tensors.items()}, info)


def test_what_only_the_encoder_shows(tmp_path, capsys):
    train_run(tmp_path, "dino")
    whole = (tmp_path / "checkpoint.safetensors").read_bytes()

    def two_left(key, tensor):
        return (
            torch.cat([tensor[:1], -tensor[:1].expand_as(tensor[1:])]) if key.endswith("last_layer.weight") else tensor
        )

    edit(tmp_path, two_left)
    assert said(tmp_path, capsys) == ["dead prototypes"]
    (tmp_path / "checkpoint.safetensors").write_bytes(whole)
    edit(tmp_path, lambda key, t: t * 0 + 1 if re.search(r"network.norm.(weight|bias)", key) else t)
    edit(tmp_path, lambda key, t: t * 1e-3 if re.search(r"network.norm.weight", key) else t)
    assert said(tmp_path, capsys) == ["one dimension"]
    (tmp_path / "checkpoint.safetensors").write_bytes(whole)
    numbers = {"knn": 0.2, "random_knn": 0.21, "rank_me": 9.0, "random_rank_me": 1.4}
    checkpoint.write_json(tmp_path / "metrics.json", numbers)
    assert said(tmp_path, capsys) == ["nothing learnt"]
    checkpoint.write_json(tmp_path / "metrics.json", numbers | {"knn": 0.3})
    assert said(tmp_path, capsys) == []


def test_every_option_a_finding_names_exists():
    known = {a for n in list_methods() for action in train_parser(n, "cpu")._actions for a in action.option_strings}
    assert len(diagnostics.CAUSES) >= 10
    for means, turn in diagnostics.CAUSES.values():
        for option in re.findall(r"--[\w.]+\w", means + turn):
            assert option in known, option


def test_every_cause_is_one_that_a_test_provokes():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [cause for cause in diagnostics.CAUSES if f'"{cause}"' not in source] == []


def test_a_folder_without_a_run_is_bad_input(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
