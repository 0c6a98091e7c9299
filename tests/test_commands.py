"""The command line: bad input gives one sentence and exit code 2 before any work; good input leaves a complete run."""

import json
import re
import subprocess
import sys

import pytest
import torch

from minissl import __version__
from minissl.cli import main, parse_run
from minissl.training.checkpoint import load_tensors
from tests.folders import TINY, class_folders, flat_folder, write_image

RUN_FILES = {"config.json", "log.jsonl", "checkpoint.safetensors", "encoder.safetensors", "metrics.json",
             "attention.png", "pca.png", "curves.png", "collapse.png"}  # fmt: skip
USER_METHOD = '''
"""A method in a user's own file."""
import torch
from minissl import Method
from minissl.data.transforms.functional import normalize, random_resized_crop

class MeanColor(Method):
    """Predict an image's mean color."""
    presets = {"cpu": {"encoder.name": "nano", "encoder.patch_size": 8}, "gpu": {}}
    feature_pooling = "both"

    def __init__(self, encoder, *, crop_size: int = 16):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.embed_dim, 3)
        self.crop_size = crop_size

    def loss(self, batch, progress):
        crops = random_resized_crop(batch.images, self.crop_size, (0.5, 1.0))
        colors = self.head(self.encoder.cls_tokens(normalize(crops)))
        return {"loss": (colors - crops.mean(dim=(2, 3))).square().mean()}
'''


@pytest.fixture
def labeled(tmp_path):
    """train/ and test/, two classes."""
    return class_folders(tmp_path / "data", train=6, test=3)


