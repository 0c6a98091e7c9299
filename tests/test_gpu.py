"""What fake tensors promise, on a real GPU: these tests are for a machine that has one, and are left out elsewhere."""

import copy
import subprocess
import sys

import pytest
import torch

from minissl.data.transforms import functional, masking, multi_view
from minissl.training import trainer
from minissl.models import layers
from minissl.methods.registry import list_methods
from tests.test_contract import batch, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def on(device, images):
    return images._replace(images=images.images.to(device), labels=images.labels.to(device))


@pytest.fixture
def same_chance(monkeypatch):
    """Numbers drawn on the CPU, wherever they are wanted, so that two devices see the same crops."""

    def rand(*shape, device=None, rows=0):
        return torch.rand(*shape).to(device)

    for module in (functional, masking, layers, multi_view):
        monkeypatch.setattr(module, "rand", rand)


@pytest.mark.parametrize("name", list_methods())
def test_a_step_is_the_same_on_a_gpu(name, same_chance):
    """Loss and gradients in fp32, to what the order of sums changes."""
    methods = {"cpu": build(name)}
    methods["cuda"] = copy.deepcopy(methods["cpu"]).to("cuda")
    found = {}
    for device, method in methods.items():
        trainer.seed_step(0, 3)
        loss = method.loss(on(device, batch()), 0.5)["loss"]
        loss.backward()
        found[device] = loss.item(), [p.grad.cpu() for p in method.parameters() if p.grad is not None]
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    whole = torch.cat([g.flatten() for g in found["cpu"][1]]).norm()  # some are 0 but for rounding, before a batch norm
    for ours, theirs in zip(found["cuda"][1], found["cpu"][1], strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5 * whole


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list_methods())
def test_no_step_waits(name, precision):
    method, config = build(name).to("cuda"), trainer.TrainConfig(precision=precision)
    optimizer, images = trainer.create_optimizer(method, config), on("cuda", batch())
    for step in range(6):
        trainer.seed_step(0, step)
        if step == 2:  # what the first ones build, kernels and moments, may wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            terms = trainer.training_step(method, optimizer, images, 0.5, config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert terms["loss"].isfinite()
    assert all(p.device.type == "cuda" for p in method.parameters())


def command(*words, launcher=()):
    made = subprocess.run([sys.executable, *launcher, "-m", "minissl", *words], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    return made.stdout


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")])
def test_a_run_from_nothing_to_pictures(tmp_path, launcher):
    """And on from its checkpoint; with torchrun by NCCL."""
    asked = ["train", "dino", "--minutes", "0", "--epochs", "0.2", "--out", str(tmp_path / "run")]
    assert "on the cuda" in command(*asked, launcher=launcher)
    assert "knn" in command(*asked, "--resume", launcher=launcher)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"encoder.safetensors", "metrics.json", "attention.png"}
