"""Runs with a planted problem get exactly its diagnosis; healthy runs get none."""

import json
import math
import re
from dataclasses import asdict
from functools import wraps
from pathlib import Path

import pytest
import torch

from minissl.cli import main, train_parser
from minissl.data import registry
from minissl.data.synthetic.scenes import Scenes
from minissl.errors import InputError
from minissl.methods import dino, list_methods, simclr
from minissl.methods.registry import get_method_class, method_options
from minissl.models.factory import create_encoder
from minissl.training import checkpoint, diagnostics, logger, run_config, trainer
from minissl.training.config import TrainConfig
from minissl.training.plan import Plan
from minissl.training.run import RunConfig
from tests.golden import tiny_vit
from tests.runs import ToyMethod

# Options with which a tiny run of any method learns; each method takes those that it has.
HEALTHY = {"crop_size": 16, "local_crop_size": 8, "num_local_crops": 1}
HEALTHY |= {"global_crops_scale": (0.5, 1.0), "local_crops_scale": (0.25, 0.6)}
HEALTHY |= {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16, "use_bn_in_head": True}
HEALTHY |= {"koleo_loss_weight": 0.3, "sinkhorn_iterations": 3}
HEALTHY |= {"teacher_temp": 0.02, "warmup_teacher_temp": 0.02, "teacher_momentum": 0.9, "num_classes": 10}
HEALTHY |= {
    "crop_scale": (0.6, 1.0),
    "jitter_strength": 0.5,
    "blur_prob": 0.0,
    "temperature": 0.2,
    "projection_dim": 32,
}
HEALTHY |= {"embed_dim": 16, "text_width": 32, "text_layers": 1, "text_heads": 2, "vocab_size": 700}
HEALTHY |= {"context_length": 24, "decoder_dim": 32, "decoder_depth": 1, "gram_crop_scale": 1.0}


@pytest.fixture(autouse=True)
def tiny_runs(monkeypatch):
    """Use few images and a tiny encoder, and log every step."""
    monkeypatch.setattr(registry, "Scenes", lambda split, size, *args, **kwargs: Scenes(split, size, 256))
    options = {"stem": "deep_conv", "isolated_patches": True}  # MAE's
    tiny = wraps(create_encoder)(lambda **_: tiny_vit(4, 16, **options))
    monkeypatch.setattr(run_config, "create_encoder", tiny)
    monkeypatch.setattr(run_config.pretrained, "load_weights", lambda encoder, weights: None)
    monkeypatch.setattr(logger.Interval, "due", lambda self: self.seconds == 1.0)


def write_run(output_dir, name, steps=100, train=None, **options):
    """Write a run directory with config.json only. Returns the run."""
    defaults = {p.name: p.default for p in method_options(get_method_class(name)).values()}
    options = defaults | {key: value for key, value in (HEALTHY | options).items() if key in defaults}
    config = TrainConfig(**{"batch_size": 16, "lr": 2e-3, "precision": "fp32", "eval_minutes": 9.0} | (train or {}))
    encoder = {"name": "nano", "image_size": 16, "weights": "runs/x"}  # some methods need a pretrained encoder
    run = RunConfig(name, "scenes", 16, encoder, options, asdict(config))
    output_dir.mkdir(exist_ok=True)
    checkpoint.write_json(output_dir / "config.json", {"run": asdict(run), "plan": asdict(Plan(steps, 0.01, 0))})
    return run


def train_run(output_dir, name, steps=100, spoil=lambda images: images, **options):
    """Train in a run directory, and diagnose meanwhile; `spoil` changes the images (N, 3, H, W)."""
    run = write_run(output_dir, name, steps, **options)
    method, config = run.build(), TrainConfig(**run.train)
    data = run.load_dataset("train").subsample(256)
    data.images.copy_(spoil(data.images))
    method.prepare(data)
    num_candidates = method.num_candidates(config.batch_size)
    trainer.fit(
        method, data, config, Plan(steps), output_dir, lambda encoder: {"knn": 0.5}, lambda encoder: None,
        lambda lines, steps: diagnostics.check_log(lines, steps, run.method_options, num_candidates),
    )  # fmt: skip


