"""Dataset statistics of a folder, the recommendation that follows from them, and the command `recommend`."""

import json
import math
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minissl import cli
from minissl.errors import InputError
from minissl.methods.transfer import Transfer
from minissl.reports import dataset_stats
from minissl.reports.recommend import command, recommend, table, warnings_for
from minissl.training import diagnostics
from minissl.training.config import TrainConfig
from minissl.training.plan import Plan
from tests.folders import class_folders, flat_folder, write_image
from tests.golden import tiny_vit

STATS = dataset_stats.DatasetStats(
    data="folder:my photos", num_train=9000, num_test=1000, num_unreadable=0, num_classes=0, min_side=300, p5_side=400,
    median_side=500, aspect_ratio=1.5, sample_size=1000, gray_fraction=0.0, duplicate_fraction=0.0,
    nearest_similarity=0.7, texture_agreement=0.4, device="cpu", num_cores=2, free_memory=8 * 10**9,
    images_per_second=400.0, peak_memory=10**9,
)  # fmt: skip
DINO = {"method": "dino", "minutes": 15.0}
CASES = {
    "photographs": {},
    "DINO": DINO,
    "3 minutes": {"minutes": 3.0},
    "600 minutes": {"minutes": 600.0},
    "0.1 minutes": {"minutes": 0.1, "method": "dino"},
    "300 images": {"num_train": 300, "num_test": 33},
    "9 images": {"num_train": 9, "num_test": 1},
    "24 pixels": {"min_side": 20, "p5_side": 24, "median_side": 24},
    "28 pixels": {"min_side": 28, "p5_side": 28, "median_side": 28, "method": "dino"},
    "one small image": {"min_side": 17},
    "textures": {"texture_agreement": 0.95},
    "labels": {"num_classes": 10},
    "GPU": {"device": "cuda", "free_memory": 80 * 10**9, "images_per_second": 1200.0},
    "small GPU": {"device": "cuda", "free_memory": 4 * 10**9, "images_per_second": 100.0},
    "GPU, 32 pixels": {
        "device": "cuda",
        "free_memory": 80 * 10**9,
        "min_side": 32,
        "p5_side": 32,
        "median_side": 32,
    },
}


def values(**changes):
    """Return the recommended values by option."""
    return {line.option: line.value for line in recommend(replace(STATS, **changes))}


def reason(option, **changes):
    return next(line.reason for line in recommend(replace(STATS, **changes)) if line.option == option)


@pytest.fixture
def any_device(monkeypatch):
    """Parse options for a GPU on a machine without one."""
    monkeypatch.setattr("minissl.training.device.choose_device", lambda name=None: torch.device(name or "cpu"))
    if hasattr(cli, "choose_device"):
        monkeypatch.setattr(cli, "choose_device", lambda name=None: torch.device(name or "cpu"))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_train_parses_the_recommended_command(any_device, changes):
    stats = replace(STATS, **changes)
    args = shlex.split(shlex.join(command(stats, "runs/my photos")))
    assert args[0] == "train"
    run, options = cli.parse_run(args[1:])
    assert run.data == "folder:my photos"
    assert str(options["out"]) == "runs/my photos"
    assert options["device"] == stats.device
    for line in recommend(stats):
        name = line.option.removeprefix("--")
        if name != line.option:
            parsed = run.encoder["patch_size"] if name == "encoder.patch_size" else options[name]
            assert parsed == (line.value if line.value != "true" else True), name


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_recommended_method_can_be_built_and_its_options_have_no_findings(any_device, changes):
    stats = replace(STATS, **changes)
    run, _ = cli.parse_run(command(stats, "runs/x")[1:])
    with torch.device("meta") if stats.on_cuda else torch.device("cpu"):
        method = run.build()
    steps = round(60 * run.train["minutes"] * stats.images_per_second / run.train["batch_size"])
    assert diagnostics.check_options(asdict(run), steps, method) == []
    assert run.train["batch_size"] <= stats.num_train
    assert run.crop_size <= min(run.image_size, stats.min_side)
    assert run.crop_size % run.encoder["patch_size"] == 0


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_each_reason_is_one_sentence(changes):
    stats = replace(STATS, **changes)
    for sentence in [*(line.reason for line in recommend(stats)), *warnings_for(stats)]:
        assert sentence.endswith(".")
        assert not re.search(r"[.!?] [A-Z]", sentence), sentence


