"""Files from unknown sources: pickles are never executed, and forged checkpoints are refused with one sentence."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load, save

from minissl.cli import main
from minissl.errors import InputError
from minissl.training import checkpoint
from tests.folders import TINY, class_folders
from tests.runs import error_sentence, read_files, train_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run; its images are in the folder beside it."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_tiny(class_folders(folder / "data", train=6, test=2), folder / "run") == 0
    return folder / "run"


class Payload:
    """An object whose unpickling creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def plain(payload, path):
    path.write_bytes(pickle.dumps(payload))


def of_torch(payload, path):
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": payload}, path)


def of_old_torch(payload, path):
    torch.save({"model": payload}, path, _use_new_zipfile_serialization=False)


WRITERS = [plain, of_torch, of_old_torch]
NOT_COMPLETE = "is not a complete checkpoint of minissl"
OPTIONS = [*TINY, "--data", "digits", "--image_size", "32"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("name", "words", "problem"),
    [
        ("weights.pth", ["train", "dino", *OPTIONS, "--encoder.weights"], "not opened"),
        ("weights.bin", ["train", "dino", *OPTIONS, "--encoder.weights"], "not opened"),
        ("weights.safetensors", ["train", "dino", *OPTIONS, "--encoder.weights"], NOT_COMPLETE),
        ("teacher.pth", ["train", "dinov3", *OPTIONS, "--teacher"], "not opened"),
        ("encoder.pth", ["track", "clips"], "not opened"),
    ],
)
def test_a_pickle_is_not_executed_as_any_option(tmp_path, capsys, write, name, words, problem):
    executed, file, output_dir = tmp_path / "executed", tmp_path / name, tmp_path / "run"
    write(Payload(executed), file)
    command = ["track", str(file), "clips"] if words[0] == "track" else [*words, str(file), "--out", str(output_dir)]
    sentence = error_sentence(capsys, main(command))
    assert str(file) in sentence
    assert problem in sentence
    assert not executed.exists()
    assert not output_dir.exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("checkpoint.safetensors", "train"),
        ("checkpoint.safetensors", "init_from"),
        ("encoder.safetensors", "evaluate"),
        ("encoder.safetensors", "visualize"),
        ("encoder.safetensors", "track"),
        ("checkpoint.safetensors", "export"),
    ],
)
def test_a_pickle_in_a_run_directory_is_not_executed(whole, tmp_path, capsys, write, name, command):
    executed, output_dir = tmp_path / "executed", tmp_path / "run"
    shutil.copytree(whole, output_dir)
    (output_dir / "metrics.json").write_text('{"knn": 1.0}')
    (output_dir / "checkpoint.previous.safetensors").unlink()
    write(Payload(executed), output_dir / name)
    before = read_files(output_dir)
    words = {
        "init_from": ["train", "dino", *OPTIONS, "--init_from", str(output_dir), "--out", str(tmp_path / "new")],
        "track": ["track", str(output_dir), "clips"],
        "export": ["export", str(output_dir), str(tmp_path / "exported.safetensors")],
    }
    if command == "train":
        code = train_tiny(whole.parent / "data", output_dir, "--resume")
    else:
        code = main(words.get(command, [command, str(output_dir)]))
    assert error_sentence(capsys, code).startswith(f"{output_dir / name} {NOT_COMPLETE}")
    assert not executed.exists()
    after = read_files(output_dir)
    rewritten = ("config.json", "log.jsonl")
    assert {k: v for k, v in after.items() if k not in rewritten} == {
        k: v for k, v in before.items() if k not in rewritten
    }


def test_in_place_of_a_pickle_the_checkpoint_before_is_loaded(whole, tmp_path, capsys):
    output_dir = tmp_path / "run"
    shutil.copytree(whole, output_dir)
    plain(Payload(tmp_path / "executed"), output_dir / "checkpoint.safetensors")
    assert train_tiny(whole.parent / "data", output_dir, "--resume") == 0
    assert "step 11" in capsys.readouterr().out
    assert read_files(output_dir)["encoder.safetensors"] == read_files(whole)["encoder.safetensors"]
    assert not (tmp_path / "executed").exists()


HEADERS = {
    "list": "[1, 2]",
    "number": "7",
    "string": '"step"',
    "null": "null",
    "not JSON": "{",
    "endless": "[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_checkpoint_with_a_forged_header_is_refused(tmp_path, header):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(save({"a": torch.zeros(3)}, {"minissl": header}))
    with pytest.raises(InputError, match=NOT_COMPLETE):
        checkpoint.load_tensors(path)


@pytest.mark.parametrize("length", [0, 7, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_checkpoint_with_a_wrong_header_length_is_refused(tmp_path, length):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_tensors(path, {"a": torch.zeros(3)}, {"step": 1})
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(InputError, match=NOT_COMPLETE):
        checkpoint.load_tensors(path)


def test_a_checkpoint_with_changed_tensors_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_tensors(path, {"a": torch.zeros(3)}, {"step": 1})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    path.write_bytes(save({"a": load(content)["a"] + 1}, header["__metadata__"]))
    with pytest.raises(InputError, match="damaged after it was written"):
        checkpoint.load_tensors(path)
