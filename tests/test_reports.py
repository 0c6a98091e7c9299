"""The commands after training: evaluate on other data, compare, few-shot and export; CLIP up to zero-shot."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch

from minissl.cli import main
from minissl.data import Images, load_dataset, registry
from minissl.data.synthetic.scenes import Scenes
from minissl.errors import InputError
from minissl.evaluation.benchmark import evaluate_zero_shot, image_embeddings, image_text_similarity
from minissl.hub import export, pretrained
from minissl.methods.registry import create_method
from tests.folders import class_folders, small_memory, write_image
from tests.golden import tiny_vit

COMMON = (
    "--device cpu --image_size 16 --crop_size 16 --encoder.patch_size 8 --batch_size 8 --minutes 0 --epochs 1".split()
)
CLIP = "--embed_dim 8 --text_width 16 --text_layers 1 --text_heads 2 --vocab_size 700".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with a run of CLIP and one of transfer learning, each on a few scenes."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "Scenes", lambda split, size, seed: Scenes(split, size, 120, seed))
        assert main(["train", "clip", *COMMON, *CLIP, "--out", str(folder / "clip")]) == 0
        assert main(["train", "transfer", "--data", "scenes:known", *COMMON, "--out", str(folder / "known")]) == 0
        assert main(["evaluate", str(folder / "known"), "--data", "scenes"]) == 0
        yield folder


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_factor_is_evaluated_and_clip_zero_shot(runs):
    names = set(metrics(runs / "clip"))
    factors = ("object", "color", "action", "place")
    assert {f"linear_{name}" for name in factors} | {f"zero_shot_{name}" for name in factors} <= names
    assert {"knn", "linear", "few_shot_10", "image_to_text", "text_to_image", "rank_me"} <= names
    for name in factors:
        for prefix in ("zero_shot", "zero_shot_sum"):
            assert 0 <= metrics(runs / "clip")[f"{prefix}_{name}"] <= 1
    assert "zero_shot_object" not in metrics(runs / "known")


@pytest.mark.slow
def test_compare_writes_a_figure_and_its_numbers(runs, capsys):
    assert main(["compare", str(runs / "known"), str(runs / "clip"), "--out", str(runs / "both.png")]) == 0
    rows = json.loads((runs / "both.json").read_text(encoding="utf-8"))
    assert list(rows) == ["random init", "known", "clip"]
    assert rows["clip"]["place"] == metrics(runs / "clip")["linear_place"]
    assert rows["random init"]["color"] == metrics(runs / "known")["random_linear_color"]
    assert (runs / "both.png").stat().st_size > 5000
    assert "random init" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_evaluated_on_different_data_are_refused(runs, capsys):
    assert main(["evaluate", str(runs / "known"), "--data", "scenes:known"]) == 0
    assert main(["compare", str(runs / "known"), str(runs / "clip")]) == 2
    assert "--data" in capsys.readouterr().err
    assert main(["evaluate", str(runs / "known"), "--data", "scenes"]) == 0


@pytest.mark.slow
def test_runs_of_one_name_are_compared_by_their_paths(runs):
    again = shutil.copytree(runs / "known", runs / "again" / "known")
    assert main(["compare", str(runs / "known"), str(again), "--out", str(runs / "two.svg")]) == 0
    rows = json.loads((runs / "two.json").read_text(encoding="utf-8"))
    assert list(rows) == ["random init", str(runs / "known"), str(again)]
    assert b"<svg" in (runs / "two.svg").read_bytes()


@pytest.mark.slow
def test_compare_refuses_other_folders_and_figures_that_cannot_be_written(runs, tmp_path, capsys):
    assert main(["compare", str(runs)]) == 2
    assert "minissl evaluate" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text(json.dumps({"data": "folder:x", "rank_me": 2.0, "random_rank_me": 1.0}))
    assert main(["compare", str(tmp_path)]) == 2
    assert "without labels" in capsys.readouterr().err
    assert main(["compare", str(runs / "known"), "--out", str(tmp_path / "figure.foo")]) == 2
    assert ".png" in capsys.readouterr().err
    (tmp_path / "file").write_text("occupied")
    assert main(["compare", str(runs / "known"), "--out", str(tmp_path / "file" / "figure.png")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.slow
def test_few_shot_needs_labels_and_gives_the_same_for_streamed_images(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minissl.reports.few_shot.LABELS_PER_CLASS", (1,))
    for i in range(20):
        write_image(tmp_path / "flat" / f"{i}.png", seed=i)
    assert main(["few-shot", str(runs / "known"), "--data", f"folder:{tmp_path / 'flat'}"]) == 2
    assert "no labels; choose another --data" in capsys.readouterr().err
    data = class_folders(tmp_path / "data", train=6, test=2)
    tables = []
    for memory in (nullcontext(), small_memory()):
        with memory:
            assert main(["few-shot", str(runs / "known"), "--data", f"folder:{data}", "--seeds", "1"]) == 0
        tables.append((runs / "known" / "few_shot.json").read_text(encoding="utf-8"))
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_few_shot_on_another_task(runs, monkeypatch):
    monkeypatch.setattr("minissl.reports.few_shot.LABELS_PER_CLASS", (1, 2))
    assert main(["few-shot", str(runs / "known"), "--data", "scenes:new", "--seeds", "2"]) == 0
    table = json.loads((runs / "known" / "few_shot.json").read_text(encoding="utf-8"))
    assert table["labels_per_class"] == [1, 2]
    for name in ("frozen", "fine-tuned", "from scratch"):
        assert torch.tensor(table[name]).shape == (2, 2)
    assert (runs / "known" / "few_shot.png").exists()
    # Two runs with one seed each sample the same labels as one run with two.
    assert main(["few-shot", str(runs / "known"), str(runs / "known"), "--data", "scenes:new", "--seeds", "1"]) == 0
    assert json.loads((runs / "known" / "few_shot.json").read_text(encoding="utf-8")) == table


def test_retrieval_needs_captions_only():
    """Flickr8k and COCO have captions and no labels."""
    torch.manual_seed(0)
    scenes = load_dataset("scenes", "test", 16).subsample(100)
    method = create_method(
        "clip", tiny_vit(), crop_size=16, embed_dim=8, text_width=16, text_layers=1, text_heads=2, vocab_size=700
    )
    method.prepare(scenes)
    captions_only = evaluate_zero_shot(method, Images(scenes.images, captions=scenes.captions), 16)
    assert sorted(captions_only) == ["image_to_text", "text_to_image"]
    assert captions_only.items() <= evaluate_zero_shot(method, scenes, 16).items()


@pytest.mark.slow
def test_export_writes_the_whole_method(runs):
    file = runs / "own" / "clip.safetensors"
    assert main(["export", str(runs / "clip"), str(file)]) == 0
    card = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["run"]["method"] == "clip"
    assert card["metrics"]["knn"] == metrics(runs / "clip")["knn"]
    method, images = pretrained.load_method(file), load_dataset("scenes", "test", 16).images
    assert len(method.tokenizer.pairs) > 20
    similarity = image_text_similarity(method, images[:4], ["a red fish", "the sea"], 16)
    assert len(similarity.unique(dim=0)) == 4
    exported, trained = pretrained.load_encoder(file), pretrained.load_encoder(runs / "clip")
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(exported(pixels).cls, trained(pixels).cls, rtol=0.02, atol=0.02)  # half precision
    assert image_embeddings(method, images, 16).shape == (len(images), 8)
    assert not any(module.training for module in method.modules())


@pytest.mark.slow
def test_files_of_a_run_are_not_overwritten(runs, capsys):
    before = {path.name: path.read_bytes() for path in (runs / "clip").iterdir()}
    for args, message in (
        (["export", runs / "clip", runs / "clip" / "encoder.safetensors"], "holds a run"),
        (["export", runs / "clip", runs / "clip" / "config.safetensors"], "holds a run"),
        (["export", runs / "clip", runs / "mine.json"], ".safetensors"),
        (["export", runs / "clip", runs / "mine"], ".safetensors"),
        (["track", "pixels", "clips", "--out", runs / "clip"], "holds a run"),
    ):
        assert main([str(arg) for arg in args]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="holds a run"):
        export.export_encoder(tiny_vit(), runs / "clip", "huggingface")
    assert {path.name: path.read_bytes() for path in (runs / "clip").iterdir()} == before


@pytest.mark.slow
def test_an_encoder_file_is_not_a_method_and_unknown_names_are_refused(runs):
    with pytest.raises(InputError, match="clip"):
        pretrained.load_method(runs / "clip")
    with pytest.raises(InputError, match="scenes/unknown"):
        pretrained.load_encoder("scenes/unknown")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "clip", "--data", "digits"], "captions"),
        (["train", "transfer", "--data", "digits", "--num_classes", "4"], "--num_classes 10"),
        (["train", "transfer", "--data", "digits", "--targets", '["color"]'], "'color'"),
        (["train", "transfer", "--data", "digits", "--encoder.weights", "/nowhere"], "/nowhere"),
    ],
)
def test_data_and_options_are_checked_before_any_work(capsys, tmp_path, args, message):
    assert main([*args, "--minutes", "0", "--epochs", "1", "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
