"""Files of strangers: whatever they are called and wherever they are given, none is run, and one sentence says so."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load, save

from minissl import checkpoint
from minissl.__main__ import main
from minissl.errors import InputError
from tests.folders import TINY, class_folders
from tests.test_faults import contents
from tests.test_faults_runs import go, sentence


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that is whole; its images are beside it."""
    folder = tmp_path_factory.mktemp("whole")
    assert go(class_folders(folder / "data", train=6, test=2), folder / "run") == 0
    return folder / "run"


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def plain(malice, path):
    path.write_bytes(pickle.dumps(malice))


def of_torch(malice, path):
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": malice}, path)


def of_old_torch(malice, path):
    torch.save({"model": malice}, path, _use_new_zipfile_serialization=False)


MADE = [plain, of_torch, of_old_torch]
CLOSED = "holds more than numbers, and to open it would run what it says; it was left closed."
NO_CHECKPOINT = "is not a whole checkpoint of minissl; delete it to start anew."
NEW = ("train", "dino", *TINY, "--data", "digits", "--image_size", "32")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("weights.pth", [*NEW, "--encoder.weights"], CLOSED),
        ("weights.bin", [*NEW, "--encoder.weights"], CLOSED),
        ("weights.safetensors", [*NEW, "--encoder.weights"], NO_CHECKPOINT),
        ("teacher.pth", ["train", "dinov3", *NEW[2:], "--teacher"], CLOSED),
        ("encoder.pth", ["track", "clips"], CLOSED),
    ],
)
def test_a_pickle_is_left_closed_whatever_it_is_given_as(tmp_path, capsys, make, name, words, says):
    ran, file, out = tmp_path / "ran", tmp_path / name, tmp_path / "run"
    make(Malice(ran), file)
    asked = ["track", str(file), "clips"] if words[0] == "track" else [*words, str(file), "--out", str(out)]
    said = sentence(capsys, main(asked))
    assert said.startswith(f"{file} {says}")
    assert not ran.exists()
    assert not out.exists()


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("checkpoint.safetensors", "train"),
        ("checkpoint.safetensors", "start"),
        ("encoder.safetensors", "evaluate"),
        ("encoder.safetensors", "show"),
        ("encoder.safetensors", "track"),
        ("checkpoint.safetensors", "export"),
    ],
)
def test_a_pickle_in_a_runs_folder_is_left_closed(whole, tmp_path, capsys, make, name, command):
    ran, out = tmp_path / "ran", tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "metrics.json").write_text('{"knn": 1.0}')
    (out / "checkpoint.previous.safetensors").unlink()
    make(Malice(ran), out / name)
    before = contents(out)
    asked = {
        "start": [*NEW, "--start", str(out), "--out", str(tmp_path / "new")],
        "track": ["track", str(out), "clips"],
        "export": ["export", str(out), str(tmp_path / "exported.safetensors")],
    }
    if command == "train":
        code = go(whole.parent / "data", out, "--resume")
    else:
        code = main(asked.get(command, [command, str(out)]))
    assert sentence(capsys, code) == f"{out / name} {NO_CHECKPOINT}"
    assert not ran.exists()
    assert {name: content for name, content in contents(out).items() if name not in ("config.json", "log.jsonl")} == {
        name: content for name, content in before.items() if name not in ("config.json", "log.jsonl")
    }


def test_a_pickle_in_the_place_of_the_last_checkpoint_is_passed_over_for_the_one_before(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    plain(Malice(tmp_path / "ran"), out / "checkpoint.safetensors")
    assert go(whole.parent / "data", out, "--resume") == 0
    assert "going on from the checkpoint before it, of step 11" in capsys.readouterr().out
    assert contents(out)["encoder.safetensors"] == contents(whole)["encoder.safetensors"]
    assert not (tmp_path / "ran").exists()


HEADERS = {
    "a list": "[1, 2]",
    "a number": "7",
    "a string": '"step"',
    "nothing": "null",
    "no JSON": "{",
    "endless": "[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_checkpoint_with_a_header_of_a_strangers_is_refused(tmp_path, header):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(save({"a": torch.zeros(3)}, {"minissl": header}))
    with pytest.raises(InputError) as refused:
        checkpoint.load_tensors(path)
    assert str(refused.value) == f"{path} {NO_CHECKPOINT}"


@pytest.mark.parametrize("length", [0, 7, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_checkpoint_that_says_its_header_is_longer_than_it_is_is_refused(tmp_path, length):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_tensors(path, {"a": torch.zeros(3)}, {"step": 1})
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(InputError, match="is not a whole checkpoint of minissl"):
        checkpoint.load_tensors(path)


def test_a_checkpoint_whose_numbers_were_exchanged_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_tensors(path, {"a": torch.zeros(3)}, {"step": 1})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    path.write_bytes(save({"a": load(content)["a"] + 1}, header["__metadata__"]))
    with pytest.raises(InputError) as refused:
        checkpoint.load_tensors(path)
    assert str(refused.value) == f"{path} was damaged after it was written; delete it to start anew."
