"""What goes wrong while a training runs: each time one clear sentence, nothing lost, and it goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minissl import checkpoint
from minissl.__main__ import main
from minissl.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def two(tmp_path):
    """A checkpoint of step 1, kept as the one before, and one of step 2."""
    path = tmp_path / "checkpoint.safetensors"
    for step in (1, 2):
        checkpoint.save_tensors(path, {"a": torch.full((50,), float(step))}, {"step": step}, keep=True)
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def test_the_last_two_checkpoints_are_kept(two):
    assert checkpoint.load_newest(two)[1] == {"step": 2}
    assert checkpoint.load_tensors(checkpoint.previous(two))[1] == {"step": 1}


@pytest.mark.parametrize("damage", [cut, flip, empty, lambda path: path.unlink()])
def test_from_a_broken_checkpoint_a_run_goes_on_from_the_one_before(two, damage, capsys):
    damage(two)
    with pytest.raises(InputError, match=r"whole checkpoint|damaged|no checkpoint"):
        checkpoint.load_tensors(two)
    assert checkpoint.there(two)
    tensors, info = checkpoint.load_newest(two)
    assert info == {"step": 1}
    assert (tensors["a"] == 1).all()
    assert "going on from the checkpoint before it, of step 1" in capsys.readouterr().out


def test_when_both_are_broken_it_is_said(two):
    for path in (two, checkpoint.previous(two)):
        flip(path)
    with pytest.raises(InputError, match="damaged after it was written"):
        checkpoint.load_newest(two)


def test_a_disk_without_second_names_keeps_both_as_well(two, monkeypatch):
    def link(*paths):
        raise OSError("no such thing here")

    monkeypatch.setattr(os, "link", link)
    checkpoint.save_tensors(two, {"a": torch.zeros(1)}, {"step": 3}, keep=True)
    assert [checkpoint.load_tensors(p)[1]["step"] for p in (two, checkpoint.previous(two))] == [3, 2]


def test_two_trainings_in_one_folder_are_kept_apart(tmp_path, capsys):
    asked = ["train", "dino", "--data", "digits", "--image_size", "32", "--out", str(tmp_path), "--device", "cpu"]
    with checkpoint.alone(tmp_path):
        before = sorted(p.name for p in tmp_path.iterdir())
        assert main(asked) == 2
        assert "Another training is at work" in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    with checkpoint.alone(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    asked = ["train", "dino", "--data", "digits", "--image_size", "32", "--device", "cpu"]
    assert main([*asked, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be made (Not a directory); choose another --out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits():
    asked = ["-m", "tests.benchmarks.kills", "--kills", "10", "--steps", "1200"]
    made = subprocess.run([sys.executable, *asked], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "10 kills" in made.stdout
    assert "the same bits" in made.stdout
