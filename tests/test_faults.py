"""Kills and damaged checkpoints: one clear sentence, nothing is lost, and the resumed run ends with the same bits.

Full disks, other options and two runs in one directory are in `test_faults_runs`, faults of images in
`test_faults_data`, files of other programs in `test_faults_files`.
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

from minissl.errors import InputError
from minissl.training import checkpoint
from minissl.training.logger import read_log
from tests.runs import ToyMethod, assert_same_bits, fit_toy, interrupt, read_files, saved_step

ROOT = Path(__file__).parent.parent
SYSTEM_CALLS = (  # of a save
    (builtins, "open"),
    (os, "fsync"),
    (os, "link"),
    (os, "replace"),
    (pathlib.Path, "unlink"),
)


class Killed(BaseException):
    """As SIGKILL, no `except` of the program catches it, and nothing is cleaned up after it."""


class KillAfter:
    """Context manager that raises Killed in place of a system call.

    Args:
        calls: number of system calls that are made before.
    """

    def __init__(self, calls):
        self.calls, self.patches = calls, [patch.object(*call, self.counted(getattr(*call))) for call in SYSTEM_CALLS]

    def counted(self, function):
        def call(*args, **kwargs):
            self.calls -= 1
            if self.calls < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    def __enter__(self):
        for one in self.patches:
            one.start()

    def __exit__(self, *error):
        for one in self.patches:
            one.stop()
        return error[0] is Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run of `fit_toy` that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    fit_toy(folder, seeded_toy())
    return folder


def seeded_toy(*event):
    torch.manual_seed(0)
    return ToyMethod(*event)


@pytest.fixture
def path(tmp_path):
    """A checkpoint of step 2; the one before it, of step 1, is kept."""
    path = tmp_path / "checkpoint.safetensors"
    for step in (1, 2):
        save(path, step)
    return path


def save(path, step):
    checkpoint.save_tensors(path, {"a": torch.full((50,), float(step))}, {"step": step}, keep=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def change_header(path):
    """Change the step in the header, and no tensor."""
    path.write_bytes(re.sub(rb'(step\\": )\d', rb"\g<1>4", path.read_bytes()))


DAMAGES = [truncate, flip_bit, empty, change_header, Path.unlink]


def test_the_last_two_checkpoints_are_kept(path):
    assert checkpoint.load_latest_tensors(path)[1] == {"step": 2}
    assert checkpoint.load_tensors(checkpoint.previous_path(path))[1] == {"step": 1}


@pytest.mark.parametrize("damage", DAMAGES)
def test_in_place_of_a_damaged_checkpoint_the_one_before_is_loaded(path, damage, capsys):
    damage(path)
    with pytest.raises(InputError):
        checkpoint.load_tensors(path)
    assert checkpoint.checkpoint_exists(path)
    tensors, info = checkpoint.load_latest_tensors(path)
    assert info == {"step": 1}
    assert (tensors["a"] == 1).all()
    assert "step 1" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="only Linux has a file that cannot be read")
def test_in_place_of_a_checkpoint_on_a_bad_sector_the_one_before_is_loaded(path, capsys):
    path.unlink()
    path.symlink_to("/proc/self/mem")
    assert checkpoint.load_latest_tensors(path)[1] == {"step": 1}
    assert "cannot be read (Input/output error)" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_checkpoint_was_damaged_ends_with_the_same_bits(whole, tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path, seeded_toy(6, interrupt))
    assert saved_step(tmp_path) == 6
    damage(tmp_path / "checkpoint.safetensors")
    fit_toy(tmp_path, seeded_toy())
    assert_same_bits(whole, tmp_path)


def test_two_damaged_checkpoints_are_refused_and_left_unchanged(path):
    for each in (path, checkpoint.previous_path(path)):
        flip_bit(each)
    before = read_files(path.parent)
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load_latest_tensors(path)
    assert read_files(path.parent) == before


def no_links(*paths):
    raise OSError("This file system has no links.")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("damage", [None, flip_bit])
def test_a_kill_at_any_moment_of_a_save_leaves_a_complete_checkpoint(tmp_path, damage, links, monkeypatch):
    """Also if the last one is damaged: it must not replace the one before, from which the run continues."""
    path = tmp_path / "checkpoint.safetensors"
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    completed = []
    for calls in range(20):
        for old in tmp_path.iterdir():
            old.unlink()
        save(path, 1)
        save(path, 2)
        if damage:
            damage(path)
        with KillAfter(calls):
            save(path, 3)
            completed.append(calls)
        step = checkpoint.load_latest_tensors(path)[1]["step"]
        assert step in ((1, 3) if damage else (2, 3))
        save(path, 4)
        assert checkpoint.load_tensors(path)[1] == {"step": 4}
        assert step == 1 or checkpoint.load_tensors(checkpoint.previous_path(path))[1] == {"step": step}
        assert set(tmp_path.iterdir()) == {path, checkpoint.previous_path(path)}
    assert completed[0] >= 6  # it was killed at six moments at least, and finally not at all


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_repeatedly_also_during_saves_ends_with_the_same_bits(whole, tmp_path, seed):
    rng, kills, done = random.Random(seed), 0, False
    while not done:
        with KillAfter(rng.randrange(25)):
            fit_toy(tmp_path, seeded_toy())
            done = True
        kills += not done
    assert kills > 3
    assert_same_bits(whole, tmp_path)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [10, 10]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_process_that_is_killed_repeatedly_ends_with_the_same_bits():
    command = [sys.executable, "-m", "tests.benchmarks.interrupted_runs", "--kills", "6", "--steps", "600"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 kills" in result.stdout
    assert "the same bits" in result.stdout
