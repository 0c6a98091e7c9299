"""The loop: its parts equal their plain descriptions, and a run that was killed ends as if it had not been."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from minissl import runs, train
from minissl.__main__ import main
from minissl.checkpoint import load_tensors, save_tensors
from minissl.data import Images
from minissl.errors import InputError
from minissl.machine import choose_precision
from minissl.method import find
from minissl.record import Log, finite, read_log
from minissl.teacher import cosine
from minissl.train import TrainConfig
from tests.folders import TINY, flat_folder
from tests.golden import tiny_vit

ROOT = Path(__file__).parent.parent
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def test_learning_goes_on_after_a_look_in_evaluation_mode():
    method = find("transfer")(tiny_vit(stem="conv"), size=16, classes=2).eval()
    data = Images(torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 2, ("0", "1"))
    before = {name: x.clone() for name, x in method.named_buffers() if "running_mean" in name}
    train.learn(method, data, TrainConfig(batch_size=4, precision="fp32"), steps=2)
    assert before
    assert all(not torch.equal(x, before[name]) for name, x in method.named_buffers() if name in before)


def test_what_an_error_amid_autocast_left_behind_does_not_reach_the_next_training():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    data, config = Images(images, torch.arange(8) % 2, ("0", "1")), TrainConfig(batch_size=4, precision="bf16")

    def weights():
        torch.manual_seed(0)
        method = find("transfer")(tiny_vit(), size=16, classes=2)
        train.learn(method, data, config, steps=3)
        return torch.cat([p.detach().flatten() for p in method.parameters()])

    expected = weights()
    torch.autocast_increment_nesting()  # as if Ctrl-C had come inside of `torch.autocast.__enter__`
    try:
        assert torch.equal(weights(), expected)
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


def test_gradients_are_clipped_one_by_one():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    for scale, p in zip((10, 0.01), parameters):
        p.grad = scale * torch.randn_like(p)
    expected = []
    for p in parameters[:2]:
        length = math.sqrt(sum(float(g) ** 2 for g in p.grad.flatten()))
        expected.append(p.grad * min(1.0, 3.0 / (length + 1e-6)))
    train.clip_gradients(parameters, 3.0)
    torch.testing.assert_close(parameters[0].grad, expected[0])
    torch.testing.assert_close(parameters[1].grad, expected[1])
    assert parameters[2].grad is None


def test_clipping_leaves_short_gradients_as_they_are():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, 2.0, 2.0 - 1e-3])  # just under 3 long
    before = parameter.grad.clone()
    train.clip_gradients([parameter], 3.0)
    assert torch.equal(parameter.grad, before)


def test_vectors_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    decayed, plain = train.param_groups(model)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert plain["weight_decay"] == 0


def test_a_matrix_called_bias_is_not_decayed():
    model = nn.Sequential(nn.Module())
    model[0].bias = nn.Parameter(torch.zeros(2, 2))
    assert [len(group["params"]) for group in train.param_groups(model)] == [0, 1]


def test_tokens_positions_and_prototypes_are_decayed_as_in_dino():
    dino = find("dino")(tiny_vit(), prototypes=8, hidden=8, bottleneck=4)
    decayed = {id(p) for p in train.param_groups(dino)[0]["params"]}
    names = {name for name, p in dino.named_parameters() if id(p) in decayed}
    student = {name for name in names if name.startswith("student.")}
    assert names == student  # a teacher is not trained
    for name in ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight", "head.last_layer.weight"):
        assert f"student.{name}" in names
    assert not any(name.endswith(".bias") or "norm" in name for name in names)


def test_every_trained_parameter_is_in_one_group():
    dino = find("dino")(tiny_vit(), prototypes=8, hidden=8, bottleneck=4)
    grouped = [id(p) for group in train.param_groups(dino) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in dino.parameters() if p.requires_grad)


def test_the_learning_rate_warms_up_and_the_weight_decay_grows():
    config = TrainConfig(lr=1.0, final_lr=0.1, warmup=0.1, weight_decay=0.04, final_weight_decay=0.4)
    optimizer = train.make_optimizer(nn.Linear(2, 2), config)
    rates = [train.set_schedules(optimizer, config, p) for p in (0, 0.05, 0.1, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1.0, 0.1])
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.1])
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.4, 0])


def test_rate_and_decay_may_cool_first_and_then_stay():
    config = TrainConfig(lr=1.0, final_lr=0.0, warmup=0.5, weight_decay=0.04, final_weight_decay=0.4, cool=0.4)
    optimizer = train.make_optimizer(nn.Linear(2, 2), config)
    rates = [train.set_schedules(optimizer, config, p) for p in (0, 0.1, 0.2, 0.3, 0.3999, 0.4, 0.7, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0], abs=1e-3)
    decays = [
        (train.set_schedules(optimizer, config, p), optimizer.param_groups[0]["weight_decay"])[1] for p in (0, 0.2, 0.4)
    ]
    assert decays == pytest.approx([0.04, 0.22, 0.04])


def test_the_weight_decay_follows_dinos_cosine():
    """final + (base - final) (1 + cos(pi i / n)) / 2, facts of the authors' main_dino.py."""
    optimizer = train.make_optimizer(nn.Linear(2, 2), TrainConfig())
    for i in range(10):
        train.set_schedules(optimizer, TrainConfig(), i / 10)
        expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / 10))
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)
        assert cosine(0.04, 0.4, i / 10) == pytest.approx(expected)


