"""The table of all methods: what it says, and that a cell is a run like any other."""

import json
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest

from minissl import pretrained
from minissl.method import available
from minissl.runs import read
from tests.benchmarks import scoreboard, speed

ROOT = Path(__file__).parent.parent


def test_every_method_that_learns_from_pictures_or_sentences_has_a_row():
    told = {words.split()[0] for words in scoreboard.ROWS.values()}
    assert told == set(available()) - {"dinotxt"}  # which trains no encoder


@pytest.mark.parametrize("row", scoreboard.ROWS)
def test_every_row_has_the_same_encoder_but_for_what_its_paper_changes(row):
    run = scoreboard.asked_of(row, 3, "scenes", "cpu")
    first = scoreboard.asked_of("random", 0, "scenes", "cpu")
    for name in ("name", "patch_size", "stem", "img_size", "depth", "init_std"):
        assert run.encoder[name] == first.encoder[name], name
    assert (first.encoder["name"], first.encoder["img_size"]) == ("nano", 32)
    assert run.loop["seed"] == 3
    large = scoreboard.asked_of(row, 0, "folder:x", "gpu")
    assert (large.encoder["name"], large.encoder["patch_size"], large.data) == ("small", 16, "folder:x")


def test_the_table_has_means_deviations_and_dashes():
    rows = {"a": {"0": {"knn": 0.5, "memory": 1.0}, "1": {"knn": 0.7, "memory": 1.5}}, "b": {"0": {"knn": 0.25}}}
    lines = scoreboard.table(rows, {"knn": "k-NN", "memory": "GB", "absent": "-"}).splitlines()
    assert lines == ["| | k-NN | GB |", "|---|---|---|", "| a | 60.0 ± 14.1 | 1.25 ± 0.35 |", "| b | 25.0 | - |"]
    beside = scoreboard.table(rows, {"knn": "k-NN"}, {"b": "90 elsewhere"}).splitlines()
    assert beside == [
        "| | k-NN | published, full budget |",
        "|---|---|---|",
        "| a | 60.0 ± 14.1 | - |",
        "| b | 25.0 | 90 elsewhere |",
    ]


def test_cells_are_gathered_by_row_and_seed_with_their_loss(tmp_path):
    for name, found in {"DINO_0": 0.5, "DINO_11": 0.25, "CLIP_0": 0.75}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"knn": found}))
    log = [json.dumps({"step": step, "loss": 5 - step / 100}) for step in range(100)] + ['{"step": 99, "knn": 0.5}']
    (tmp_path / "DINO_11" / "log.jsonl").write_text("\n".join(log))
    (tmp_path / "DINO_2").mkdir()  # still training
    rows = scoreboard.gather(tmp_path)
    assert list(rows) == ["CLIP", "DINO"]  # in the table's order
    assert rows["DINO"]["0"] == {"knn": 0.5}
    assert rows["DINO"]["11"]["knn"] == 0.25
    assert rows["DINO"]["11"]["loss"][:2] == [[0, 5.0], [5, 4.95]]


def test_a_cell_is_a_run_that_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    run = scoreboard.asked_of("DINO", 0, "digits", "cpu")
    data, whole = run.images("train"), run.build()
    monkeypatch.setattr(scoreboard, "seconds_a_step", lambda *_: 0.1)
    cost = scoreboard.learn(run, whole, data, tmp_path / "whole", minutes=0.0101)
    assert (cost["steps"], cost["images_per_second"]) == (6, run.loop["batch_size"] / 0.1)
    assert read(tmp_path / "whole")[0].options["prototypes"] == run.options["prototypes"]
    assert scoreboard.learn(run, run.build(), data, tmp_path / "like", minutes=5, steps=2)["steps"] == 2
    first = run.build()
    monkeypatch.setattr(first, "after_step", stopping(first, 3))
    with pytest.raises(KeyboardInterrupt):
        scoreboard.learn(run, first, data, tmp_path / "stopped", minutes=0.0101)
    monkeypatch.setattr(scoreboard, "seconds_a_step", lambda *_: 0.001)  # is not measured again
    scoreboard.learn(run, run.build(), data, tmp_path / "stopped", minutes=0.0101)
    one, other = (pretrained.load(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_row_that_is_trained_again_is_told_apart_by_the_deviations_of_the_first_time():
    before = {"DINO": {"0": {"knn": 0.5, "J&F": 0.2}, "1": {"knn": 0.7, "J&F": 0.2}}}
    again = {"DINO": {"0": {"knn": 0.7, "J&F": 0.3}}, "CLIP": {"0": {"knn": 0.7}}}
    said = scoreboard.repeated(again, before, scoreboard.IMAGE | scoreboard.PATCHES)
    assert said.startswith("DINO: 1 of 2 numbers within one deviation, 1 within two; J&F is ")
    assert "CLIP" not in said
    same = scoreboard.repeated(before, before, scoreboard.IMAGE | scoreboard.PATCHES)
    assert same == "DINO: 2 of 2 numbers within one deviation, 2 within two; knn is 0.0 off"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rows DINO CLIP --seeds 0 7", "lacks DINO from seed 7, CLIP from seed 0, CLIP from seed 7; change"),
        ("--rows DINO --seeds 0", "was made with other options (scenes, 5.0 minutes, --like None); choose --out"),
    ],
)
def test_a_row_that_cannot_be_like_another_is_refused_before_any_work(tmp_path, monkeypatch, capsys, words, said):
    like = tmp_path / "like.json"
    like.write_text(json.dumps({"rows": {"DINO": {"0": {"steps": 2}}}}))
    about = {"minutes": 5.0, "data": "scenes", "preset": "cpu", "threads": 1, "like": None, "rows": {}}
    (tmp_path / "scoreboard.json").write_text(json.dumps(about))
    before = sorted(tmp_path.iterdir())
    command = ["scoreboard", *words.split(), "--like", str(like), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as refused:
        scoreboard.main()
    assert refused.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.iterdir()) == before


def stopping(method, at):
    """What `after_step` does, and Ctrl-C at one step."""
    count, before = iter(range(1, 100)), method.after_step

    def after_step(progress):
        before(progress)
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGINT)

    return after_step


def test_the_readme_has_the_numbers_of_the_logs():
    board = json.loads((ROOT / "data/recorded/scoreboard.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(board["rows"]) == set(scoreboard.ROWS)
    for columns in (scoreboard.IMAGE, scoreboard.PATCHES):
        assert scoreboard.table(board["rows"], columns) in readme


def test_the_readme_has_the_photographs_numbers_beside_what_others_published():
    board = json.loads((ROOT / "data/recorded/scoreboard_cifar10.json").read_text(encoding="utf-8"))
    assert {"random", "supervised", "SimCLR", "DINO", "DINOv2"} <= set(board["rows"])
    said = scoreboard.table(board["rows"], scoreboard.IMAGE, scoreboard.PUBLISHED)
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_dino_beside_lightlys_from_every_seed():
    found = json.loads((ROOT / "data/recorded/cifar10_dino.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    knn = {name: [100 * one["knn"] for one in found[name].values()] for name in ("minissl", "lightly")}
    for values in knn.values():
        seeds = ", ".join(f"{value:.1f}" for value in values)
        assert f"k-NN {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({seeds})" in readme
    assert min(knn["minissl"]) > max(knn["lightly"])


def test_the_readme_has_the_numbers_of_the_bench():
    found = json.loads((ROOT / "data/recorded/speed.json").read_text(encoding="utf-8"))
    assert speed.table(found["contests"]) in (ROOT / "README.md").read_text(encoding="utf-8")
