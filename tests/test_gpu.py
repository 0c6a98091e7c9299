"""Training on a real GPU, which the tests on fake tensors stand in for elsewhere; skipped without one."""

import copy
import subprocess
import sys

import pytest
import torch

from minissl.data.transforms import functional, masking
from minissl.methods import list_methods
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.sampler import seed_step
from tests.test_contract import batch, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def random_numbers_of_the_cpu(monkeypatch):
    """Draw random numbers on the CPU for every device, so that two devices see the same crops."""

    def rand(*shape, device=None, batch_dim=0):
        return torch.rand(*shape).to(device)

    for module in (functional, masking):
        monkeypatch.setattr(module, "rand", rand)


@pytest.mark.parametrize("name", list_methods())
def test_a_step_is_the_same_on_a_gpu(name, random_numbers_of_the_cpu):
    """Loss and gradients in fp32, up to the order of summation."""
    methods = {"cpu": build(name)}
    methods["cuda"] = copy.deepcopy(methods["cpu"]).to("cuda")
    results = {}
    for device, method in methods.items():
        seed_step(0, 3)
        loss = method.loss(batch().to(torch.device(device)), 0.5)["loss"]
        loss.backward()
        results[device] = loss.item(), [p.grad.cpu() for p in method.parameters() if p.grad is not None]
    assert results["cuda"][0] == pytest.approx(results["cpu"][0], rel=1e-4)
    total = torch.cat([g.flatten() for g in results["cpu"][1]]).norm()  # some are 0 but for rounding, before a norm
    for grad, expected in zip(results["cuda"][1], results["cpu"][1], strict=True):
        assert (grad - expected).norm() <= 1e-3 * expected.norm() + 1e-5 * total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list_methods())
def test_steps_do_not_wait_for_the_gpu(name, precision):
    method, config = build(name).to("cuda"), TrainConfig(precision=precision)
    optimizer, images = trainer.create_optimizer(method, config), batch().to(torch.device("cuda"))
    for step in range(6):
        seed_step(0, step)
        if step == 2:  # the first steps build kernels and moments, and may wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            terms = trainer.training_step(method, optimizer, images, 0.5, config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert terms["loss"].isfinite()
    assert all(p.device.type == "cuda" for p in method.parameters())


def run_command(*words, launcher=()):
    result = subprocess.run([sys.executable, *launcher, "-m", "minissl", *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")])
def test_a_run_trains_resumes_and_draws_figures(tmp_path, launcher):
    """With torchrun through NCCL."""
    words = ["train", "dino", "--minutes", "0", "--epochs", "0.2", "--out", str(tmp_path / "run")]
    assert "on cuda" in run_command(*words, launcher=launcher)
    assert "knn" in run_command(*words, "--resume", launcher=launcher)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"encoder.safetensors", "metrics.json", "attention.png"}