def test_the_method_follows_from_time_and_number_of_images():
    assert [values(minutes=m)["method"] for m in (0.0, 29.0, 30.0)] == ["simclr", "simclr", "dino"]
    assert [values(num_train=n, minutes=30.0)["method"] for n in (999, 1000)] == ["simclr", "dino"]
    assert "256 prototypes and a momentum of 0.95" in reason("teacher")
    assert values(num_train=300, device="cuda")["method"] == "dino"
    assert values(minutes=3.0, method="dino")["method"] == "dino"
    with pytest.raises(InputError, match="--method clip"):
        values(method="clip")
    with pytest.raises(InputError, match="--method simclr on cuda; choose dino"):
        values(method="simclr", device="cuda")


def test_the_number_of_prototypes_grows_with_the_images():
    expected = {2048: 64, 4095: 64, 4096: 128, 8191: 128, 8192: 256, 10**6: 256}
    assert {n: values(num_train=n, **DINO)["--num_prototypes"] for n in expected} == expected
    assert reason("--num_prototypes", num_train=2048, **DINO).startswith("2,048 images are 32 per prototype;")
    expected = {20_000: 1024, 20_001: 2048, 10**6: 65_536}
    assert {n: values(num_train=n, device="cuda")["--num_prototypes"] for n in expected} == expected


def test_a_short_run_has_a_lower_teacher_momentum():
    assert values(**DINO)["--teacher_momentum"] == 0.95
    short = {"method": "dino", "minutes": 10.0, "images_per_second": 10.0}  # 94 steps of 64
    assert values(**short)["--teacher_momentum"] == round(1 - 10 / 94, 3)
    left, preset_left = (f"{math.exp(-rate / 2 * 94):.2%}" for rate in (0.106, 0.05))
    assert f"94 steps {left} of the teacher's random initialization" in reason("--teacher_momentum", **short)
    assert reason("--teacher_momentum", **short).endswith(f"the preset's 0.95 would leave {preset_left}.")


def test_sizes_follow_the_smallest_and_the_median_image():
    assert [values(median_side=m, min_side=30)["--image_size"] for m in (40, 500)] == [40, 64]
    assert [values(min_side=s)["--crop_size"] for s in (300, 33, 31, 24)] == [32, 32, 24, 24]
    small = values(min_side=23)
    assert (small["--crop_size"], small["--encoder.patch_size"]) == (20, 4)
    assert "--encoder.patch_size" not in values(min_side=24)
    with pytest.raises(InputError, match="smallest image is 15 pixels"):
        values(min_side=15)


def test_textures_get_smaller_crops():
    scales = [values(texture_agreement=t, **DINO)["--global_crops_scale"] for t in (0.79, 0.8)]
    assert scales == [(0.5, 1.0), (0.4, 1.0)]
    assert "agree by 0.40" in reason("--global_crops_scale", **DINO)
    assert "agree by 0.40" in reason("--crop_scale")


def test_the_batch_fits_the_images_and_the_memory():
    assert [values(num_train=n)["--batch_size"] for n in (9, 255, 256, 1000)] == [8, 128, 256, 256]
    assert values(**DINO)["--batch_size"] == 64
    large, medium, small = (values(device="cuda", free_memory=gigabytes * 10**9) for gigabytes in (80, 20, 4))
    assert (large["--batch_size"], medium["--batch_size"], small["--batch_size"]) == (256, 256, 128)
    assert "--activation_checkpointing" not in large
    assert medium["--activation_checkpointing"] == "true"
    assert "--lr" not in medium
    assert small["--lr"] == 2.5e-4


