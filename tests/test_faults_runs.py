"""What goes wrong around a run: full disks, folders that cannot be written, other options, another run, no numbers."""

import builtins
import errno
import json
import math
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from matplotlib.figure import Figure

from minissl import checkpoint, runs, train, visualize
from minissl.__main__ import main
from minissl.errors import InputError
from minissl.record import read_log
from tests.folders import TINY, class_folders
from tests.test_faults import contents
from tests.test_train import Toy, assert_same_bits, fit_toy, saved

STEPS = 12


def go(data, out, *more):
    """A tiny run of `STEPS` steps on 12 images, saved after each; no measuring, no pictures. Returns its exit code."""
    words = [*TINY, "--epochs", "4", "--watch_minutes", "9", "--save_minutes", "0", "--data", f"folder:{data}"]
    with patch.object(runs, "show"), patch.object(runs, "measure"):
        return main(["train", "dino", *words, "--out", str(out), *more])


@contextmanager
def at_step(number, event):
    """Inside, something happens just before a step of `go`; not before one of its plan, whose progress is a half."""
    honest = train.training_step

    def step(method, optimizer, batch, progress, *others):
        if progress == number / STEPS:
            event()
        return honest(method, optimizer, batch, progress, *others)

    with patch.object(train, "training_step", step):
        yield


def stopped(data, out, step=5):
    """A run of `go` that Ctrl-C stopped: its checkpoint is of the step after."""
    with at_step(step, lambda: signal.raise_signal(signal.SIGINT)):
        assert go(data, out) == 130
    assert saved(out) == step + 1
    return out


def sentence(capsys, code):
    """What a command that was refused says: one line, and no traceback."""
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    (found,) = re.findall(r"(?:^|[\r\n]) *minissl: ([^\r\n]*)", said)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"), train=6, test=2)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    assert go(data, out) == 0
    return out


class FullDisk:
    """Inside, from the `nth` on, there is room for half of what is written to a file with some word in its name."""

    def __init__(self, word, nth=0):
        self.word, self.left, self.honest = word, nth, builtins.open

    def open(self, path, mode="r", *more, **named):
        file = self.honest(path, mode, *more, **named)
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

    def __exit__(self, *problem):
        self.patch.stop()


@pytest.mark.parametrize(("word", "nth"), [("log.jsonl", 1), ("checkpoint", 5), ("encoder", 5)])
def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_to_the_same_bits_when_there_is_room(
    data, whole, tmp_path, capsys, word, nth
):
    with FullDisk(word, nth):
        said = sentence(capsys, go(data, tmp_path))
    assert said.startswith("The disk is full: ")
    assert word in said
    assert said.endswith("Make room, and give the same command again; a training goes on with --resume.")
    assert "what was saved before is whole." in said
    assert not list(tmp_path.glob("*.partial"))
    before = contents(tmp_path)
    if word != "log.jsonl":  # whose first line is written at the end of so short a run
        assert saved(tmp_path) == 5 + (word == "encoder")
    assert before.get("log.jsonl", b"").count(b"\n") == len(read_log(tmp_path / "log.jsonl"))
    assert go(data, tmp_path, "--resume") == 0
    assert_same_bits(whole, tmp_path)


def test_a_full_disk_leaves_the_pictures_that_were_there(whole, tmp_path, capsys, monkeypatch):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    for kind in ("attention", "pca", "curves", "collapse"):
        monkeypatch.setattr(visualize, f"{kind}_figure", lambda *args, **kwargs: Figure(figsize=(1, 1)))
    assert main(["show", str(out)]) == 0
    before = contents(out)
    assert len([name for name in before if name.endswith(".png")]) == 4
    with FullDisk("pca.png"):
        assert "The disk is full: " in sentence(capsys, main(["show", str(out)]))
    assert contents(out) == before


UNWRITABLE = Path("/sys")  # on Linux nobody can make a file here, root neither


@pytest.mark.skipif(not (UNWRITABLE / "kernel").is_dir(), reason="there is no such folder")
@pytest.mark.parametrize(
    ("out", "says"),
    [(UNWRITABLE, r"cannot be written \(.+\)"), (UNWRITABLE / "run", r"cannot be made \(.+\)")],  # or "Read-only ..."
)
def test_a_folder_in_which_nothing_can_be_written_is_said(data, capsys, out, says):
    said = sentence(capsys, go(data, out))
    assert re.search(says, said)
    assert said.endswith("choose another --out.")


