"""Gradient accumulation and activation checkpointing save memory and do not change the gradient."""

import copy
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minissl.cli import parse_run
from minissl.data.batch import Batch
from minissl.data.transforms import functional
from minissl.errors import InputError
from minissl.methods import list_methods
from minissl.methods.registry import get_method_class
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.device import PeakMemory, enable_activation_checkpointing, transformer_blocks
from minissl.training.sampler import check_batch_split, seed_step
from tests.benchmarks.memory import count_memory
from tests.test_contract import build

ROOT = Path(__file__).parent.parent
NANO = "--encoder.name nano --encoder.stem patch --encoder.patch_size 8 --precision fp32 --device cpu"


def create(words):
    run, _ = parse_run([*words.split(), *NANO.split()])
    return run.build(), replace(TrainConfig(**run.train), clip_grad=0.0)


def batch(n=8):
    torch.manual_seed(3)
    images = torch.randint(0, 256, (n, 3, 48, 48), dtype=torch.uint8)
    return Batch(images, torch.arange(n) % 4, None, {"background": torch.arange(n) % 3})


def gradients(method, config):
    """Return the terms and gradients of one step; the learning rate is 0 at the start of the run."""
    optimizer = trainer.create_optimizer(method, config)
    seed_step(0, 0)
    terms = trainer.training_step(method, optimizer, batch(), 0.0, config)
    return terms, {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "words", ["transfer", "transfer --targets [background]", "rotation", "colorization", "inpainting"]
)
@pytest.mark.parametrize("parts", [2, 8])
def test_an_accumulated_gradient_is_that_of_the_whole_batch(words, parts, monkeypatch):
    method, config = create(words)

    def center_crops(n, height, width, scale, like):
        return tuple(torch.full((n,), x) for x in (4.0, 4.0, 40.0, 40.0))

    monkeypatch.setattr(functional, "sample_crop_boxes", center_crops)
    monkeypatch.setattr(functional, "rand", lambda *shape, device, batch_dim=0: torch.ones(shape))  # never flipped
    terms, expected = gradients(copy.deepcopy(method), config)
    accumulated_terms, grads = gradients(method, replace(config, grad_accum_steps=parts))
    assert list(grads) == list(expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(accumulated_terms["loss"], terms["loss"])


def test_a_batch_is_split_in_order_with_all_annotations():
    whole = batch(6)._replace(captions=[(str(i),) for i in range(6)])
    first, second = whole.split(2)
    assert torch.equal(torch.cat([first.images, second.images]), whole.images)
    assert (first.labels.tolist(), second.captions) == ([0, 1, 2], [("3",), ("4",), ("5",)])
    assert second.factors["background"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", list_methods())
def test_losses_that_compare_images_refuse_gradient_accumulation(name):
    method = build(name)
    if get_method_class(name).supports_grad_accumulation:
        check_batch_split(method, 64, 4)
        with pytest.raises(InputError, match="5 equal parts"):
            check_batch_split(method, 64, 5)
    else:
        with pytest.raises(InputError, match=r"--grad_accum_steps is 4.*compares"):
            check_batch_split(method, 64, 4)
    check_batch_split(method, 64, 1)


def test_batch_norms_refuse_gradient_accumulation():
    run, _ = parse_run(["transfer", "--encoder.name", "cnn", "--device", "cpu"])
    with pytest.raises(InputError, match="batch norms"):
        check_batch_split(run.build(), 64, 2)


@pytest.mark.parametrize(
    "words", ["dino --use_bn_in_head true", "dinov2", "dinov3 --gram_start_fraction 0", "transfer", "mae"]
)
def test_activation_checkpointing_gives_the_same_gradient(words):
    method, config = create(f"{words} --encoder.drop_path 0.5 --encoder.depth 2")
    checkpointed, calls = copy.deepcopy(method), {"plain": 0, "checkpointed": 0}
    enable_activation_checkpointing(checkpointed)

    def count(name):
        calls[name] += 1

    for name, each in (("plain", method), ("checkpointed", checkpointed)):
        for block in transformer_blocks(each):
            block.mlp.register_forward_hook(lambda *_, name=name: count(name))
    terms, expected = gradients(method, config)
    checkpointed_terms, grads = gradients(checkpointed, config)
    torch.testing.assert_close(checkpointed_terms, terms)
    torch.testing.assert_close(grads, expected)
    assert calls["checkpointed"] > calls["plain"]


@pytest.mark.parametrize("fake", [False, True])
def test_the_peak_is_what_was_held_at_once(fake):
    with FakeTensorMode() if fake else nullcontext(), PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(3):
            temporary = torch.ones(500)  # the one before is freed only after this one is created
            temporary.add_(1)
        view = kept.view(10, 100)  # no memory of its own
    assert memory.peak == 4000 + 2 * 2000
    del temporary, view
    assert memory.current == 4000


@pytest.mark.slow
def test_memory_counted_on_fake_tensors_is_near_that_of_a_real_training():
    """In a process of its own: memory that earlier tests freed would be reused, and not be measured."""
    words = ["simclr", "--encoder.name", "resnet18", "--precision", "fp32", "--batch_size", "64"]
    command = [sys.executable, "-m", "tests.benchmarks.memory", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    counted, measured = (float(number) for number in re.findall(r"(?:counted|measured) ([\d.]+) GB", result.stdout))
    assert 0.6 < counted / measured < 1.05


@pytest.mark.slow
def test_activation_checkpointing_and_gradient_accumulation_halve_the_memory():
    words = ["transfer", *NANO.split(), "--encoder.depth", "6", "--batch_size", "256"]
    whole = count_memory(words)
    assert count_memory(words, activation_checkpointing=True) < 0.5 * whole
    assert count_memory([*words, "--grad_accum_steps", "4"]) < 0.5 * whole
