"""The training loop: its parts equal their formulas, and a resumed run ends with the bits of an uninterrupted one."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from minissl.cli import main
from minissl.data import Images
from minissl.errors import InputError
from minissl.methods.registry import create_method
from minissl.training import device, run, trainer
from minissl.training.checkpoint import load_tensors
from minissl.training.config import TrainConfig, check_train_config
from minissl.training.device import check_compile, choose_device, choose_precision, compile_encoders
from minissl.training.logger import JsonLinesLogger, check_finite, read_log
from minissl.training.optimizers import clip_grad_per_tensor, param_groups
from minissl.training.plan import Plan
from minissl.training.sampler import EpochSampler, iterate_batches, seed_step
from minissl.training.schedules import cosine
from tests.folders import TINY, flat_folder
from tests.golden import tiny_vit
from tests.runs import ToyMethod, assert_same_bits, at_step, fit_toy, interrupt, numbered_images, saved_step

ROOT = Path(__file__).parent.parent
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def labeled_images(n: int = 8) -> Images:
    return Images(torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8), torch.arange(n) % 2, ("0", "1"))


def tiny_dino():
    return create_method("dino", tiny_vit(), num_prototypes=8, hidden_dim=8, bottleneck_dim=4)


def test_learn_trains_a_method_that_was_left_in_evaluation_mode():
    method = create_method("transfer", tiny_vit(stem="conv"), crop_size=16, num_classes=2).eval()
    before = {name: x.clone() for name, x in method.named_buffers() if "running_mean" in name}
    trainer.learn(method, labeled_images(), TrainConfig(batch_size=4, precision="fp32"), steps=2)
    assert before
    assert all(not torch.equal(x, before[name]) for name, x in method.named_buffers() if name in before)


def test_learn_returns_terms_and_metrics_of_every_step():
    metrics = iter(range(5))
    config = TrainConfig(batch_size=4, precision="fp32")
    history = trainer.learn(
        ToyMethod(), numbered_images(12), config, 6, lambda: {"metric": next(metrics)}, eval_every=2
    )
    assert [line.get("metric") for line in history] == [None, 0, None, 1, None, 2]
    assert all(isinstance(line["loss"], float) for line in history)


def test_learn_and_fit_take_the_same_steps(tmp_path):
    torch.manual_seed(0)
    one = ToyMethod()
    other = ToyMethod()
    other.load_state_dict(one.state_dict())
    trainer.learn(one, numbered_images(12), TrainConfig(batch_size=4, precision="fp32"), 10)
    fit_toy(tmp_path, other)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


def test_autocast_cache_left_by_an_exception_does_not_reach_the_next_training():
    data, config = labeled_images(), TrainConfig(batch_size=4, precision="bf16")

    def train_weights():
        torch.manual_seed(0)
        method = create_method("transfer", tiny_vit(), crop_size=16, num_classes=2)
        trainer.learn(method, data, config, steps=3)
        return torch.cat([p.detach().flatten() for p in method.parameters()])

    expected = train_weights()
    torch.autocast_increment_nesting()  # as if Ctrl-C had come inside of `torch.autocast.__enter__`
    try:
        assert torch.equal(train_weights(), expected)
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


def test_each_gradient_is_clipped_on_its_own():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    for scale, p in zip((10, 0.01), parameters):
        p.grad = scale * torch.randn_like(p)
    expected = []
    for p in parameters[:2]:
        norm = math.sqrt(sum(float(g) ** 2 for g in p.grad.flatten()))
        expected.append(p.grad * min(1.0, 3.0 / (norm + 1e-6)))
    clip_grad_per_tensor(parameters, 3.0)
    torch.testing.assert_close(parameters[0].grad, expected[0])
    torch.testing.assert_close(parameters[1].grad, expected[1])
    assert parameters[2].grad is None


def test_clipping_does_not_change_small_gradients():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, 2.0, 2.0 - 1e-3])  # the norm is just below 3
    before = parameter.grad.clone()
    clip_grad_per_tensor([parameter], 3.0)
    assert torch.equal(parameter.grad, before)


def test_vectors_and_biases_have_no_weight_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    decayed, plain = param_groups(model)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert plain["weight_decay"] == 0


def test_a_matrix_called_bias_has_no_weight_decay():
    model = nn.Sequential(nn.Module())
    model[0].bias = nn.Parameter(torch.zeros(2, 2))
    assert [len(group["params"]) for group in param_groups(model)] == [0, 1]


def test_tokens_position_embeddings_and_prototypes_are_decayed_as_in_dino():
    dino = tiny_dino()
    decayed = {id(p) for p in param_groups(dino)[0]["params"]}
    names = {name for name, p in dino.named_parameters() if id(p) in decayed}
    assert all(name.startswith("student.") for name in names)  # the teacher is not trained
    for name in ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight", "head.last_layer.weight"):
        assert f"student.{name}" in names
    assert not any(name.endswith(".bias") or "norm" in name for name in names)


def test_every_trainable_parameter_is_in_one_group():
    dino = tiny_dino()
    grouped = [id(p) for group in param_groups(dino) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in dino.parameters() if p.requires_grad)


def test_learning_rate_warms_up_and_weight_decay_grows():
    config = TrainConfig(lr=1.0, final_lr=0.1, warmup_fraction=0.1, weight_decay=0.04, final_weight_decay=0.4)
    optimizer = trainer.create_optimizer(ToyMethod(), config)
    assert [trainer.set_schedules(optimizer, config, p) for p in (0, 0.05, 0.1, 1.0)] == pytest.approx(
        [0, 0.5, 1.0, 0.1]
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1])
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.4, 0])


def test_schedules_end_at_schedule_fraction_and_are_constant_after_it():
    config = TrainConfig(
        lr=1.0, final_lr=0.0, warmup_fraction=0.5, weight_decay=0.04, final_weight_decay=0.4, schedule_fraction=0.4
    )
    optimizer = trainer.create_optimizer(ToyMethod(), config)
    lrs = [trainer.set_schedules(optimizer, config, p) for p in (0, 0.1, 0.2, 0.3, 0.3999, 0.4, 0.7, 1.0)]
    assert lrs == pytest.approx([0, 0.5, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0], abs=1e-3)
    decays = []
    for progress in (0, 0.2, 0.4):
        trainer.set_schedules(optimizer, config, progress)
        decays.append(optimizer.param_groups[0]["weight_decay"])
    assert decays == pytest.approx([0.04, 0.22, 0.04])


def test_weight_decay_follows_the_cosine_of_dino():
    """final + (base - final) (1 + cos(pi i / n)) / 2, as in the authors' main_dino.py."""
    optimizer = trainer.create_optimizer(ToyMethod(), TrainConfig())
    for i in range(10):
        trainer.set_schedules(optimizer, TrainConfig(), i / 10)
        expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / 10))
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)
        assert cosine(0.04, 0.4, i / 10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("grad_accum_steps", 0), ("schedule_fraction", 0.0), ("lr", -1.0), ("epochs", math.nan)],
)
def test_a_hyperparameter_out_of_range_is_refused(option, value):
    with pytest.raises(InputError, match=f"--{option} is {value}"):
        check_train_config(TrainConfig(**{option: value}))