def test_the_expected_cost_follows_from_the_measured_speed():
    expected = values(minutes=16.0)
    assert expected["steps"] == "1,500"  # 16 minutes of 400 images a second, 256 a step
    assert "384,000 images at the measured 400 a second are 42.7 epochs" in reason("steps", minutes=16.0)
    assert expected["memory"] == f"{1 + 10_000 * 3 * 64**2 / 1e9:.1f} GB"
    assert "steps" not in values(images_per_second=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train": 3, "num_test": 1}, "3 training images, about 3 of them distinct"),
        ({"num_train": 500, "duplicate_fraction": 0.99}, "500 training images, about 5 of them distinct"),
    ],
)
def test_too_few_distinct_images_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        values(**changes)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"num_unreadable": 2}, ["2 files"]),
        ({"gray_fraction": 1.0}, ["100%"]),
        ({"aspect_ratio": 4.0}, ["4.0", "25%"]),
        ({"duplicate_fraction": 0.2}, ["20%"]),
        ({"nearest_similarity": 0.97}, ["0.97"]),
        ({"images_per_second": 40.0, "minutes": 15.0}, ["4.0 epochs", "375 minutes"]),
        ({"num_train": 300}, ["300 images", "--encoder.weights"]),
        ({"min_side": 17}, ["400 pixels", "17"]),
    ],
)
def test_each_problem_of_the_images_has_one_warning(changes, numbers):
    assert warnings_for(STATS) == []
    (warning,) = warnings_for(replace(STATS, **changes))
    assert all(number in warning for number in numbers)
    assert f"Warning: {warning}" in table(replace(STATS, **changes))


def test_the_table_wraps_reasons_in_their_own_column():
    lines = table(STATS, width=90).splitlines()
    assert all(len(line) <= 90 for line in lines)
    assert len(lines) > len(recommend(STATS))  # some reasons take two lines
    assert all(line.startswith(" " * 40) for line in lines if line.startswith(" "))


