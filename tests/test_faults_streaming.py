"""What goes wrong with images while a training goes on: they are changed, or gone, or who decodes them is."""

import multiprocessing.resource_sharer
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minissl.data.folder import load_folder
from minissl.data.streaming import ImageFiles, report_dead_workers
from minissl.errors import InputError
from tests.folders import class_folders, picture
from tests.test_faults_runs import at_step, go, sentence, stopped
from tests.test_stream import small_memory
from tests.test_train import assert_same_bits, saved


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to; its images are beside it."""
    folder = tmp_path_factory.mktemp("whole")
    data = class_folders(folder / "data", train=6, test=2)
    assert go(data, folder / "run") == 0
    stopped(data, folder / "begun")
    return folder / "run"


@pytest.fixture
def data(whole, tmp_path):
    """The images of that run, which a test may change."""
    data = whole.parent / "data"
    kept = shutil.copytree(data, tmp_path.with_name("kept" + tmp_path.name))
    yield data
    shutil.rmtree(data)
    shutil.copytree(kept, data)


@pytest.fixture
def begun(whole, tmp_path):
    """A folder of the same run as Ctrl-C stopped it at step 6."""
    return Path(shutil.copytree(whole.parent / "begun", tmp_path / "begun"))


def listed(data, workers=0):
    return ImageFiles(tuple(sorted((data / "train").rglob("*.png"))), 16, workers=workers)


def add(folder):
    picture(folder / "999.png", seed=99)


def remove(folder):
    (folder / "003.png").unlink()


def spoil(folder):
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:200])


def empty(folder):
    (folder / "003.png").write_bytes(b"")


def exchange(folder):
    picture(folder / "003.png", size=(21, 24), seed=99)


@pytest.mark.parametrize(("event", "now"), [(add, 13), (remove, 11), (spoil, 11), (empty, 11), (exchange, 12)])
def test_images_that_changed_before_a_run_goes_on_are_said_and_it_goes_on(data, begun, capsys, event, now):
    event(data / "train" / "dog")
    for steps in (6, 12):  # also when it goes on once more, for it is of two kinds of images now
        assert saved(begun) == steps
        assert go(data, begun, "--resume") == 0
        assert capsys.readouterr().out.count(
            f"The images of folder:{data} are not those the run began with (12 then, {now} now); it goes on with what "
            "is there, and ends with other weights than it would have."
        ) == 1  # fmt: skip


@pytest.mark.parametrize("event", [add, remove, empty, exchange])
def test_files_that_changed_are_known_without_being_decoded(data, event):
    before = listed(data).fingerprint
    assert listed(data).fingerprint == before
    event(data / "train" / "dog")
    assert listed(data).fingerprint["files"] != before["files"]


def test_files_that_changed_before_a_streamed_run_goes_on_are_said(data, tmp_path, capsys):
    with small_memory():
        out = stopped(data, tmp_path)
        exchange(data / "train" / "dog")
        assert go(data, out, "--resume") == 0
    assert "are not those the run began with (12 then, 12 now)" in capsys.readouterr().out


def test_a_run_that_goes_on_from_memory_where_it_was_streamed_has_not_changed_its_images(data, whole, tmp_path, capsys):
    with small_memory():
        stopped(data, tmp_path)
    assert go(data, tmp_path, "--resume") == 0
    assert "are not those" not in capsys.readouterr().out
    assert_same_bits(whole, tmp_path)


def test_a_file_that_goes_while_a_run_streams_is_said_once_and_gives_way_to_the_next_with_its_label(data, capsys):
    images = load_folder(data, "train", 16)
    files = replace(listed(data), labels=images.labels)
    (data / "train" / "cat" / "005.png").unlink()  # the last of its class
    spoil(data / "train" / "cat")
    for _ in range(2):
        found, labels = files[[2, 3, 5, 6]]
        assert torch.equal(found, images.images[[2, 4, 6, 6]])
        assert labels.tolist() == [0, 0, 1, 1]
    said = f"A file in {data / 'train' / 'cat'} is broken, or gone; here and wherever this happens the next one takes"
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_files_go_while_a_run_streams_it_is_said_without_another_process_traceback(data, workers):
    files = listed(data, workers)
    for file in files.files:
        file.unlink()
    with pytest.raises(InputError) as refused:
        next(files.batches([torch.tensor([0, 1])]))
    assert str(refused.value) == (
        "None of the files is an image that can be read; when they are back, the same command with --resume goes on."
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_process_that_decodes_and_is_killed_is_said_and_the_run_goes_on_to_the_same_bits(
    data, whole, tmp_path, capsys
):
    def kill():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with small_memory():
        with at_step(5, kill):
            said = sentence(capsys, go(data, tmp_path))
        assert said.startswith(
            "A process that reads images was ended from outside, as a system does that has no memory"
        )
        assert said.endswith("What was saved last is whole; the same command with --resume goes on.")
        assert 5 <= saved(tmp_path) < 12
        assert go(data, tmp_path, "--resume") == 0
    assert_same_bits(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors are handed over by another way")
@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_a_process_that_is_killed_while_it_hands_a_batch_over_is_said_too(data, monkeypatch, error):
    def cut(ticket):
        (decoder,) = multiprocessing.active_children()
        killer = threading.Timer(0.3, decoder.kill)  # that it was ended is known an instant after the line is dead
        killer.start()
        raise error

    monkeypatch.setattr(multiprocessing.resource_sharer._ResourceSharer, "get_connection", staticmethod(cut))
    with pytest.raises(InputError, match="A process that reads images was ended from outside"), report_dead_workers():
        next(listed(data, workers=1).batches([torch.tensor([0, 1])]))
    time.sleep(0.5)  # nothing comes after it


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for others")
def test_ctrl_c_which_reaches_the_processes_that_decode_as_well_does_not_end_them(data):
    files = listed(data, workers=1)
    orders = [torch.tensor([i]) for i in range(12)] * 3
    batches = files.batches(orders)
    next(batches)
    (decoder,) = multiprocessing.active_children()
    os.kill(decoder.pid, signal.SIGINT)
    with report_dead_workers():
        assert len(list(batches)) == len(orders) - 1


def test_another_error_than_that_of_a_decoder_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="another"), report_dead_workers():
        raise RuntimeError("another")