def numbered(n):
    return Images(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 1, 1), torch.arange(n))


def test_every_image_comes_once_an_epoch():
    source = train.batches(numbered(12), 4, seed=0)
    first = torch.cat([next(source).labels for _ in range(3)])
    second = torch.cat([next(source).labels for _ in range(3)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert not torch.equal(first, second)


def test_the_order_is_the_seeds_alone():
    def first_two_epochs(seed):
        source = train.batches(numbered(12), 4, seed)
        return torch.cat([next(source).labels for _ in range(6)]).tolist()

    torch.manual_seed(1)
    order = first_two_epochs(0)
    torch.manual_seed(2)
    assert first_two_epochs(0) == order
    assert first_two_epochs(1) != order


def test_fewer_images_than_a_batch_are_said():
    with pytest.raises(InputError, match="A batch of 8 is more than the 5 images there are"):
        next(train.batches(Images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)), 8, seed=0))


def test_batches_can_start_anywhere():
    all_of_them = train.batches(numbered(13), 4, seed=1)
    batches = [next(all_of_them).labels for _ in range(10)]
    for start in range(10):
        later = train.batches(numbered(13), 4, seed=1, step=start)
        assert all(torch.equal(next(later).labels, labels) for labels in batches[start:])


def test_labels_stay_with_their_images():
    batch = next(train.batches(numbered(12), 4, seed=0))
    assert torch.equal(batch.images[:, 0, 0, 0], batch.labels.to(torch.uint8))


def test_chance_is_a_function_of_seed_and_step():
    drawn = []
    for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5)):
        train.seed_step(seed, step)
        drawn.append((torch.rand(1).item(), random.random()))
    assert drawn[0] == drawn[1]
    assert len({first for first, _ in drawn}) == 3


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(InputError, match="nan at step 7"):
        finite({"loss": math.nan}, 7)