def test_every_image_is_seen_once_per_epoch():
    batches = iterate_batches(numbered_images(12), 4, seed=0)
    first, second = (torch.cat([next(batches).labels for _ in range(3)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert not torch.equal(first, second)


def test_the_order_depends_on_the_seed_only():
    def first_two_epochs(seed):
        batches = iterate_batches(numbered_images(12), 4, seed)
        return torch.cat([next(batches).labels for _ in range(6)]).tolist()

    torch.manual_seed(1)
    order = first_two_epochs(0)
    torch.manual_seed(2)
    assert first_two_epochs(0) == order
    assert first_two_epochs(1) != order


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(InputError, match="--batch_size 8 exceeds the 5 images"):
        next(iterate_batches(Images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)), 8, seed=0))


def test_batches_can_start_at_any_step():
    batches = iterate_batches(numbered_images(13), 4, seed=1)
    labels = [next(batches).labels for _ in range(10)]
    for start in range(10):
        resumed = iterate_batches(numbered_images(13), 4, seed=1, start_step=start)
        assert all(torch.equal(next(resumed).labels, expected) for expected in labels[start:])


def test_labels_belong_to_their_images():
    batch = next(iterate_batches(numbered_images(12), 4, seed=0))
    assert torch.equal(batch.images[:, 0, 0, 0], batch.labels.to(torch.uint8))


def test_the_sampler_is_a_batch_sampler_of_a_data_loader():
    data = numbered_images(12)
    loader, batches = (
        iter(DataLoader(data, batch_sampler=EpochSampler(12, 4, seed=3))),
        iterate_batches(data, 4, seed=3),
    )
    for _ in range(4):
        assert torch.equal(next(loader)["label"], next(batches).labels)


def test_random_numbers_depend_on_seed_and_step_only():
    samples = []
    for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5)):
        seed_step(seed, step)
        samples.append((torch.rand(1).item(), random.random()))
    assert samples[0] == samples[1]
    assert len({first for first, _ in samples}) == 3


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(InputError, match="nan at step 7"):
        check_finite({"loss": math.nan}, 7)


