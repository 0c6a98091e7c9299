"""Faults around a run: full disks, folders that cannot be written, other options, a second run, non-finite losses."""

import builtins
import errno
import json
import math
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from matplotlib.figure import Figure

from minissl import visualization
from minissl.cli import main
from minissl.errors import InputError
from minissl.training import checkpoint
from minissl.training.logger import read_log
from tests.folders import class_folders
from tests.runs import (
    ToyMethod,
    assert_same_bits,
    at_step,
    error_sentence,
    fit_toy,
    read_files,
    saved_step,
    train_tiny,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"), train=6, test=2)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The directory of a run that was not interrupted."""
    output_dir = tmp_path_factory.mktemp("whole")
    assert train_tiny(data, output_dir) == 0
    return output_dir


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of that directory, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


class FullDisk:
    """Context manager: from the nth write to a file with a word in its name, only half of the content is written."""

    def __init__(self, word, nth=0):
        self.word, self.left, self.open_file = word, nth, builtins.open

    def open(self, path, mode="r", *more, **named):
        file = self.open_file(path, mode, *more, **named)
        if self.word in str(path) and ("w" in mode or "a" in mode):
            self.left -= 1
            return self.half(file) if self.left < 0 else file
        return file

    @contextmanager
    def half(self, file):
        class Half:
            def write(self, content):
                file.write(content[: len(content) // 2])
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")

        with file:
            yield Half()

    def __enter__(self):
        self.patch = patch.object(builtins, "open", self.open)
        self.patch.start()

    def __exit__(self, *error):
        self.patch.stop()


@pytest.mark.parametrize(("word", "nth"), [("log.jsonl", 1), ("checkpoint", 5), ("encoder", 5)])
def test_a_full_disk_stops_the_run_and_the_resumed_run_has_the_same_bits(data, whole, tmp_path, capsys, word, nth):
    with FullDisk(word, nth):
        sentence = error_sentence(capsys, train_tiny(data, tmp_path))
    assert "The disk is full" in sentence
    assert word in sentence
    assert "--resume" in sentence
    assert not list(tmp_path.glob("*.partial"))
    before = read_files(tmp_path)
    if word != "log.jsonl":  # whose first line is written at the end of so short a run
        assert saved_step(tmp_path) == 5 + (word == "encoder")
    assert before.get("log.jsonl", b"").count(b"\n") == len(read_log(tmp_path / "log.jsonl"))
    assert train_tiny(data, tmp_path, "--resume") == 0
    assert_same_bits(whole, tmp_path)


def test_a_full_disk_keeps_the_previous_figures(copied, capsys, monkeypatch):
    for name in ("attention", "pca", "curves", "collapse"):
        monkeypatch.setattr(visualization, f"{name}_figure", lambda *args, **kwargs: Figure(figsize=(1, 1)))
    assert main(["visualize", str(copied)]) == 0
    before = read_files(copied)
    assert len([name for name in before if name.endswith(".png")]) == 4
    with FullDisk("pca.png"):
        assert "The disk is full" in error_sentence(capsys, main(["visualize", str(copied)]))
    assert read_files(copied) == before


UNWRITABLE = Path("/sys")  # on Linux no user can create a file here, not even root


@pytest.mark.skipif(not (UNWRITABLE / "kernel").is_dir(), reason="there is no such folder")
@pytest.mark.parametrize(
    ("output_dir", "problem"),
    [(UNWRITABLE, r"cannot be written \(.+\)"), (UNWRITABLE / "run", r"cannot be made \(.+\)")],
)
def test_a_read_only_folder_is_refused(data, capsys, output_dir, problem):
    sentence = error_sentence(capsys, train_tiny(data, output_dir))
    assert re.search(problem, sentence)
    assert "--out" in sentence


def test_a_folder_that_cannot_be_made_is_refused(data, tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    sentence = error_sentence(capsys, train_tiny(data, tmp_path / "file" / "run"))
    assert "cannot be made (Not a directory)" in sentence
    assert "--out" in sentence
    assert (tmp_path / "file").read_text() == "here first"


def test_a_file_in_place_of_the_run_directory_is_refused(data, tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    assert "--out" in error_sentence(capsys, train_tiny(data, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "here first"


def test_a_run_directory_that_is_moved_during_the_run_stops_it(data, tmp_path, capsys):
    output_dir = tmp_path / "run"
    with at_step(5, lambda: output_dir.rename(tmp_path / "elsewhere")):
        sentence = error_sentence(capsys, train_tiny(data, output_dir))
    assert "cannot be written (No such file or directory)" in sentence
    assert saved_step(tmp_path / "elsewhere") == 5


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\)"):
        checkpoint.write_atomic(tmp_path / "file" / "more", b"")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--resume"),
        (["--resume", "--lr", "0.5"], "lr 0.002, not 0.5"),
        (["--resume", "--seed", "1"], "seed 0, not 1"),
        (["--resume", "--num_prototypes", "16"], "num_prototypes 32, not 16"),
        (["--resume", "--encoder.depth", "2"], "encoder.depth 0, not 2"),
        (["--resume", "--image_size", "20"], "image_size 16, not 20"),
        (["--resume", "--data", "digits"], "not digits"),
    ],
)
def test_a_run_with_other_options_than_before_is_refused_and_nothing_changes(data, whole, capsys, options, problem):
    before = read_files(whole)
    assert problem in error_sentence(capsys, train_tiny(data, whole, *options))
    assert read_files(whole) == before


def test_a_second_run_in_the_same_directory_is_refused_and_nothing_changes(data, whole, capsys):
    before = read_files(whole)
    with checkpoint.lock_run_dir(whole):
        sentence = error_sentence(capsys, train_tiny(data, whole, "--resume"))
    assert "Another training" in sentence
    assert str(whole) in sentence
    assert read_files(whole) == before
    with checkpoint.lock_run_dir(whole):
        pass


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_is_kept(tmp_path, number):
    before = {}

    def spoil(loss):
        before.update(read_files(tmp_path))
        return loss * number

    with pytest.raises(InputError, match=f"The loss is {number} at step 6"):
        fit_toy(tmp_path, ToyMethod(6, spoil))
    assert saved_step(tmp_path) == 5
    after = read_files(tmp_path)
    assert {name: before[name] for name in after if "log" not in name} == {
        name: content for name, content in after.items() if "log" not in name
    }


@pytest.mark.parametrize("section", ["encoder", "method_options", "train"])
def test_a_config_whose_sections_are_not_objects_is_refused(copied, section, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["run"][section] = 7
    (copied / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged" in error_sentence(capsys, main(["visualize", str(copied)]))


@pytest.mark.parametrize("section", [None, "encoder", "method_options", "train"])
@pytest.mark.parametrize("command", ["visualize", "evaluate", "doctor"])
def test_a_config_with_an_unknown_option_is_refused(copied, section, command, capsys):
    config = json.loads((copied / "config.json").read_text())
    (config["run"][section] if section else config["run"])["weight_decaj"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    assert "unknown option 'weight_decaj'" in error_sentence(capsys, main([command, str(copied)]))


def test_a_config_of_a_newer_format_is_refused(data, copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    assert config["format_version"] == checkpoint.FORMAT_VERSION
    (copied / "config.json").write_text(json.dumps(config | {"format_version": checkpoint.FORMAT_VERSION + 1}))
    before = read_files(copied)
    assert "newer minissl" in error_sentence(capsys, main(["visualize", str(copied)]))
    assert "newer minissl" in error_sentence(capsys, train_tiny(data, copied, "--resume"))
    assert read_files(copied) == before


def test_damaged_lines_of_a_log_are_skipped(tmp_path):
    lines = [b'{"step": 1, "loss": 3.0}', b"\0" * 40, b'{"step": 2, "lo\xff', b'{"step": 3, "loss": 1.0}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n" + b"\0" * 512)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3]


@pytest.mark.parametrize("content", ["", "[1, 2", "[1, 2]", "\ud800", "{" * 9999, '{"a": ' * 99_999])
def test_damaged_metrics_are_refused(copied, content, capsys):
    (copied / "metrics.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    before = read_files(copied)
    sentence = error_sentence(capsys, main(["visualize", str(copied)]))
    assert sentence == str(checkpoint.damaged_file_error(copied / "metrics.json"))
    assert read_files(copied) == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"run": {',
        "[]",
        "{}",
        '{"run": {"method": "dino"}, "plan": {}}',
        '{"run": 1}',
        '{"format_version": "1"}',
        '{"format_version": null}',
    ],
)
@pytest.mark.parametrize("command", ["visualize", "evaluate", "doctor"])
def test_a_damaged_config_is_refused(copied, content, command, capsys):
    (copied / "config.json").write_text(content)
    before = read_files(copied)
    sentence = error_sentence(capsys, main([command, str(copied)]))
    assert sentence == str(checkpoint.damaged_file_error(copied / "config.json"))
    assert read_files(copied) == before