def test_precision_is_what_the_hardware_multiplies(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_precision("auto", cpu) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("fp32", torch.device("cuda")) == "fp32"
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able)
        assert choose_precision("auto", torch.device("cuda")) == ("bf16" if able else "fp32")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    Log(path, step=2)(step=3, loss=1.5)
    assert read_log(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def test_a_log_without_a_checkpoint_begins_anew(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    Log(tmp_path / "log.jsonl", step=0)
    assert read_log(tmp_path / "log.jsonl") == []


class Toy(nn.Module):
    """A method that calls `event` in step `when`, and otherwise learns a line."""

    def __init__(self, when=None, event=lambda loss: loss):
        super().__init__()
        self.encoder, self.step, self.when, self.event = nn.Linear(3, 2), 0, when, event

    def loss(self, batch, progress):
        self.step += 1
        loss = self.encoder(batch.images.float().mean((2, 3)) / 255).square().sum()
        return {"loss": self.event(loss) if self.step == self.when else loss}

    def after_step(self, progress):
        pass


def fit_toy(out, toy, save_minutes=0.0):
    """Ten steps, saved each, or with `save_minutes` only at the end; the encoder is exported beside the checkpoint."""
    config = TrainConfig(batch_size=4, precision="fp32", save_minutes=save_minutes)

    def export(encoder):
        save_tensors(out / "encoder.safetensors", encoder.state_dict(), {})

    train.fit(toy, numbered(12), config, 10, out, lambda encoder: {"watched": 1.0}, export)


def saved(out):
    """The step of the checkpoint in a folder, after a look whether all in it are numbers."""
    tensors, info = load_tensors(out / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values()), "the checkpoint holds what is no number"
    return info["step"]


def no_number(loss):
    return loss * math.nan


def interrupt(loss):
    signal.raise_signal(signal.SIGINT)
    return loss


def endless_gradient(loss):
    """The same number; its gradient is 0 times infinity."""
    return loss + (loss - loss).sqrt()


@pytest.mark.parametrize("event", [no_number, endless_gradient])
def test_what_is_no_number_stops_the_run_and_the_last_checkpoint_is_from_before(tmp_path, event):
    with pytest.raises(InputError, match="step"):
        fit_toy(tmp_path, Toy(6, event))
    assert saved(tmp_path) == 5


def test_ctrl_c_finishes_the_step_saves_and_goes_on_to_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    torch.manual_seed(0)
    toy = Toy()
    start = {name: t.clone() for name, t in toy.state_dict().items()}
    fit_toy(tmp_path / "whole", toy)
    stopped = Toy(6, interrupt)
    stopped.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path / "stopped", stopped, save_minutes=9)
    assert saved(tmp_path / "stopped") == 6
    fit_toy(tmp_path / "stopped", Toy())
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_ctrl_c_does_not_save_what_is_no_number(tmp_path):
    with pytest.raises((KeyboardInterrupt, InputError)):
        fit_toy(tmp_path, Toy(6, lambda loss: no_number(interrupt(loss))), save_minutes=9)
    assert not (tmp_path / "checkpoint.safetensors").exists() or saved(tmp_path) < 6


def test_ctrl_c_means_what_it_did_before_once_the_run_is_over(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    fit_toy(tmp_path, Toy())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_that_goes_on_changes_nothing_and_has_its_encoder(tmp_path):
    """Killed after its last checkpoint was written, before the encoder was."""
    fit_toy(tmp_path, Toy())
    before, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    (tmp_path / "encoder.safetensors").unlink()
    fit_toy(tmp_path, Toy())
    after, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before | after)
    assert (tmp_path / "encoder.safetensors").exists()


def assert_same_bits(one, other):
    for name in ("checkpoint.safetensors", "encoder.safetensors"):
        (ours, _), (theirs, _) = load_tensors(one / name), load_tensors(other / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs), name


def train_dino(folder, out, *more):
    """Forty steps, saved after each; no pictures. Returns the exit code."""
    words = [*TINY, "--epochs", "8", "--watch_minutes", "9", "--save_minutes", "0", "--data", f"folder:{folder}"]
    with patch.object(runs, "show"):
        return main(["train", "dino", *words, "--out", str(out), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted; its images are beside it."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_dino(flat_folder(folder / "data", 24), folder / "run") == 0
    assert saved(folder / "run") == 40
    return folder / "run"


def kill_at(data, out, step):
    """Go on with the run in a process of its own, and kill it as soon as its checkpoint has reached a step."""
    code = f"from tests.test_train import train_dino; train_dino({str(data)!r}, {str(out)!r}, '--resume')"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another order of sums would be other bits
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | threads, **SILENT)
    path = out / "checkpoint.safetensors"
    while process.poll() is None and not (path.exists() and load_tensors(path)[1]["step"] >= step):
        time.sleep(0.002)
    process.kill()
    return process.wait()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path):
    for step in (random.randint(1, 12), random.randint(13, 22)):  # far enough from 40 for a busy machine
        assert kill_at(whole.parent / "data", tmp_path, step) == -signal.SIGKILL, f"was not killed at step {step}"
        assert step <= saved(tmp_path) < 40
    assert train_dino(whole.parent / "data", tmp_path, "--resume") == 0
    assert_same_bits(whole, tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl")]
    assert steps == sorted(steps)


def test_ctrl_c_is_exit_code_130_and_the_run_goes_on_to_the_same_bits(whole, tmp_path, capsys):
    honest = train.training_step

    def interrupted(method, optimizer, batch, progress, *others):
        if progress == 17 / 40:
            signal.raise_signal(signal.SIGINT)
        return honest(method, optimizer, batch, progress, *others)

    with patch.object(train, "training_step", interrupted):
        assert train_dino(whole.parent / "data", tmp_path) == 130
    assert saved(tmp_path) == 18
    assert "The same command with --resume goes on." in capsys.readouterr().err
    assert train_dino(whole.parent / "data", tmp_path, "--resume") == 0
    assert_same_bits(whole, tmp_path)
