"""What goes wrong while a training runs: each time one clear sentence, nothing lost, and it goes on.

Here a run is killed, also while it saves, and its checkpoint is damaged. Full disks, other options and two runs in one
folder are in `test_faults_runs`, faults of the images in `test_faults_data`, of others' files in `test_faults_files`.
"""

import builtins
import os
import pathlib
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from minissl import checkpoint
from minissl.errors import InputError
from minissl.record import read_log
from tests.test_train import Toy, assert_same_bits, fit_toy, interrupt, saved

ROOT = Path(__file__).parent.parent
CALLS = ((builtins, "open"), (os, "fsync"), (os, "link"), (os, "replace"), (pathlib.Path, "unlink"))  # of a save


class Killed(BaseException):
    """What no `except` of a program sees, and nothing cleans up after: as SIGKILL."""


class Fate:
    """Inside, the call of `CALLS` with some number is not made any more."""

    def __init__(self, last):
        self.left, self.patches = last, [patch.object(*call, self.slow(getattr(*call))) for call in CALLS]

    def slow(self, honest):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return honest(*args, **kwargs)

        return call

    def __enter__(self):
        for one in self.patches:
            one.start()

    def __exit__(self, *problem):
        for one in self.patches:
            one.stop()
        return problem[0] is Killed


def contents(folder):
    """The bytes of every file of a run, but for its lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a run of `fit_toy` that nothing happened to."""
    out = tmp_path_factory.mktemp("toy")
    fit_toy(out, seeded())
    return out


def seeded(*event):
    torch.manual_seed(0)
    return Toy(*event)


@pytest.fixture
def two(tmp_path):
    """A checkpoint of step 1, kept as the one before, and one of step 2."""
    path = tmp_path / "checkpoint.safetensors"
    for step in (1, 2):
        save(path, step)
    return path


def save(path, step):
    checkpoint.save_tensors(path, {"a": torch.full((50,), float(step))}, {"step": step}, keep=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def reword(path):
    """Its header says another step, and no number is touched."""
    path.write_bytes(re.sub(rb'(step\\": )\d', rb"\g<1>4", path.read_bytes()))


def no_second_name(*paths):
    raise OSError("This disk knows none.")


DAMAGES = [cut, flip, empty, reword, Path.unlink]


def test_the_last_two_checkpoints_are_kept(two):
    assert checkpoint.load_newest(two)[1] == {"step": 2}
    assert checkpoint.load_tensors(checkpoint.previous(two))[1] == {"step": 1}


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_a_broken_checkpoint_a_run_goes_on_from_the_one_before(two, damage, capsys):
    damage(two)
    with pytest.raises(InputError, match=r"whole checkpoint|damaged|no checkpoint"):
        checkpoint.load_tensors(two)
    assert checkpoint.there(two)
    tensors, info = checkpoint.load_newest(two)
    assert info == {"step": 1}
    assert (tensors["a"] == 1).all()
    assert "going on from the checkpoint before it, of step 1" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read is at hand on Linux")
def test_a_checkpoint_on_a_bad_part_of_the_disk_is_said_and_the_one_before_is_taken(two, capsys):
    two.unlink()
    two.symlink_to("/proc/self/mem")
    assert checkpoint.load_newest(two)[1] == {"step": 1}
    assert "cannot be read (Input/output error); going on from the checkpoint before it" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_checkpoint_was_damaged_ends_with_the_same_bits(toy, tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path, seeded(6, interrupt))
    assert saved(tmp_path) == 6
    damage(tmp_path / "checkpoint.safetensors")
    fit_toy(tmp_path, seeded())
    assert_same_bits(toy, tmp_path)


def test_when_both_are_broken_it_is_said_and_they_are_left(two):
    for path in (two, checkpoint.previous(two)):
        flip(path)
    before = contents(two.parent)
    with pytest.raises(InputError, match="damaged after it was written; delete it to start anew"):
        checkpoint.load_newest(two)
    assert contents(two.parent) == before


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("damage", [None, flip])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, damage, links, monkeypatch):
    """Also when the last one is damaged: what it goes on from must not make way for that."""
    path = tmp_path / "checkpoint.safetensors"
    if not links:
        monkeypatch.setattr(os, "link", no_second_name)
    done = []
    for last in range(20):
        for old in tmp_path.iterdir():
            old.unlink()
        save(path, 1)
        save(path, 2)
        if damage:
            damage(path)
        with Fate(last):
            save(path, 3)
            done.append(last)
        found = checkpoint.load_newest(path)[1]["step"]
        assert found in ((1, 3) if damage else (2, 3))
        save(path, 4)
        assert checkpoint.load_tensors(path)[1] == {"step": 4}
        assert found == 1 or checkpoint.load_tensors(checkpoint.previous(path))[1] == {"step": found}
        assert set(tmp_path.iterdir()) == {path, checkpoint.previous(path)}
    assert done[0] >= 6  # it was killed at six moments at least, and then at none


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_again_and_again_also_while_it_saves_ends_with_the_same_bits(toy, tmp_path, seed):
    chance, kills, done = random.Random(seed), 0, False
    while not done:
        with Fate(chance.randrange(25)):
            fit_toy(tmp_path, seeded())
            done = True
        kills += not done
    assert kills > 3
    assert_same_bits(toy, tmp_path)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [10, 10]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits():
    asked = ["-m", "tests.benchmarks.kills", "--kills", "10", "--steps", "1200"]
    made = subprocess.run([sys.executable, *asked], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "10 kills" in made.stdout
    assert "the same bits" in made.stdout