def test_a_folder_that_cannot_be_made_is_said(data, tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    said = sentence(capsys, go(data, tmp_path / "file" / "run"))
    assert "cannot be made (Not a directory); choose another --out" in said
    assert (tmp_path / "file").read_text() == "here first"


def test_a_folder_that_goes_away_while_the_run_works_in_it_is_said(data, tmp_path, capsys):
    out = tmp_path / "run"
    with at_step(5, lambda: out.rename(tmp_path / "elsewhere")):
        said = sentence(capsys, go(data, out))
    assert "cannot be written (No such file or directory); choose another place for it." in said
    assert saved(tmp_path / "elsewhere") == 5


def test_what_cannot_be_written_nor_taken_away_is_said(tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\)"):
        checkpoint.write(tmp_path / "file" / "more", b"")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "already holds a run of dino; go on with --resume, or choose another --out."),
        (["--resume", "--lr", "0.5"], "a run with lr 0.002, not 0.5; go on with the options it was started with"),
        (["--resume", "--seed", "1"], "a run with seed 0, not 1; go on with the options"),
        (["--resume", "--prototypes", "16"], "a run with prototypes 32, not 16; go on with the options"),
        (["--resume", "--data", "digits"], "not digits; go on with the options"),
    ],
)
def test_a_run_that_is_asked_for_otherwise_than_before_is_refused_and_is_left_as_it_was(
    data, whole, capsys, more, says
):
    before = contents(whole)
    assert says in sentence(capsys, go(data, whole, *more))
    assert contents(whole) == before


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(data, whole, capsys):
    before = contents(whole)
    with checkpoint.alone(whole):
        said = sentence(capsys, go(data, whole, "--resume"))
    assert said == f"Another training is at work in {whole}; wait for it, or choose another --out."
    assert contents(whole) == before
    with checkpoint.alone(whole):
        pass


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_said_and_the_last_checkpoint_is_left(tmp_path, number):
    held = {}

    def spoil(loss):
        held.update(contents(tmp_path))
        return loss * number

    with pytest.raises(InputError, match=f"^The loss is {number} at step 6; the last checkpoint is from before. Start"):
        fit_toy(tmp_path, Toy(6, spoil))
    assert saved(tmp_path) == 5
    assert {name: held[name] for name in contents(tmp_path) if "log" not in name} == {
        name: content for name, content in contents(tmp_path).items() if "log" not in name
    }


@pytest.mark.parametrize("part", ["encoder", "options"])
def test_a_config_whose_options_are_no_table_is_said(whole, tmp_path, part, capsys):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    config = json.loads((out / "config.json").read_text())
    config["run"][part] = 7
    (out / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged, or is not minissl's" in sentence(capsys, main(["show", str(out)]))


def test_a_log_that_a_power_cut_left_with_holes_is_read_around_them(tmp_path):
    lines = [b'{"step": 1, "loss": 3.0}', b"\0" * 40, b'{"step": 2, "lo\xff', b'{"step": 3, "loss": 1.0}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n" + b"\0" * 512)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3]


@pytest.mark.parametrize("content", ["", "[1, 2", "[1, 2]", "\ud800", "{" * 9999, '{"a": ' * 99_999])
def test_numbers_of_a_run_that_are_damaged_are_said(whole, tmp_path, content, capsys):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "metrics.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    before = contents(out)
    said = sentence(capsys, main(["show", str(out)]))
    assert said == f"{out / 'metrics.json'} is damaged, or is not minissl's; put it right, or take it away."
    assert contents(out) == before


@pytest.mark.parametrize(
    "content", ["", '{"run": {', "[]", "{}", '{"run": {"method": "dino"}, "plan": {}}', '{"run": 1}']
)
@pytest.mark.parametrize("words", [["show"], ["evaluate"], ["doctor"]], ids=lambda words: words[0])
def test_a_config_that_is_damaged_is_said(whole, tmp_path, content, words, capsys):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "config.json").write_text(content)
    before = contents(out)
    said = sentence(capsys, main([*words, str(out)]))
    assert said == f"{out / 'config.json'} is damaged, or is not minissl's; put it right, or take it away."
    assert contents(out) == before
