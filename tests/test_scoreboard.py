"""The scoreboard: its rows, tables, cells, resumption, and the recorded boards that the documentation shows."""

import json
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest

from minissl.hub.pretrained import load_encoder
from minissl.methods import list_methods
from minissl.training.run import read_run
from tests.benchmarks import scoreboard, speed

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "data" / "recorded"
NOT_MEASURED = {"inpainting"}  # rows that the recorded board lacks


def read_json(name):
    return json.loads((RECORDED / name).read_text(encoding="utf-8"))


def documentation():
    """Return the text of the README and of all pages in docs/."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")))


def test_every_method_that_trains_an_encoder_has_a_row():
    assert {command.split()[0] for command in scoreboard.ROWS.values()} == set(list_methods()) - {"dinotxt"}


@pytest.mark.parametrize("row", scoreboard.ROWS)
def test_all_rows_have_the_same_encoder_size_and_the_given_seed_data_and_preset(row):
    run = scoreboard.cell_config(row, 3, "scenes", "cpu")
    baseline = scoreboard.cell_config("random", 0, "scenes", "cpu")
    for name in ("name", "patch_size", "stem", "image_size", "depth", "init_std"):
        assert run.encoder[name] == baseline.encoder[name], name
    assert (baseline.encoder["name"], baseline.encoder["image_size"]) == ("nano", 32)
    assert run.train["seed"] == 3
    gpu = scoreboard.cell_config(row, 0, "folder:x", "gpu")
    assert (gpu.encoder["name"], gpu.encoder["patch_size"], gpu.data) == ("small", 16, "folder:x")


def test_the_table_has_means_standard_deviations_and_dashes():
    rows = {"a": {"0": {"knn": 0.5, "memory": 1.0}, "1": {"knn": 0.7, "memory": 1.5}}, "b": {"0": {"knn": 0.25}}}
    table = scoreboard.markdown_table(rows, {"knn": "k-NN", "memory": "GB", "absent": "-"})
    assert table.splitlines() == [
        "| | k-NN | GB |",
        "|---|---|---|",
        "| a | 60.0 ± 14.1 | 1.25 ± 0.35 |",
        "| b | 25.0 | - |",
    ]
    table = scoreboard.markdown_table(rows, {"knn": "k-NN"}, {"b": "90 elsewhere"})
    assert table.splitlines() == [
        "| | k-NN | published, full budget |",
        "|---|---|---|",
        "| a | 60.0 ± 14.1 | - |",
        "| b | 25.0 | 90 elsewhere |",
    ]


def test_cells_are_collected_by_row_and_seed_with_their_loss_curve(tmp_path):
    for name, knn in {"DINO_0": 0.5, "DINO_11": 0.25, "CLIP_0": 0.75}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"knn": knn}))
    log = [json.dumps({"step": step, "loss": 5 - step / 100}) for step in range(100)] + ['{"step": 99, "knn": 0.5}']
    (tmp_path / "DINO_11" / "log.jsonl").write_text("\n".join(log))
    (tmp_path / "DINO_2").mkdir()  # still training
    rows = scoreboard.collect_rows(tmp_path)
    assert list(rows) == ["CLIP", "DINO"]  # in the order of ROWS
    assert rows["DINO"]["0"] == {"knn": 0.5}
    assert rows["DINO"]["11"]["knn"] == 0.25
    assert rows["DINO"]["11"]["loss"][:2] == [[0, 5.0], [5, 4.95]]


@pytest.mark.slow
def test_an_interrupted_cell_is_resumed_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    run = scoreboard.cell_config("DINO", 0, "digits", "cpu")
    dataset = run.load_dataset("train")
    monkeypatch.setattr(scoreboard, "seconds_per_step", lambda *_: 0.1)
    cost = scoreboard.train_cell(run, run.build(), dataset, tmp_path / "complete", minutes=0.0101)
    assert (cost["steps"], cost["images_per_second"]) == (6, run.train["batch_size"] / 0.1)
    saved = read_run(tmp_path / "complete")[0].method_options
    assert saved["num_prototypes"] == run.method_options["num_prototypes"]
    assert scoreboard.train_cell(run, run.build(), dataset, tmp_path / "like", minutes=5, steps=2)["steps"] == 2
    method = run.build()
    monkeypatch.setattr(method, "after_step", interrupt_after_step(method, 3))
    with pytest.raises(KeyboardInterrupt):
        scoreboard.train_cell(run, method, dataset, tmp_path / "resumed", minutes=0.0101)
    monkeypatch.setattr(scoreboard, "seconds_per_step", lambda *_: 0.001)  # the plan is not made again
    scoreboard.train_cell(run, run.build(), dataset, tmp_path / "resumed", minutes=0.0101)
    complete, resumed = (load_encoder(tmp_path / name).state_dict() for name in ("complete", "resumed"))
    assert all((complete[name] == resumed[name]).all() for name in complete)


def interrupt_after_step(method, step):
    """Return `method.after_step` with Ctrl-C at one step."""
    count, original = iter(range(1, 100)), method.after_step

    def after_step(progress):
        original(progress)
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGINT)

    return after_step


@pytest.mark.slow
def test_a_random_init_cell_and_a_trained_cell_are_evaluated(tmp_path):
    options = {"out": str(tmp_path), "threads": 1, "preset": "cpu", "data": "digits", "minutes": 1.0}
    for row in ("random", "DINO"):
        line = scoreboard.run_cell((row, 0, options | {"steps": {"DINO_0": 1}}))
        assert line.startswith(f"{row}, seed 0: knn ")
    rows = scoreboard.collect_rows(tmp_path)
    assert {"knn", "linear", "few_shot_10", "rank_me"} <= set(rows["random"]["0"])
    assert rows["DINO"]["0"]["steps"] == 1
    assert rows["DINO"]["0"]["minutes_spent"] > 0


def test_a_repeated_row_is_compared_by_the_standard_deviations_of_the_board():
    columns = scoreboard.IMAGE_COLUMNS | scoreboard.PATCH_COLUMNS
    board = {"DINO": {"0": {"knn": 0.5, "J&F": 0.2}, "1": {"knn": 0.7, "J&F": 0.2}}}
    repeated = {"DINO": {"0": {"knn": 0.7, "J&F": 0.3}}, "CLIP": {"0": {"knn": 0.7}}}
    comparison = scoreboard.compare_with_board(repeated, board, columns)
    assert comparison.startswith(
        "DINO: of 2 metrics 1 differ by at most one standard deviation, 1 by at most two; J&F "
    )
    assert "CLIP" not in comparison
    comparison = scoreboard.compare_with_board(board, board, columns)
    assert comparison.startswith("DINO: of 2 metrics 2 differ by at most one standard deviation, 2 by at most two")
    assert comparison.endswith("by 0.0")


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        ("--rows DINO CLIP --seeds 0 7", "lacks DINO with seed 7, CLIP with seed 0, CLIP with seed 7; change --rows"),
        ("--rows DINO --seeds 0", "other options (--data scenes --minutes 5.0 --like None); choose another --out"),
    ],
)
def test_like_is_refused_before_any_work_if_the_board_lacks_a_cell_or_the_directory_has_another(
    tmp_path, monkeypatch, capsys, args, pattern
):
    like = tmp_path / "like.json"
    like.write_text(json.dumps({"rows": {"DINO": {"0": {"steps": 2}}}}))
    settings = {"minutes": 5.0, "data": "scenes", "preset": "cpu", "threads": 1, "like": None, "rows": {}}
    (tmp_path / "scoreboard.json").write_text(json.dumps(settings))
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["scoreboard", *args.split(), "--like", str(like), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        scoreboard.main()
    assert exit_info.value.code == 2
    assert pattern in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.iterdir()) == files


def test_the_documentation_has_the_recorded_board():
    rows = read_json("scoreboard.json")["rows"]
    assert list(rows) == [row for row in scoreboard.ROWS if row not in NOT_MEASURED]
    assert all(len(by_seed) == 3 for by_seed in rows.values())
    keys = {key for by_seed in rows.values() for metrics in by_seed.values() for key in metrics}
    assert set(scoreboard.IMAGE_COLUMNS | scoreboard.PATCH_COLUMNS) <= keys
    text = documentation()
    assert all(table in text for table in scoreboard.board_tables(rows, "scenes"))


def test_the_documentation_has_the_photographs_board_beside_published_numbers():
    rows = read_json("scoreboard_cifar10.json")["rows"]
    assert {"random", "supervised", "SimCLR", "DINO", "DINOv2"} <= set(rows)
    image_table, _ = scoreboard.board_tables(rows, "cifar10")
    assert image_table in documentation()


def test_the_documentation_has_dino_beside_lightlys_for_every_seed():
    results = read_json("cifar10_dino.json")
    knn = {name: [100 * by_seed["knn"] for by_seed in results[name].values()] for name in ("minissl", "lightly")}
    text = " ".join(documentation().split())
    for values in knn.values():
        seeds = ", ".join(f"{value:.1f}" for value in values)
        assert f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({seeds}" in text
    assert min(knn["minissl"]) > max(knn["lightly"])


def test_the_documentation_has_the_recorded_speed():
    assert speed.markdown_table(read_json("speed.json")["implementations"]) in documentation()
