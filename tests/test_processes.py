"""Training on several processes equals training on one, for every method; if one process fails, all stop."""

import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from minissl import distributed
from minissl.cli import parse_run
from minissl.data import Scenes
from minissl.methods import list_methods
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.sampler import iterate_batches, seed_step
from tests.processes import spawn_group

pytestmark = pytest.mark.slow
STEPS = 8
NANO = "--encoder.name nano --encoder.patch_size 8 --encoder.stem conv"
CASES = {
    "labels": f"transfer {NANO}",
    "batch norms in the encoder": "transfer --encoder.name cnn",
    "captions": f"clip {NANO}",
    "rotation": f"rotation {NANO}",
    "colorization": f"colorization {NANO}",
    "inpainting": f"inpainting {NANO}",
    "masked autoencoder": f"mae {NANO}",
    "contrastive": f"simclr {NANO}",
    "local crops": f"dino --num_local_crops 2 {NANO}",
    "center": f"dino --sinkhorn_iterations 0 {NANO}",
    "untied heads": f"dinov2 --num_patch_prototypes 64 {NANO}",
    "two centers": f"dinov2 --sinkhorn_iterations 0 {NANO}",
    "gram teacher": f"dinov3 --gram_start_fraction 0 --gram_update_at [0.0] {NANO}",
}


def test_every_method_is_among_the_cases():
    """But dinotxt, which needs a pretrained encoder and has the loss of clip."""
    assert {words.split()[0] for words in CASES.values()} == set(list_methods()) - {"dinotxt"}


def train_some_steps(words, data, shard):
    """Return the losses of some steps, the first gradients, and all weights at the end."""
    run, _ = parse_run([*words.split(), "--device", "cpu", "--batch_size", "8", "--precision", "fp32"])
    method, config = run.build().double(), TrainConfig(**run.train)
    method.prepare(data)
    loss, losses = (distributed.wrap_fsdp if shard else distributed.wrap_ddp)(method), []
    optimizer = trainer.create_optimizer(method, config)
    for step, batch in zip(range(STEPS), iterate_batches(data, config.batch_size, 0)):
        seed_step(0, step)
        terms = trainer.training_step(method, optimizer, batch, step / STEPS, config, loss)
        losses.append(distributed.mean_terms(terms)["loss"])
        if step == 0:
            grads = {f"grad {n}": p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    weights = {name: t for name, t in method.state_dict().items() if t.is_floating_point()}
    return {"losses": torch.stack(losses)} | distributed.gather_full(grads | weights)


def process(rank, world_size, folder):
    """Train all cases in double precision, where two orders of summation differ in the sixteenth digit."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size)
    data = Scenes("val", size=40, n=24)
    for name, words in CASES.items():
        for shard in (False, True) if world_size == 2 else (False,):
            results = train_some_steps(words, data, shard)
            if rank == 0:
                torch.save(results, f"{folder}/{name}_{world_size}{'s' * shard}.pt")
    distributed.shutdown_distributed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for world_size in (1, 2, 4):
        spawn_group(process, world_size, folder)
    return folder


@pytest.mark.parametrize("world", ["2", "4", "2s"], ids=["two", "four", "two, sharded"])
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(folder, name, world):
    expected, results = (torch.load(folder / f"{name}_{w}.pt", weights_only=True) for w in (1, world))
    assert list(expected) == list(results)
    assert any(key.startswith("grad") for key in expected)
    for key, values in expected.items():
        torch.testing.assert_close(
            results[key], values, rtol=1e-9, atol=1e-9, msg=lambda message, key=key: f"{key}: {message}"
        )


def train_command(output_dir, *options):
    words = ["train", "dino", "--data", "digits", "--device", "cpu", "--epochs", "4", "--minutes", "0"]
    return ["-m", "minissl", *words, "--out", str(output_dir), "--save_minutes", "0.01", *options]


@pytest.mark.parametrize("shard", ["false", "true"])
def test_if_one_process_is_killed_all_stop_and_another_number_of_processes_resumes(tmp_path, shard):
    output_dir = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--monitor-interval", "5"]  # torchrun stops the others at its next check; ours shall notice before
    launcher = subprocess.Popen(
        [*launch, *train_command(output_dir, "--shard", shard)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 120
    while not (output_dir / "checkpoint.safetensors").exists() and time.monotonic() < limit:
        time.sleep(0.2)
    workers = [p for p in psutil.Process(launcher.pid).children() if "minissl" in p.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    stderr = launcher.communicate(timeout=60)[1]
    assert (output_dir / "checkpoint.safetensors").exists(), stderr
    assert launcher.returncode != 0
    assert "Another process of this training has ended" in stderr
    command = [sys.executable, *train_command(output_dir, "--shard", shard, "--resume")]
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert (output_dir / "metrics.json").exists()
