"""Several processes train what one would: every method, to the last digits; and none goes on alone."""

import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from minissl import distributed, distributed
from minissl.training import trainer
from minissl.cli import parse_run
from minissl.data import Images, Scenes
from tests.processes import group

pytestmark = pytest.mark.slow
STEPS = 20
NANO = "--encoder.name nano --encoder.patch_size 8 --encoder.stem conv"
CASES = {
    "labels": f"transfer {NANO}",
    "batch norms in the encoder": "transfer --encoder.name cnn",
    "sentences": f"clip {NANO}",
    "rotation": f"pretext --task rotation {NANO}",
    "colours": f"pretext --task colorization {NANO}",
    "a hole": f"pretext --task hole {NANO}",
    "hidden patches": f"pretext --task mae {NANO}",
    "contrast": f"simclr {NANO}",
    "small crops": f"dino --num_local_crops 2 {NANO}",
    "a centre": f"dino --sinkhorn_iterations 0 {NANO}",
    "two heads": f"dinov2 --num_patch_prototypes 64 {NANO}",
    "two centres": f"dinov2 --sinkhorn_iterations 0 {NANO}",
    "an anchor": f"dinov3 --gram_start_fraction 0 --gram_update_at [0.0] {NANO}",
}


def few_steps(words, data, shard):
    """The losses of some steps, the first gradients, and all weights at the end."""
    run, _ = parse_run([*words.split(), "--device", "cpu", "--batch_size", "8", "--precision", "fp32"])
    method, config = run.build().double(), trainer.TrainConfig(**run.loop)
    if hasattr(method, "prepare"):
        method.prepare(data)
    loss, losses = (distributed.wrap_fsdp if shard else distributed.wrap_ddp)(method), []
    optimizer = trainer.create_optimizer(method, config)
    for step, batch in zip(range(STEPS), trainer.batches(data, config.batch_size, 0)):
        trainer.seed_step(0, step)
        terms = trainer.training_step(method, optimizer, batch, step / STEPS, config, loss)
        losses.append(terms["loss"])
        if step == 0:
            first = {f"grad {n}": p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    ends = {name: t for name, t in method.state_dict().items() if t.is_floating_point()}
    return {"losses": torch.stack(losses)} | distributed.gather_full(first | ends)


def process(number, world, folder):
    """Everything in double precision, where two orders of a sum differ in the sixteenth digit."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=number, world_size=world)
    scenes = Scenes("val", size=40, n=24)
    data = Images(scenes.images, scenes.labels, scenes.classes, captions=scenes.captions)
    for name, words in CASES.items():
        for shard in (False, True) if world == 2 else (False,):
            found = few_steps(words, data, shard)
            if number == 0:
                torch.save(found, f"{folder}/{name}_{world}{'s' * shard}.pt")
    distributed.shutdown_distributed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("processes")
    for world in (1, 2, 4):
        group(process, world, made)
    return made


@pytest.mark.parametrize("world", ["2", "4", "2s"], ids=["two", "four", "two, sharded"])
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(folder, name, world):
    alone, shared = (torch.load(folder / f"{name}_{w}.pt", weights_only=True) for w in (1, world))
    assert list(alone) == list(shared)
    assert any(key.startswith("grad") for key in alone)
    for key, expected in alone.items():
        torch.testing.assert_close(
            shared[key], expected, rtol=1e-9, atol=1e-9, msg=lambda said, key=key: f"{key}: {said}"
        )


def train_words(out, *more):
    words = ["train", "dino", "--data", "digits", "--device", "cpu", "--epochs", "4", "--minutes", "0"]
    return ["-m", "minissl", *words, "--out", str(out), "--save_minutes", "0.01", *more]


@pytest.mark.parametrize("shard", ["false", "true"])
def test_when_one_process_is_killed_all_end_and_another_number_goes_on(tmp_path, shard):
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--monitor-interval", "5"]  # torchrun ends the others at its next look: ours is to see it before
    running = subprocess.Popen(
        [*launch, *train_words(out, "--shard", shard)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not (out / "checkpoint.safetensors").exists() and time.monotonic() < limit:
        time.sleep(0.2)
    workers = [p for p in psutil.Process(running.pid).children() if "minissl" in p.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    said = running.communicate(timeout=60)[1]
    assert (out / "checkpoint.safetensors").exists(), said
    assert running.returncode != 0
    assert "Another process of this training has ended" in said
    alone = subprocess.run(
        [sys.executable, *train_words(out, "--shard", shard, "--resume")], capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr
    assert (out / "metrics.json").exists()


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(distributed.InputError, match="3 processes cannot share a batch of 64"):
        distributed.local_batch_size(64)
    assert distributed.local_batch_size(63) == 21