def refused(capsys, words, out=None):
    """Run a command that must be refused; return its one sentence."""
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    (sentence,) = re.findall(r"(?:^|[\r\n]) *(minissl: [^\r\n]*)", printed)
    assert "Traceback" not in printed
    assert out is None or not out.exists()
    return sentence


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["learn"], "learn"),
        (["trian"], "'train'"),
        (["few_shots", "runs/a"], "'few-shot'"),
        (["train"], "dino"),
        (["train", "byool"], "byool"),
        (["train", "dinno"], "'dino'"),
        (["train", "./nowhere.py"], "nowhere.py"),
        (["train", "dino", "--data", "imagenot"], "imagenot"),
        (["train", "dino", "--data", "scene"], "'scenes'"),
        (["train", "dino", "--device", "tpu"], "tpu"),
        (["train", "dino", "--device", "cpu:x"], "cpu:x"),
        (["train", "dino", "--preset", "huge"], "huge"),
        (["train", "dino", "--prototipes", "3"], "--prototipes"),
        (["train", "dino", "--num_prototype", "3"], "'--num_prototypes'"),
        (["train", "dino", "--minute", "1"], "--minute"),
        (["train", "dino", "--batch_size", "many"], "batch_size"),
        (["train", "dino", "--data", "folder:/nowhere/at/all"], "/nowhere/at/all"),
        (["train", "dino", "--data=folder:/no-where/at-all"], "/no-where/at-all"),
        (["train", "dino", "--batch_size", "0"], "--batch_size"),
        (["train", "dino", "--grad_accum_steps", "0"], "--grad_accum_steps"),
        (["train", "dino", "--schedule_fraction", "0"], "--schedule_fraction"),
        (["train", "dino", "--seed=-1"], "--seed"),
        (["train", "dino", "--lr=-1e-3"], "--lr"),
        (["train", "dino", "--encoder.patch_size", "7"], "patches of 7"),
        (["train", "dino", "--encoder.name", "enormous"], "enormous"),
        (["train", "simclr", "--data", "digits", "--grad_accum_steps", "2"], "--grad_accum_steps"),
        (["evaluate", "/nowhere"], "/nowhere"),
        (["visualize", "/nowhere"], "/nowhere"),
        (["recommend", "folder:/nowhere", "--minutes=-1"], "--minutes"),
    ],
)
def test_bad_input_gets_a_sentence_that_names_it(capsys, tmp_path, words, named):
    out = ["--out", tmp_path / "run"] if words[0] == "train" and len(words) > 1 else []
    assert named in refused(capsys, [*words, *out], tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(capsys, tmp_path):
    words = ["train", "dino", "--device", "cuda", "--out", tmp_path / "run"]
    assert "--device" in refused(capsys, words, tmp_path / "run")


def test_folders_without_images_are_refused(capsys, tmp_path):
    for name, files in (("empty", 0), ("texts", 3)):
        (tmp_path / name).mkdir()
        for i in range(files):
            (tmp_path / name / f"{i}.txt").write_text("not an image")
        words = ["train", "dino", *TINY, "--data", f"folder:{tmp_path / name}", "--out", tmp_path / "run"]
        assert name in refused(capsys, words, tmp_path / "run")


def test_an_image_smaller_than_a_crop_is_named(capsys, labeled, tmp_path):
    write_image(labeled / "train" / "cat" / "small.png", size=(12, 40))
    words = ["train", "dino", *TINY, "--data", f"folder:{labeled}", "--out", tmp_path / "run"]
    assert "small.png" in refused(capsys, words, tmp_path / "run")


def test_a_batch_larger_than_the_data_is_refused(capsys, labeled, tmp_path):
    words = ["train", "dino", *TINY, "--batch_size", "64", "--data", f"folder:{labeled}", "--out", tmp_path / "run"]
    assert "--batch_size 64" in refused(capsys, words, tmp_path / "run")


def test_a_file_in_the_place_of_the_run_stays(capsys, tmp_path):
    (tmp_path / "run").write_text("content")
    assert "--out" in refused(capsys, ["train", "dino", *TINY, "--data", "digits", "--out", tmp_path / "run"])
    assert (tmp_path / "run").read_text() == "content"


@pytest.mark.slow
def test_a_run_on_class_folders(capsys, labeled, tmp_path):
    """Train, resume, evaluate and visualize; unreadable files are counted."""
    (labeled / "train" / "cat" / "broken.jpg").write_bytes((labeled / "train" / "cat" / "000.png").read_bytes()[:60])
    (labeled / "train" / "cat" / "notes.txt").write_text("not an image")
    out, data = tmp_path / "run", ["--data", f"folder:{labeled}"]
    words = ["train", "dino", *TINY, *data, "--out", str(out)]
    assert main(words) == 0
    assert "2 of 14 files" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} - {".lock"} == RUN_FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"knn", "linear", "rank_me", "random_knn", "random_linear", "train_images"} <= set(metrics)
    assert metrics["test_images"] == 6

    before = load_tensors(out / "checkpoint.safetensors")[0]
    assert "--resume" in refused(capsys, words)
    assert "lr" in refused(capsys, [*words, "--resume", "--lr", "0.5"])
    digits = ["digits" if word.startswith("folder:") else word for word in words]
    assert "data" in refused(capsys, [*digits, "--resume"])
    assert main([*words, "--resume"]) == 0
    after = load_tensors(out / "checkpoint.safetensors")[0]
    assert all(torch.equal(before[name], after[name]) for name in before)

    (out / "metrics.json").unlink()
    (out / "pca.png").unlink()
    assert main(["evaluate", str(out)]) == 0
    assert main(["visualize", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (out / "pca.png").exists()
    (out / "checkpoint.safetensors").write_bytes(b"cut")
    assert "checkpoint.safetensors" in refused(capsys, [*words, "--resume"])


def test_a_run_on_images_without_labels(tmp_path):
    folder, out = flat_folder(tmp_path / "data", 20), tmp_path / "run"
    assert main(["train", "dino", *TINY, "--data", f"folder:{folder}", "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["train_images"], metrics["test_images"]) == (18, 2)
    assert "knn" not in metrics
    assert metrics["rank_me"] >= 1


@pytest.mark.slow
def test_a_method_in_a_users_own_file(capsys, labeled, tmp_path, monkeypatch):
    """It trains, resumes from another directory and is evaluated; a file without a method is refused."""
    (tmp_path / "mine.py").write_text(USER_METHOD)
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    options = ["--crop_size", "16", "--image_size", "16", "--batch_size", "4", "--minutes", "0", "--epochs", "1"]
    words = [*options, "--data", f"folder:{labeled}", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert "none.py" in refused(capsys, ["train", "./none.py", *words])
    assert "no_such_module" in refused(capsys, ["train", "./broken.py", *words])
    assert main(["train", "./mine.py", *words]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "../mine.py", *words, "--resume"]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == RUN_FILES


def test_an_option_may_have_hyphens_and_its_value_keeps_them():
    run, options = parse_run(["dino", "--out=runs/my-run", "--batch-size=32", "--lr=5e-4", "--encoder.patch-size", "4"])
    assert str(options["out"]) == "runs/my-run"
    assert (run.train["batch_size"], run.train["lr"], run.encoder["patch_size"]) == (32, 5e-4, 4)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "dino", "--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    for option in ("--num_prototypes", "--lr", "--encoder.name", "--resume", "--minutes", "--teacher_temp"):
        assert option in listed


def test_version_from_any_folder(tmp_path):
    """The installed package is found, also where a folder of its name lies beside."""
    (tmp_path / "minissl").mkdir()
    command = [sys.executable, "-m", "minissl", "--version"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed == f"minissl {__version__}\n"