def write_log(output_dir, **terms):
    """Write a log of 200 steps; a term is a function of the progress."""
    lines = [{"step": i + 1, **{name: f(i / 200) for name, f in terms.items()}} for i in range(200)]
    (output_dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def diagnose(output_dir, capsys):
    """Return the names of the findings that the command `doctor` prints."""
    capsys.readouterr()
    code = main(["doctor", str(output_dir)])
    output = capsys.readouterr()
    names = re.findall(r"^([A-Za-z][\w -]+): ", output.out, re.MULTILINE)
    assert code == (1 if names else 0), output.err
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_a_healthy_run_of_every_method_has_no_findings(name, tmp_path, capsys):
    train_run(tmp_path, name)
    output = "".join(capsys.readouterr())
    assert not any(cause in output for cause in diagnostics.CAUSES)
    assert diagnose(tmp_path, capsys) == []


OPTIONS = [
    ("dino", {"train": {"batch_size": 1}}, "batch too small"),
    ("clip", {"train": {"batch_size": 1}}, "batch too small"),
    ("simclr", {"train": {"batch_size": 2}}, "batch too small"),
    ("dino", {"train": {"lr": 2e-3 * (1024 / 128) ** 2, "batch_size": 1024}}, "high learning rate"),
    ("simclr", {"train": {"lr": 1.7}}, "high learning rate"),  # that of LARS, with AdamW
    ("dino", {"teacher_momentum": 0.996}, "slow teacher"),
    ("dino", {"teacher_momentum": 0.0}, "no EMA"),
    ("dino", {"sinkhorn_iterations": 0, "stop_gradient": False}, "no stop-gradient"),
    ("dino", {"teacher_temp": 0.3}, "soft teacher"),
    ("dino", {"warmup_teacher_temp": 0.1}, "soft teacher"),
    ("dino", {"sinkhorn_iterations": 0, "center_momentum": 1.0}, "slow centering"),
    ("dino", {"num_prototypes": 65_536}, "too many prototypes"),
    ("simclr", {"temperature": 10.0}, "high temperature"),
    ("dino", {"local_crop_size": 4}, "small crops"),
]


@pytest.mark.parametrize(("name", "options", "cause"), OPTIONS)
def test_a_problem_in_the_options_is_found_before_training(name, options, cause, tmp_path, capsys):
    write_run(tmp_path, name, **options)
    assert diagnose(tmp_path, capsys) == [cause]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("transfer", {"train": {"batch_size": 1}}),  # labels, not other images, are the targets
        ("dino", {"train": {"lr": 2e-3 * 1024 / 128, "batch_size": 1024}}),  # scaled once
        ("dino", {"teacher_momentum": 0.996, "steps": 3000}),
        ("dino", {"center_momentum": 1.0}),  # Sinkhorn-Knopp replaces centering
        ("dino", {"local_crop_size": 4, "num_local_crops": 0}),
        ("dino", {"teacher_momentum": 0.996, "num_prototypes": 4096, "steps": 10}),  # a test of the code
        *((name, {}) for name in list_methods()),
    ],
)
def test_options_that_are_no_problem_are_not_reported(name, options, tmp_path, capsys):
    write_run(tmp_path, name, **options)
    assert diagnose(tmp_path, capsys) == []


class MethodOfPresets(ToyMethod):
    """A method that is not built from its options."""

    def __init__(self, patch_size, presets):
        super().__init__()
        self.encoder.patch_size, self.presets = patch_size, presets

    def num_candidates(self, batch_size):
        return {"loss": batch_size}


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_presets_have_no_findings(name, preset, monkeypatch):
    monkeypatch.undo()
    options = train_parser(name, preset).parse_args([]).as_dict()
    train = {key: options[key] for key in asdict(TrainConfig())}
    sections = {"encoder": options["encoder"], "train": train}
    sections["method_options"] = {k: v for k, v in options.items() if k not in train and k != "encoder"}
    method = MethodOfPresets(options["encoder"]["patch_size"], get_method_class(name).presets)
    steps = 5000 if preset == "cpu" else 100_000
    assert diagnostics.check_options(sections, steps, method) == []


@pytest.mark.parametrize("name", ["simclr", "clip", "rotation"])
def test_equal_images_leave_the_loss_at_chance_level(name, tmp_path, capsys):
    """At ln(2B - 1), ln B and ln 4."""
    train_run(tmp_path, name, spoil=torch.zeros_like)
    assert "".join(capsys.readouterr()).count("chance-level loss: ") == 1
    assert diagnose(tmp_path, capsys) == ["chance-level loss"]


@pytest.mark.slow
def test_a_teacher_hardly_sharper_than_the_student_collapses_to_uniform(tmp_path, capsys):
    soft = {"teacher_temp": 0.099, "warmup_teacher_temp": 0.099}
    train_run(tmp_path, "dino", sinkhorn_iterations=0, koleo_loss_weight=0.0, use_bn_in_head=False, **soft)
    assert "uniform collapse: " in "".join(capsys.readouterr())
    assert diagnose(tmp_path, capsys) == ["uniform collapse"]


@pytest.mark.slow
def test_without_centering_the_teacher_collapses_to_one_hot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dino, "update_center", lambda center, logits, momentum: center)
    train_run(tmp_path, "dino", sinkhorn_iterations=0, koleo_loss_weight=0.0, use_bn_in_head=False)
    assert diagnose(tmp_path, capsys) == ["one-hot collapse"]


@pytest.mark.slow
def test_a_large_weight_of_koleo_dominates(tmp_path, capsys):
    train_run(tmp_path, "dino", koleo_loss_weight=100.0)
    assert diagnose(tmp_path, capsys) == ["KoLeo dominates"]


