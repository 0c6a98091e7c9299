"""Image files that change or disappear during training, and worker processes that are killed."""

import gc
import multiprocessing.resource_sharer
import multiprocessing.synchronize
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from minissl.data.folder import load_folder
from minissl.data.streaming import NO_FILE_READABLE, ImageFiles, report_dead_workers
from minissl.errors import InputError
from tests.folders import class_folders, small_memory, write_image
from tests.runs import assert_same_bits, at_step, error_sentence, interrupted_run, saved_step, train_tiny


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    """A run without faults; its images are next to it."""
    folder = tmp_path_factory.mktemp("reference")
    data = class_folders(folder / "data", train=6, test=2)
    assert train_tiny(data, folder / "run") == 0
    interrupted_run(data, folder / "interrupted")
    return folder / "run"


@pytest.fixture
def data(reference_run, tmp_path):
    """The images of that run, which a test may change."""
    data = reference_run.parent / "data"
    copy = shutil.copytree(data, tmp_path.with_name("copy" + tmp_path.name))
    yield data
    shutil.rmtree(data)
    shutil.copytree(copy, data)


@pytest.fixture
def interrupted(reference_run, tmp_path):
    """A copy of the same run, interrupted by Ctrl-C at step 6."""
    return Path(shutil.copytree(reference_run.parent / "interrupted", tmp_path / "interrupted"))


def image_files(data, num_workers=0, labels=None):
    return ImageFiles(sorted((data / "train").rglob("*.png")), 16, labels, num_workers=num_workers)


def add(folder):
    write_image(folder / "999.png", seed=99)


def remove(folder):
    (folder / "003.png").unlink()


def truncate(folder):
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:200])


def empty(folder):
    (folder / "003.png").write_bytes(b"")


def exchange(folder):
    write_image(folder / "003.png", size=(21, 24), seed=99)


@pytest.mark.parametrize(("event", "now"), [(add, 13), (remove, 11), (truncate, 11), (empty, 11), (exchange, 12)])
def test_a_resumed_run_reports_changed_images_and_continues(data, interrupted, capsys, event, now):
    event(data / "train" / "dog")
    for step in (6, 12):  # also when it is resumed once more
        assert saved_step(interrupted) == step
        assert train_tiny(data, interrupted, "--resume") == 0
        warnings = [line for line in capsys.readouterr().out.splitlines() if f"12 then, {now} now" in line]
        assert len(warnings) == 1


@pytest.mark.parametrize("event", [add, remove, empty, exchange])
def test_changed_files_are_detected_without_decoding(data, event):
    before = image_files(data).fingerprint
    assert image_files(data).fingerprint == before
    event(data / "train" / "dog")
    assert image_files(data).fingerprint["files"] != before["files"]


@pytest.mark.slow
def test_a_resumed_streamed_run_reports_changed_files(data, tmp_path, capsys):
    with small_memory():
        run_dir = interrupted_run(data, tmp_path)
        exchange(data / "train" / "dog")
        assert train_tiny(data, run_dir, "--resume") == 0
    assert "12 then, 12 now" in capsys.readouterr().out


def test_a_streamed_run_can_be_resumed_from_memory(data, reference_run, tmp_path, capsys):
    with small_memory():
        interrupted_run(data, tmp_path)
    assert train_tiny(data, tmp_path, "--resume") == 0
    assert "12 then" not in capsys.readouterr().out
    assert_same_bits(reference_run, tmp_path)


def test_a_file_that_disappears_is_reported_once_and_replaced_by_the_next_with_its_label(data, capsys):
    images = load_folder(data, "train", 16)
    files = image_files(data, labels=images.labels)
    (data / "train" / "cat" / "005.png").unlink()  # the last of its class
    truncate(data / "train" / "cat")
    for _ in range(2):
        batch = files.get_batch(torch.tensor([2, 3, 5, 6]))
        assert torch.equal(batch.images, images.images[[2, 4, 6, 6]])
        assert batch.labels.tolist() == [0, 0, 1, 1]
    assert capsys.readouterr().out.count(str(data / "train" / "cat")) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_without_any_file_ends_without_a_traceback_of_a_worker(data, num_workers):
    files = image_files(data, num_workers)
    for file in files.files:
        file.unlink()
    with pytest.raises(InputError) as refused:
        next(files.iterate([torch.tensor([0, 1])]))
    assert str(refused.value) == NO_FILE_READABLE


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_worker_is_reported_and_the_run_resumes_to_the_same_bits(data, reference_run, tmp_path, capsys):
    def kill_workers():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with small_memory():
        with at_step(5, kill_workers):
            message = error_sentence(capsys, train_tiny(data, tmp_path))
        assert "worker process" in message
        assert "--resume" in message
        assert 5 <= saved_step(tmp_path) < 12
        assert train_tiny(data, tmp_path, "--resume") == 0
    assert_same_bits(reference_run, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems pass tensors on in another way")
@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_a_worker_killed_while_it_passes_a_batch_on_is_reported(data, monkeypatch, error):
    def disconnect(ticket):
        (worker,) = multiprocessing.active_children()
        killer = threading.Timer(0.3, worker.kill)  # PyTorch notices the death an instant after the connection ends
        killer.start()
        raise error

    monkeypatch.setattr(multiprocessing.resource_sharer._ResourceSharer, "get_connection", staticmethod(disconnect))
    with pytest.raises(InputError, match="worker process"), report_dead_workers():
        next(image_files(data, num_workers=1).iterate([torch.tensor([0, 1])]))
    time.sleep(0.5)  # no signal arrives later


class KilledWithTheLock(ImageFiles):
    """The worker that decodes is killed while it holds the lock of every event between it and the main process."""

    def get_batch(self, indices):
        for event in [x for x in gc.get_objects() if type(x) is multiprocessing.synchronize.Event]:
            event._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the worker is a fork")
def test_a_killed_worker_leaves_no_lock_that_is_waited_for(data):
    def fail(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    try:
        with pytest.raises(InputError, match="worker process"), report_dead_workers():
            next(KilledWithTheLock(image_files(data).files, 16, num_workers=1).iterate([torch.tensor([0])]))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
def test_workers_ignore_ctrl_c(data):
    files = image_files(data, num_workers=1)
    index_batches = [torch.tensor([i]) for i in range(12)] * 3
    batches = files.iterate(index_batches)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    with report_dead_workers():
        assert len(list(batches)) == len(index_batches) - 1


def test_other_runtime_errors_are_not_converted():
    with pytest.raises(RuntimeError, match="another"), report_dead_workers():
        raise RuntimeError("another")
