"""What saves memory changes nothing: parts of a batch, blocks computed twice. A loss that needs it whole says so."""

import copy
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minissl.data.transforms import functional
from minissl.training import trainer
from minissl.cli import parse_run
from minissl.errors import InputError
from minissl.training.device import PeakMemory, enable_activation_checkpointing
from minissl.data.batch import Batch
from minissl.methods.registry import list_methods, get_method_class
from minissl.training.sampler import check_batch_split, split_batch
from tests.benchmarks.memory import counted

ROOT = Path(__file__).parent.parent

PLAIN = "--encoder.name nano --encoder.stem patch --encoder.patch_size 8 --precision fp32 --device cpu"


def make(words):
    run, _ = parse_run([*words.split(), *PLAIN.split()])
    return run.build(), trainer.replace(trainer.TrainConfig(**run.loop), clip=0.0)


def batch(n=8):
    torch.manual_seed(3)
    return Batch(
        torch.randint(0, 256, (n, 3, 48, 48), dtype=torch.uint8),
        torch.arange(n) % 4,
        None,
        {"place": torch.arange(n) % 3},
    )


def gradients(method, config):
    """Of one step; the optimiser's rate is 0 at the start of the run."""
    optimizer = trainer.create_optimizer(method, config)
    trainer.seed_step(0, 0)
    terms = trainer.training_step(method, optimizer, batch(), 0.0, config)
    return terms, {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "words", ["transfer", "transfer --targets [place]", "pretext", "pretext --task colorization", "pretext --task hole"]
)
@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(words, parts, monkeypatch):
    method, config = make(words)
    middle = lambda n, height, width, scale, like: tuple(torch.full((n,), x) for x in (4.0, 4.0, 40.0, 40.0))  # noqa: E731
    monkeypatch.setattr(functional, "draw_crops", middle)  # the same crop whatever is drawn
    monkeypatch.setattr(functional, "rand", lambda *shape, device, rows=0: torch.ones(shape))  # and none is mirrored
    terms, expected = gradients(copy.deepcopy(method), config)
    config = trainer.replace(config, accumulate=parts)
    found_terms, found = gradients(method, config)
    assert list(found) == list(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found_terms["loss"], terms["loss"])


def test_parts_keep_the_order_and_all_that_is_known():
    whole = batch(6)._replace(captions=[(str(i),) for i in range(6)])
    first, second = split_batch(whole, 2)
    assert torch.equal(torch.cat([first.images, second.images]), whole.images)
    assert (first.labels.tolist(), second.captions) == ([0, 1, 2], [("3",), ("4",), ("5",)])
    assert second.factors["place"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", list_methods())
def test_a_loss_that_compares_images_says_that_it_needs_them_all(name):
    method = torch.nn.Module() if name == "dinotxt" else make(name)[0]
    method.__class__ = get_method_class(name)
    if getattr(get_method_class(name), "apart", False):
        check_batch_split(method, 64, 4)
        with pytest.raises(InputError, match="64 has no 5 equal parts"):
            check_batch_split(method, 64, 5)
    else:
        with pytest.raises(InputError, match="compares the images of a batch with each other"):
            check_batch_split(method, 64, 4)
    check_batch_split(method, 64, 1)


def test_batch_norms_need_their_batch():
    run, _ = parse_run(["transfer", "--encoder.name", "cnn", "--device", "cpu"])
    with pytest.raises(InputError, match="batch norms of this encoder"):
        check_batch_split(run.build(), 64, 2)


@pytest.mark.parametrize(
    "words", ["dino --use_bn_in_head true", "dinov2", "dinov3 --gram_start_fraction 0", "transfer", "pretext --task mae"]
)
def test_blocks_computed_again_give_the_same_gradient(words):
    method, config = make(f"{words} --encoder.drop_path 0.5 --encoder.depth 2")
    again, runs = copy.deepcopy(method), {"once": [], "again": []}
    enable_activation_checkpointing(again)
    for name, one in (("once", method), ("again", again)):
        for block in (block for module in one.modules() for block in getattr(module, "blocks", ())):
            block.mlp.register_forward_hook(lambda *_, name=name: runs[name].append(1))
    terms, expected = gradients(method, config)
    found_terms, found = gradients(again, config)
    torch.testing.assert_close(found_terms, terms)
    torch.testing.assert_close(found, expected)
    assert len(runs["again"]) > len(runs["once"])


@pytest.mark.parametrize("fake", [False, True])
def test_the_peak_is_what_was_held_at_once(fake):
    with FakeTensorMode() if fake else nullcontext(), PeakMemory() as peak:
        kept = torch.zeros(1000)
        for _ in range(3):
            passing = torch.ones(500)  # each after the one before is gone, but for one that is made meanwhile
            passing.add_(1)
        view = kept.view(10, 100)  # nothing new
    assert peak.most == 4000 + 2 * 2000
    del passing, view
    assert peak.now == 4000


@pytest.mark.slow
def test_counting_on_fake_tensors_comes_near_to_what_a_real_training_takes():
    """In a process of its own: what tests before this one gave back, this one would not be seen to take."""
    words = ["simclr", "--encoder.name", "resnet18", "--precision", "fp32", "--batch_size", "64"]
    asked = [sys.executable, "-m", "tests.benchmarks.memory", *words]
    made = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    there, real = (float(number) for number in re.findall(r"(?:counted|measured) ([\d.]+) GB", made.stdout))
    assert 0.6 < there / real < 1.05


def test_computing_again_and_parts_take_less():
    words = ["transfer", *PLAIN.split(), "--encoder.depth", "6", "--batch_size", "256"]
    whole = counted(words)
    assert counted(words, again=True) < 0.5 * whole
    assert counted([*words, "--grad_accum_steps", "4"]) < 0.5 * whole