def save(folder, images):
    """Write images (N, 3, H, W) uint8 as PNG files."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


def measure(folder):
    return dataset_stats.compute_dataset_stats(f"folder:{folder}", torch.device("cpu"))


def noise(n, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def test_files_of_a_folder_are_counted(tmp_path):
    flat = flat_folder(tmp_path / "flat", 30)
    write_image(flat / "wide.png", (20, 200))
    (flat / "broken.jpg").write_text("not an image")
    Image.fromarray(np.ones((20, 20), np.float32)).save(flat / "of floats.tiff")
    stats = measure(flat)
    assert (stats.num_train + stats.num_test, stats.num_unreadable, stats.num_classes) == (31, 2, 0)
    assert (stats.min_side, stats.p5_side, stats.median_side, stats.aspect_ratio) == (20, 20, 20, 1.2)
    assert (stats.gray_fraction, stats.duplicate_fraction) == (0.0, 0.0)
    stats = measure(class_folders(tmp_path / "classes", train=6, test=3))
    assert (stats.num_train, stats.num_test, stats.num_classes) == (12, 6, 2)
    assert stats.duplicate_fraction == 0.5  # both classes hold the same noise


def test_unusual_folders_are_measured(tmp_path):
    same = measure(save(tmp_path / "same", noise(1).expand(40, -1, -1, -1)))
    assert same.num_distinct == 1
    with pytest.raises(InputError, match="about 1 of them distinct"):
        recommend(same)
    uniform = noise(40, 1).expand(-1, -1, 32, 32)
    assert measure(save(tmp_path / "uniform", uniform)).num_distinct == 1
    gray = noise(40)[:, :1].expand(-1, 3, -1, -1)
    assert measure(save(tmp_path / "gray", gray)).gray_fraction == 1.0
    wide = noise(40, 64)[:, :, :16]
    assert measure(save(tmp_path / "wide", wide)).aspect_ratio == 4.0
    single = measure(save(tmp_path / "single", noise(1)))
    assert (single.duplicate_fraction, single.nearest_similarity, single.texture_agreement) == (0.0, 0.0, 0.0)


def test_folders_without_images_and_other_data_are_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("not an image")
    with pytest.raises(InputError, match="None of the 1 files"):
        measure(tmp_path / "texts")
    with pytest.raises(InputError, match="give folder:photos"):
        dataset_stats.compute_dataset_stats("photos", torch.device("cpu"))


def test_texture_agreement_distinguishes_textures_from_objects():
    colors = torch.rand(60, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    stripes = colors * (1 + 0.5 * torch.sin(torch.arange(64.0)))
    assert dataset_stats.texture_agreement((stripes.expand(-1, -1, 64, -1) * 150).to(torch.uint8)) > 0.95
    quarters = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    objects = F.interpolate(quarters, size=(64, 64))
    assert dataset_stats.texture_agreement((objects * 255).to(torch.uint8)) < 0.2


def test_speed_is_measured_on_images_of_the_training_size(monkeypatch):
    seen = {}

    def plan(method, dataset, config):
        seen.update(images=dataset.images, precision=config.precision)
        return Plan(10, 0.5, 123)

    monkeypatch.setattr(dataset_stats.trainer, "plan", plan)
    method = Transfer(tiny_vit(), crop_size=16, num_classes=2)
    stats = dataset_stats.measure_speed(STATS, method, 24, TrainConfig(batch_size=8))
    assert (stats.images_per_second, stats.peak_memory) == (16.0, 123)
    assert seen["images"].shape == (8, 3, 24, 24)
    assert seen["precision"] in ("fp32", "bf16")


def test_without_training_nothing_is_written(tmp_path, capsys, monkeypatch):
    flat = flat_folder(tmp_path / "flat", 40)
    args = ["recommend", f"folder:{flat}", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*args, "--train", "false"]) == 0
    printed = capsys.readouterr().out
    assert "36 images are few" in printed
    line = re.search(r"^(?:python -m )?minissl (train .*)$", printed, re.MULTILINE)[1]
    run, _ = cli.parse_run(shlex.split(line)[1:])
    assert (run.method, run.train["minutes"]) == ("simclr", 3.0)
    assert not (tmp_path / "run").exists()
    assert cli.main(["recommend", "scenes"]) == 2
    assert "folder:scenes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(args) == 2


def test_wrong_options_of_recommend_are_refused(tmp_path, capsys):
    args = ["recommend", f"folder:{flat_folder(tmp_path / 'flat', 12)}", "--out", str(tmp_path / "run")]
    assert cli.main([*args, "--minutes=-5"]) == 2
    assert "--minutes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert cli.main([*args, "--resume"]) == 2  # a run that `recommend` did not start
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "config.json"]


@pytest.mark.slow
def test_recommend_trains_resumes_and_writes_a_report(tmp_path, capsys):
    flat, out = flat_folder(tmp_path / "flat", 40), tmp_path / "run"
    args = ["recommend", f"folder:{flat}", "--minutes", "0.005", "--out", str(out), "--device", "cpu"]
    assert cli.main(args) == 0
    report = (out / "report.html").read_text(encoding="utf-8")
    assert len(report) < 5_000_000
    assert "too few to judge" in report
    assert "<h2>k-NN accuracy</h2>" not in report
    config = json.loads((out / "config.json").read_text())
    assert config["run"]["method"] == "simclr"
    assert cli.main(args) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*args[:1], f"folder:{tmp_path}", *args[2:], "--resume"]) == 2
    assert f"folder:{flat}" in capsys.readouterr().err
    (out / "report.html").unlink()
    stats_file = out / dataset_stats.STATS_FILE
    stats = stats_file.read_text()
    stats_file.write_text('{"unknown": 1}')
    assert cli.main([*args, "--resume"]) == 2
    assert str(stats_file) in capsys.readouterr().err
    stats_file.write_text(stats)
    assert cli.main([*args, "--resume"]) == 0
    assert json.loads((out / "config.json").read_text()) == config
    assert (out / "report.html").exists()


def test_quoted_measurements_are_documented():
    """Every number with a standard deviation in a reason is in README.md or docs/."""
    root = Path(__file__).parent.parent
    documents = [root / "README.md", *(root / "docs").glob("*.md")]
    documented = " ".join(file.read_text(encoding="utf-8") for file in documents)
    reasons = " ".join(line.reason for changes in CASES.values() for line in recommend(replace(STATS, **changes)))
    quoted = set(re.findall(r"\d+\.\d ± \d+\.\d", reasons))
    assert len(quoted) >= 3
    assert {number for number in quoted if number not in documented} == set()
