"""The commands after a training: measure elsewhere, compare, few labels, export; CLIP from a command to its words."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch

from minissl import formats, pretrained
from minissl.__main__ import main
from minissl.data import Images, load, sources
from minissl.data.scenes import Scenes
from minissl.errors import InputError
from minissl.method import find
from minissl.scores import agreement, score_text, shared_vectors
from tests.folders import class_folders, picture
from tests.golden import tiny_vit
from tests.test_stream import small_memory

SMALL = (
    "--device cpu --image_size 16 --size 16 --encoder.patch_size 8 --batch_size 8 --minutes 0 --epochs 1 --embedding 8 "
    "--text_width 16 --text_depth 1 --text_heads 2 --vocabulary 700"
).split()
COMMON = SMALL[: SMALL.index("--embedding")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of CLIP and one of transfer on a few scenes, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "Scenes", lambda split, size, seed: Scenes(split, size, 120, seed))
        assert main(["train", "clip", *SMALL, "--out", str(folder / "clip")]) == 0
        assert main(["train", "transfer", "--data", "scenes:known", *COMMON, "--out", str(folder / "known")]) == 0
        assert main(["evaluate", str(folder / "known"), "--data", "scenes"]) == 0
        yield folder


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_a_run_measures_every_factor_and_what_words_can_do(runs):
    found = metrics(runs / "clip")
    factors = ("object", "color", "action", "place")
    assert {f"linear_{name}" for name in factors} | {f"zero_shot_{name}" for name in factors} <= set(found)
    assert {"knn", "linear", "few_10", "image_to_text", "text_to_image", "rank_me"} <= set(found)
    assert all(0 <= found[f"zero_shot{way}_{name}"] <= 1 for name in factors for way in ("", "_sum"))
    assert "zero_shot_object" not in metrics(runs / "known")


def test_runs_side_by_side(runs, capsys):
    assert main(["compare", str(runs / "known"), str(runs / "clip"), "--out", str(runs / "both.png")]) == 0
    rows = json.loads((runs / "both.json").read_text(encoding="utf-8"))
    assert list(rows) == ["untrained", "known", "clip"]
    assert rows["clip"]["place"] == metrics(runs / "clip")["linear_place"]
    assert rows["untrained"]["color"] == metrics(runs / "known")["random_linear_color"]
    assert (runs / "both.png").stat().st_size > 5000
    assert "untrained" in capsys.readouterr().out


def test_runs_on_different_data_are_not_compared(runs, capsys):
    assert main(["evaluate", str(runs / "known"), "--data", "scenes:known"]) == 0
    assert main(["compare", str(runs / "known"), str(runs / "clip")]) == 2
    assert "evaluate them with one --data" in capsys.readouterr().err
    assert main(["evaluate", str(runs / "known"), "--data", "scenes"]) == 0
    assert main(["compare", str(runs)]) == 2
    assert "python -m minissl evaluate" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(runs, capsys):
    again = shutil.copytree(runs / "known", runs / "again" / "known")
    assert main(["compare", str(runs / "known"), str(again), "--out", str(runs / "two.svg")]) == 0
    rows = json.loads((runs / "two.json").read_text(encoding="utf-8"))
    assert list(rows) == ["untrained", str(runs / "known"), str(again)]
    assert b"<svg" in (runs / "two.svg").read_bytes()


def test_what_cannot_be_compared_is_said(runs, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps({"data": "folder:x", "rank_me": 2.0, "random_rank_me": 1.0}))
    assert main(["compare", str(tmp_path)]) == 2
    assert "was measured on images without labels" in capsys.readouterr().err
    assert main(["compare", str(runs / "known"), "--out", str(tmp_path / "picture.foo")]) == 2
    assert "end it in .png, .svg or .pdf" in capsys.readouterr().err
    (tmp_path / "file").write_text("here first")
    assert main(["compare", str(runs / "known"), "--out", str(tmp_path / "file" / "picture.png")]) == 2
    assert "cannot be made (File exists)" in capsys.readouterr().err


@pytest.mark.slow
def test_few_labels_need_labels_and_may_be_more_than_the_memory_holds(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minissl.reports.COUNTS", (1,))
    for i in range(20):
        picture(tmp_path / "flat" / f"{i}.png", seed=i)
    assert main(["few", str(runs / "known"), "--data", f"folder:{tmp_path / 'flat'}"]) == 2
    assert "has no labels; choose another --data." in capsys.readouterr().err
    data = class_folders(tmp_path / "data", train=6, test=2)
    tables = []
    for memory in (nullcontext(), small_memory()):
        with memory:
            assert main(["few", str(runs / "known"), "--data", f"folder:{data}", "--seeds", "1"]) == 0
        tables.append((runs / "known" / "few_labels.json").read_text(encoding="utf-8"))
    assert tables[0] == tables[1]


def test_captions_alone_are_measured():
    """Flickr8k and COCO have sentences and no labels."""
    torch.manual_seed(0)
    scenes = load("scenes", "test", 16).some(100)
    method = find("clip")(tiny_vit(), size=16, embedding=8, text_width=16, text_depth=1, text_heads=2, vocabulary=700)
    method.prepare(scenes)
    found = score_text(method, Images(scenes.images, captions=scenes.captions), 16)
    assert sorted(found) == ["image_to_text", "text_to_image"]
    assert found == {name: value for name, value in score_text(method, scenes, 16).items() if name in found}


@pytest.mark.slow
def test_few_labels_of_another_task(runs, monkeypatch, capsys):
    monkeypatch.setattr("minissl.reports.COUNTS", (1, 2))
    assert main(["few", str(runs / "known"), "--data", "scenes:new", "--seeds", "2"]) == 0
    table = json.loads((runs / "known" / "few_labels.json").read_text(encoding="utf-8"))
    assert table["labels"] == [1, 2]
    for name in ("frozen", "fine-tuned", "from nothing"):
        assert torch.tensor(table[name]).shape == (2, 2)
    assert (runs / "known" / "few_labels.png").exists()
    assert main(["few", str(runs / "known"), str(runs / "known"), "--data", "scenes:new", "--seeds", "1"]) == 0
    assert json.loads((runs / "known" / "few_labels.json").read_text(encoding="utf-8")) == table  # the same draws


def test_what_is_exported_is_the_whole_method(runs, capsys):
    file = runs / "own" / "clip.safetensors"
    assert main(["export", str(runs / "clip"), str(file)]) == 0
    card = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["run"]["method"] == "clip"
    assert card["metrics"]["knn"] == metrics(runs / "clip")["knn"]
    method, images = pretrained.load_method(file), load("scenes", "test", 16)
    assert len(method.tokenizer.pairs) > 20
    assert (
        len({tuple(row) for row in agreement(method, images.images[:4], ["a red fish", "the sea"], 16).tolist()}) == 4
    )
    ours, theirs = pretrained.load(file), pretrained.load(runs / "clip")
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(pixels).cls, theirs(pixels).cls, rtol=0.02, atol=0.02)  # half precision
    vectors = shared_vectors(method, images.images, 16)
    assert vectors.shape == (len(images), 8)
    assert not any(module.training for module in method.modules())  # as it was loaded


def test_a_runs_own_files_are_not_written_over(runs, capsys):
    before = {path.name: path.read_bytes() for path in (runs / "clip").iterdir()}
    for words, says in (
        (["export", runs / "clip", runs / "clip" / "encoder.safetensors"], "holds a run"),
        (["export", runs / "clip", runs / "clip" / "config.safetensors"], "holds a run"),
        (["export", runs / "clip", runs / "mine.json"], "end its name in .safetensors"),
        (["export", runs / "clip", runs / "mine"], "end its name in .safetensors"),
        (["track", "pixels", "clips", "--out", runs / "clip"], "holds a run"),
    ):
        assert main([str(word) for word in words]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(InputError, match="holds a run"):
        formats.export(tiny_vit(), runs / "clip", "huggingface")
    assert {path.name: path.read_bytes() for path in (runs / "clip").iterdir()} == before


def test_an_encoder_is_no_method_and_a_stranger_has_no_name(runs, capsys):
    with pytest.raises(ValueError, match="holds no method"):
        pretrained.load_method(runs / "clip")
    with pytest.raises(ValueError, match="There is no checkpoint scenes/nobody"):
        pretrained.load("scenes/nobody")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "clip", "--data", "digits"], "clip needs captions, and digits has none"),
        (["train", "transfer", "--data", "digits", "--classes", "4"], "10 classes and 4 outputs; give --classes 10"),
        (["train", "transfer", "--data", "digits", "--targets", '["color"]'], "no factor 'color'"),
        (["train", "transfer", "--data", "digits", "--encoder.weights", "/nowhere"], "no checkpoint /nowhere"),
    ],
)
def test_what_a_method_needs_is_said_before_any_work(capsys, tmp_path, words, says):
    assert main([*words, "--minutes", "0", "--epochs", "1", "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