def test_a_loss_that_is_not_finite_is_in_the_log_and_is_found(tmp_path, capsys, monkeypatch):
    nt_xent, calls = simclr.nt_xent, []

    def spoiled(*args):
        calls.append(1)
        return nt_xent(*args) * (math.inf if len(calls) == 7 else 1)

    monkeypatch.setattr(simclr, "nt_xent", spoiled)
    with pytest.raises(InputError, match="inf at step 7"):
        train_run(tmp_path, "simclr")
    assert diagnose(tmp_path, capsys) == ["non-finite loss"]


LOGS = [
    ("transfer", {"loss": lambda p: 2.3 + 0.02 * math.sin(40 * p)}, ["chance-level loss"]),
    ("dino", {"loss": lambda p: 8.0, "teacher_entropy": lambda p: 1.8, "koleo": lambda p: 33.0}, ["complete collapse"]),
    ("dino", {"loss": lambda p: 3.0, "teacher_entropy": lambda p: 1.8, "koleo": lambda p: -0.68}, ["KoLeo dominates"]),
    ("simclr", {"loss": lambda p: 2 + 1.5 * p}, ["rising loss"]),
    ("simclr", {"loss": lambda p: 3 - p, "knn": lambda p: 0.3 + p - p * p}, ["degrading features"]),
    ("simclr", {"loss": lambda p: 3 - p, "knn": lambda p: 0.3 + p / 2 + 0.02 * math.sin(40 * p)}, []),
    ("simclr", {"loss": lambda p: math.log(31) - 3 * max(p - 0.4, 0)}, []),  # learns late
    # A sharper teacher gives a harder task: the loss may rise.
    ("dino", {"loss": lambda p: 0.5 + p, "teacher_entropy": lambda p: 0.3, "koleo": lambda p: 0.5}, []),
    ("dino", {"loss": lambda p: 2.8, "teacher_entropy": lambda p: 0.01, "koleo": lambda p: 0.5}, []),
    ("rotation", {"loss": lambda p: 1.0}, []),
]


@pytest.mark.parametrize(("name", "terms", "causes"), LOGS)
def test_a_problem_in_the_log_is_found(name, terms, causes, tmp_path, capsys):
    write_run(tmp_path, name, 200)
    write_log(tmp_path, **terms)
    assert diagnose(tmp_path, capsys) == causes


def test_chance_level_early_in_a_run_is_not_reported():
    lines = [{"step": step, "loss": math.log(31)} for step in range(1, 200)]
    assert [f.name for f in diagnostics.check_log(lines, 200, {}, {"loss": 31})] == ["chance-level loss"]
    assert diagnostics.check_log(lines, 1000, {}, {"loss": 31}) == []
    assert diagnostics.check_log(lines[:90], 90, {}, {"loss": 31}) == []
    assert diagnostics.check_log([], 200, {}, {"loss": 31}) == []


def edit_checkpoint(output_dir, change):
    """Apply change(name, tensor) to all tensors of a checkpoint."""
    tensors, info = checkpoint.load_tensors(output_dir / "checkpoint.safetensors")
    tensors = {name: change(name, t) for name, t in tensors.items()}
    checkpoint.save_tensors(output_dir / "checkpoint.safetensors", tensors, info)


def two_prototypes(name, tensor):
    """Make all prototypes but one equal."""
    if not name.endswith("last_layer.weight"):
        return tensor
    return torch.cat([tensor[:1], -tensor[:1].expand_as(tensor[1:])])


def constant_features(name, tensor):
    """Make the final norm's output nearly constant."""
    scales = {"network.norm.weight": 1e-3, "network.norm.bias": 1.0}
    return next((torch.full_like(tensor, value) for key, value in scales.items() if name.endswith(key)), tensor)


@pytest.mark.slow
def test_problems_that_only_the_features_show_are_found(tmp_path, capsys):
    train_run(tmp_path, "dino")
    path = tmp_path / "checkpoint.safetensors"
    original = path.read_bytes()
    edit_checkpoint(tmp_path, two_prototypes)
    assert diagnose(tmp_path, capsys) == ["dead prototypes"]
    path.write_bytes(original)
    edit_checkpoint(tmp_path, constant_features)
    assert diagnose(tmp_path, capsys) == ["dimensional collapse"]
    path.write_bytes(original)
    metrics = {"knn": 0.2, "random_knn": 0.21, "rank_me": 9.0, "random_rank_me": 1.4}
    checkpoint.write_json(tmp_path / "metrics.json", metrics)
    assert diagnose(tmp_path, capsys) == ["no gain over random init"]
    checkpoint.write_json(tmp_path / "metrics.json", metrics | {"knn": 0.3})
    assert diagnose(tmp_path, capsys) == []


def test_every_option_in_a_remedy_exists():
    known = {a for n in list_methods() for action in train_parser(n, "cpu")._actions for a in action.option_strings}
    for meaning, remedy in diagnostics.CAUSES.values():
        for option in re.findall(r"--[\w.]+\w", meaning + remedy):
            assert option in known, option


def test_every_cause_is_found_by_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [cause for cause in diagnostics.CAUSES if f'"{cause}"' not in source] == []


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