def test_auto_precision_is_bf16_where_the_hardware_supports_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_precision("auto", cpu) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("fp32", torch.device("cuda")) == "fp32"
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, value=supported: value)
        assert choose_precision("auto", torch.device("cuda")) == ("bf16" if supported else "fp32")


@pytest.mark.parametrize("name", ["tpu", "cuda", "cpu:x", "mps"])
def test_a_device_that_is_unknown_or_missing_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"--device {name}"):
        choose_device(name)
    assert choose_device() == torch.device("cpu")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    JsonLinesLogger(path, step=2).log(3, {"loss": 1.5})
    assert read_log(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def test_a_log_without_a_checkpoint_is_emptied(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    JsonLinesLogger(tmp_path / "log.jsonl", step=0)
    assert read_log(tmp_path / "log.jsonl") == []


class RecordingLogger:
    """A logger of the user's own."""

    def __init__(self):
        self.lines, self.closed = [], 0

    def log(self, step, metrics):
        self.lines.append({"step": step} | metrics)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("event", [lambda loss: loss, lambda loss: loss * math.nan])
def test_another_logger_receives_the_lines_of_the_log_and_is_closed(tmp_path, event):
    logger, config = RecordingLogger(), TrainConfig(batch_size=4, precision="fp32")
    arguments = (lambda encoder: {"metric": 1.0}, lambda encoder: None)
    try:
        trainer.fit(ToyMethod(10, event), numbered_images(12), config, Plan(10), tmp_path, *arguments, loggers=[logger])
    except InputError as error:
        assert "nan" in str(error)  # noqa: PT017
    assert str(logger.lines) == str(read_log(tmp_path / "log.jsonl"))  # NaN is not equal to itself
    assert [line["step"] for line in logger.lines] in ([10, 10], [10])
    assert logger.closed == 1


def infinite_gradient(loss):
    """Return the same value; its gradient is 0 times infinity."""
    return loss + (loss - loss).sqrt()


@pytest.mark.parametrize("event", [lambda loss: loss * math.nan, infinite_gradient])
def test_a_step_that_is_not_finite_stops_the_run_and_the_checkpoint_is_from_before(tmp_path, event):
    with pytest.raises(InputError, match="step"):
        fit_toy(tmp_path, ToyMethod(6, event))
    assert saved_step(tmp_path) == 5


def test_ctrl_c_finishes_and_saves_the_step_and_the_resumed_run_has_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    torch.manual_seed(0)
    method = ToyMethod()
    initial = {name: t.clone() for name, t in method.state_dict().items()}
    fit_toy(tmp_path / "whole", method)
    stopped = ToyMethod(6, interrupt)
    stopped.load_state_dict(initial)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path / "stopped", stopped, save_minutes=9)
    assert saved_step(tmp_path / "stopped") == 6
    fit_toy(tmp_path / "stopped", ToyMethod())
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_ctrl_c_does_not_save_weights_that_are_not_finite(tmp_path):
    with pytest.raises((KeyboardInterrupt, InputError)):
        fit_toy(tmp_path, ToyMethod(6, lambda loss: interrupt(loss) * math.nan), save_minutes=9)
    assert not (tmp_path / "checkpoint.safetensors").exists() or saved_step(tmp_path) < 6


def test_the_handler_of_ctrl_c_is_restored_after_the_run(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    fit_toy(tmp_path, ToyMethod())
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_changes_nothing_and_writes_a_missing_encoder(tmp_path):
    """The process may have been killed after its last checkpoint was written, before the encoder was."""
    fit_toy(tmp_path, ToyMethod())
    before, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    (tmp_path / "encoder.safetensors").unlink()
    fit_toy(tmp_path, ToyMethod())
    after, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before | after)
    assert (tmp_path / "encoder.safetensors").exists()


def train_dino(folder, output_dir, *options):
    """Train 40 steps, saved after each, and evaluate; no figures. Returns the exit code."""
    words = [*TINY, "--epochs", "8", "--threads", "1", "--eval_minutes", "9", "--save_minutes", "0"]
    words += ["--data", f"folder:{folder}"]
    with patch.object(run, "_visualize"):
        return main(["train", "dino", *words, "--out", str(output_dir), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run that was not interrupted; its images are in the folder beside it."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_dino(flat_folder(folder / "data", 24), folder / "run") == 0
    assert saved_step(folder / "run") == 40
    return folder / "run"


def kill_at(data, output_dir, step):
    """Resume the run in a process of its own, and kill it as soon as its checkpoint has reached a step."""
    code = f"from tests.test_trainer import train_dino; train_dino({str(data)!r}, {str(output_dir)!r}, '--resume')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **SILENT)
    path = output_dir / "checkpoint.safetensors"
    while process.poll() is None and not (path.exists() and load_tensors(path)[1]["step"] >= step):
        time.sleep(0.002)
    process.kill()
    return process.wait()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path):
    for step in (random.randint(1, 12), random.randint(13, 22)):  # far enough from 40 for a busy machine
        assert kill_at(whole.parent / "data", tmp_path, step) == -signal.SIGKILL, f"was not killed at step {step}"
        assert step <= saved_step(tmp_path) < 40
    assert train_dino(whole.parent / "data", tmp_path, "--resume") == 0
    assert_same_bits(whole, tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl")]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_resumed_run_has_the_same_bits(whole, tmp_path, capsys):
    with at_step(17, lambda: signal.raise_signal(signal.SIGINT), steps=40):
        assert train_dino(whole.parent / "data", tmp_path) == 130
    assert saved_step(tmp_path) == 18
    assert "--resume" in capsys.readouterr().err
    assert train_dino(whole.parent / "data", tmp_path, "--resume") == 0
    assert_same_bits(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler looks at what warns
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_blocks_take_the_same_steps_on_a_cpu():
    config = TrainConfig(batch_size=4, precision="fp32")
    data = Images(torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte())
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        options = {"crop_size": 16, "num_local_crops": 0, "num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}
        method = create_method("dino", tiny_vit(stem="conv"), **options)
        if compiled:
            check_compile(method)
            compile_encoders(method)
        losses.append([terms["loss"] for terms in trainer.learn(method, data, config, steps=3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_cannot_be_compiled_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    words = ["train", "simclr", "--device", "cpu", "--data", "digits", "--out", str(tmp_path), "--compile", "true"]
    assert main([*words, "--encoder.name", "cnn"]) == 2
    assert "--compile" in capsys.readouterr().err
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert main(words) == 2
    assert "C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
