"""The loop: its parts equal their plain descriptions, and a run that was killed ends as if it had not been."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from minissl import train
from minissl.checkpoint import load_tensors
from minissl.data import Images
from minissl.errors import InputError
from minissl.machine import choose_device, choose_precision
from minissl.record import finite, read_log
from minissl.train import TrainConfig

TINY = (
    "--data digits --image_size 16 --size 16 --local_size 8 --encoder.patch_size 8 --prototypes 32 --hidden 16 "
    "--bottleneck 8 --batch_size 16 --minutes 0 --epochs 0.3 --watch_minutes 9 --save_minutes 0"
).split()


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


def test_vectors_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    decayed, plain = train.param_groups(model)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert plain["weight_decay"] == 0


def test_the_learning_rate_warms_up_and_the_weight_decay_grows():
    config = TrainConfig(lr=1.0, final_lr=0.1, warmup=0.1, weight_decay=0.04, final_weight_decay=0.4)
    optimizer = train.make_optimizer(nn.Linear(2, 2), config)
    rates = [train.set_schedules(optimizer, config, p) for p in (0, 0.05, 0.1, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1.0, 0.1])
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.4, 0])


def numbered(n):
    return Images(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 1, 1), torch.arange(n))


def test_every_image_comes_once_an_epoch():
    source = train.batches(numbered(12), 4, seed=0)
    first = torch.cat([next(source).labels for _ in range(3)])
    second = torch.cat([next(source).labels for _ in range(3)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert not torch.equal(first, second)


def test_batches_can_start_anywhere():
    all_of_them = train.batches(numbered(13), 4, seed=1)
    batches = [next(all_of_them).labels for _ in range(10)]
    for start in (1, 3, 7):
        later = train.batches(numbered(13), 4, seed=1, step=start)
        assert torch.equal(next(later).labels, batches[start])


def test_chance_is_a_function_of_seed_and_step():
    drawn = []
    for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5)):
        train.seed_step(seed, step)
        drawn.append((torch.rand(1).item(), random.random()))
    assert drawn[0] == drawn[1]
    assert len({first for first, _ in drawn}) == 3


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(InputError, match="nan at step 7"):
        finite({"loss": torch.tensor(float("nan"))}, 7)


def test_precision_is_what_the_hardware_multiplies(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_precision("auto", cpu) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_device("cpu") == cpu


def command(out, *more):
    return [sys.executable, "-m", "minissl", "train", "dino", *TINY, "--out", str(out), *more]


def run(out, *more):
    return subprocess.run(command(out, *more), capture_output=True, text=True, check=False)


def kill_when(out, step, how):
    """Start or go on, and send a signal as soon as the log has reached a step."""
    process = subprocess.Popen(command(out, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        # Every step is logged at the latest when it is saved; the checkpoint's own step is what counts.
        if (out / "checkpoint.safetensors").exists() and load_tensors(out / "checkpoint.safetensors")[1][
            "step"
        ] >= step:
            process.send_signal(how)
            break
        time.sleep(0.01)
    process.communicate()
    return process.returncode


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole).returncode == 0
    for step in (random.Random(0).randint(2, 8), 12):
        assert kill_when(killed, step, signal.SIGKILL) == -signal.SIGKILL
    assert kill_when(killed, 16, signal.SIGINT) == 130
    assert run(killed, "--resume").returncode == 0
    for name in ("checkpoint.safetensors", "encoder.safetensors"):
        ours, _ = load_tensors(killed / name)
        theirs, _ = load_tensors(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs), name
    steps = [line["step"] for line in read_log(killed / "log.jsonl")]
    assert steps == sorted(steps)
    assert json.loads((killed / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
