"""What a person types: bad input is one sentence and exit code 2 before any work; good input leaves a whole run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minissl.__main__ import main, parse_run
from minissl.checkpoint import load_tensors
from minissl.method import find

TINY = (
    "--image_size 16 --size 16 --local_size 8 --encoder.patch_size 8 --prototypes 32 --hidden 16 --bottleneck 8 "
    "--batch_size 4 --minutes 0 --epochs 1"
).split()


def picture(path: Path, size=(20, 24), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def labelled(tmp_path):
    """train/ and test/, two classes."""
    for split, n in (("train", 6), ("test", 3)):
        for kind in ("cat", "dog"):
            for i in range(n):
                picture(tmp_path / "data" / split / kind / f"{i}.png", seed=i)
    return tmp_path / "data"


def refused(capsys, words, out=None):
    """Run a command that must be refused; returns its one sentence."""
    assert main([str(w) for w in words]) == 2
    said = capsys.readouterr().err
    (sentence,) = re.findall(r"(?:^|[\r\n]) *(minissl: [^\r\n]*)", said)
    assert "Traceback" not in said
    assert out is None or not out.exists()
    return sentence


def test_a_batch_that_has_to_stay_whole_is_said_before_any_work(capsys, tmp_path):
    words = ["train", "simclr", "--data", "digits", "--device", "cpu", "--accumulate", "2", "--out", tmp_path / "run"]
    assert "compares the images of a batch with each other" in refused(capsys, words, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["learn"], "no command 'learn'"),
        (["train"], "Say which method"),
        (["train", "byool"], "no method 'byool'; choose one of"),
        (["train", "dino", "--data", "imagenot"], "no data set 'imagenot'; choose"),
        (["train", "dino", "--device", "tpu"], "no device 'tpu'; choose"),
        (["train", "dino", "--device", "cpu:x"], "no device 'cpu:x'; choose"),
        (["train", "dino", "--preset", "huge"], "no preset 'huge'; choose"),
        (["train", "dino", "--prototipes", "3"], "--prototipes"),
        (["train", "dino", "--batch_size", "many"], "batch_size"),
        (["train", "dino", "--data", "folder:/nowhere/at/all"], "no folder"),
        (["train", "dino", "--data=folder:/no-where/at-all"], "/no-where/at-all"),
        (["train", "dino", "--batch_size", "0"], "--batch_size is 0; give a number above 0."),
        (["train", "dino", "--accumulate", "0"], "--accumulate is 0; give a number above 0."),
        (["train", "dino", "--cool", "0"], "--cool is 0.0; give a number above 0."),
        (["train", "dino", "--seed=-1"], "--seed is -1; give a number that is not negative."),
        (["train", "dino", "--lr=-1e-3"], "--lr is -0.001; give a number that is not negative."),
        (["train", "dino", "--encoder.patch_size", "7"], "do not divide into patches of 7"),
        (["train", "dino", "--encoder.name", "enormous"], "enormous"),
        (["evaluate", "/nowhere"], "holds no run"),
        (["show", "/nowhere"], "holds no run"),
    ],
)
def test_what_is_wrong_is_said(capsys, tmp_path, words, says):
    out = ["--out", tmp_path / "run"] if words[0] == "train" and len(words) > 1 else []
    assert says in refused(capsys, [*words, *out], tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys, tmp_path):
    words = ["train", "dino", "--device", "cuda", "--out", tmp_path / "run"]
    assert "no cuda device" in refused(capsys, words, tmp_path / "run")


def test_an_empty_folder_is_said(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ["train", "dino", *TINY, "--data", f"folder:{tmp_path / 'empty'}", "--out", tmp_path / "run"]
    assert "is empty" in refused(capsys, words, tmp_path / "run")


def test_a_folder_without_any_image_is_said(capsys, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("no picture")
    words = ["train", "dino", *TINY, "--data", f"folder:{tmp_path / 'texts'}", "--out", tmp_path / "run"]
    assert "None of the" in refused(capsys, words, tmp_path / "run")


def test_an_image_smaller_than_a_crop_is_named(capsys, labelled, tmp_path):
    picture(labelled / "train" / "cat" / "small.png", size=(12, 40))
    words = ["train", "dino", *TINY, "--data", f"folder:{labelled}", "--out", tmp_path / "run"]
    sentence = refused(capsys, words, tmp_path / "run")
    assert "small.png is 12 pixels" in sentence
    assert "crop of 16" in sentence


def test_a_batch_larger_than_the_data_is_said(capsys, labelled, tmp_path):
    words = ["train", "dino", *TINY, "--batch_size", "64", "--data", f"folder:{labelled}", "--out", tmp_path / "run"]
    assert "64 is larger than the data (12 images)" in refused(capsys, words, tmp_path / "run")


def test_a_file_in_the_place_of_the_run_is_said(capsys, tmp_path):
    (tmp_path / "run").write_text("here first")
    assert "is a file" in refused(capsys, ["train", "dino", *TINY, "--data", "digits", "--out", tmp_path / "run"])
    assert (tmp_path / "run").read_text() == "here first"


def test_a_run_from_a_folder_of_classes(capsys, labelled, tmp_path):
    """From images to pictures; broken files are counted; then every way to come back to the run."""
    (labelled / "train" / "cat" / "broken.jpg").write_bytes((labelled / "train" / "cat" / "0.png").read_bytes()[:60])
    (labelled / "train" / "cat" / "notes.txt").write_text("not an image")
    out, data = tmp_path / "run", ["--data", f"folder:{labelled}"]
    words = ["train", "dino", *TINY, *data, "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("Training dino on the cpu")
    assert "2 of 14 files" in said
    assert "3 steps in about" in said
    files = {path.name for path in out.iterdir()} - {".lock"}
    assert files == {"config.json", "log.jsonl", "checkpoint.safetensors", "encoder.safetensors", "metrics.json",
                     "attention.png", "pca.png", "curves.png", "collapse.png"}  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"knn", "linear", "rank_me", "random_knn", "random_linear", "train_images"} <= set(metrics)
    assert metrics["test_images"] == 6

    before = load_tensors(out / "checkpoint.safetensors")[0]
    assert "already holds a run of dino" in refused(capsys, words)
    assert f"a run with lr {find('dino').presets['cpu']['lr']}, not 0.5" in refused(
        capsys, [*words, "--resume", "--lr", "0.5"]
    )
    digits = ["digits" if word.startswith("folder:") else word for word in words]
    assert "a run with data folder:" in refused(capsys, [*digits, "--resume"])
    assert main([*words, "--resume"]) == 0
    after = load_tensors(out / "checkpoint.safetensors")[0]
    assert all(torch.equal(before[name], after[name]) for name in before)

    (out / "metrics.json").unlink()
    (out / "pca.png").unlink()
    assert main(["evaluate", str(out)]) == 0
    assert main(["show", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (out / "pca.png").exists()
    (out / "checkpoint.safetensors").write_bytes(b"cut")
    assert "not a whole checkpoint" in refused(capsys, [*words, "--resume"])


def test_a_run_from_unlabelled_images(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "data" / f"{i:02}.png", seed=i)
    out = tmp_path / "run"
    assert main(["train", "dino", *TINY, "--data", f"folder:{tmp_path / 'data'}", "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["train_images"] == 18
    assert metrics["test_images"] == 2
    assert "knn" not in metrics
    assert metrics["rank_me"] >= 1


def test_an_option_is_written_out(capsys):
    """What begins like one is told to be none, and not taken for it with a library's warning."""
    said = refused(capsys, ["train", "dino", "--minute", "1"])
    assert said.rstrip().endswith("--minute 1. --help lists the options.")


def test_an_option_may_have_hyphens_and_its_value_keeps_them():
    run, asked = parse_run(["dino", "--out=runs/my-run", "--batch-size=32", "--lr=5e-4", "--encoder.patch-size", "4"])
    assert str(asked["out"]) == "runs/my-run"
    assert (run.loop["batch_size"], run.loop["lr"], run.encoder["patch_size"]) == (32, 5e-4, 4)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "dino", "--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    for option in ("--prototypes", "--lr", "--encoder.name", "--resume", "--minutes", "--teacher_temperature"):
        assert option in listed
