"""The command `track`: metrics and masks of clips in the layout of DAVIS and of synthetic clips, and its errors."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from minissl.cli import main
from minissl.evaluation import frame_patch_features, j_and_f, propagate_labels
from minissl.hub import pretrained
from minissl.reports.tracking import encoder_size, palette
from tests.folders import write_image
from tests.test_davis import mask_of, save_mask

T, H, W = 4, 20, 32


@pytest.fixture
def davis(tmp_path):
    """Return two clips, the second without an object in its first frame; the list val.txt names the first."""
    for name in ("swan", "void"):
        for t in range(T):
            write_image(tmp_path / "davis" / "JPEGImages" / "480p" / name / f"{t:05}.jpg", (H, W), seed=t)
            mask = mask_of(t) if name == "swan" or t else np.full((H, W), 255, dtype=np.uint8)
            save_mask(tmp_path / "davis" / "Annotations" / "480p" / name / f"{t:05}.png", mask)
    (tmp_path / "davis" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "davis" / "ImageSets" / "2017" / "val.txt").write_text("swan\n")
    return tmp_path / "davis"


def test_masks_and_metrics_of_a_davis_folder_are_written(davis, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(f"track scenes/dino {davis} --image_size 30 --radius 3 --out {out} --device cpu".split()) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert re.search(r"^swan +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", printed, re.MULTILINE)
    assert re.search(r"^void +skipped", printed, re.MULTILINE)
    assert list(metrics["clips"]) == ["swan"]
    assert (metrics["image_size"], metrics["patch_size"], metrics["radius"]) == (30, 8, 3)
    masks = [Image.open(out / "swan" / f"{t:05}.png") for t in range(T)]
    assert {mask.mode for mask in masks} == {"P"}
    predicted = torch.from_numpy(np.stack([np.asarray(mask) for mask in masks])).long()
    truth = torch.from_numpy(np.stack([mask_of(t) for t in range(T)])).long()
    frames = [np.array(Image.open(davis / f"JPEGImages/480p/swan/{t:05}.jpg")) for t in range(T)]
    frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    features = torch.stack(list(frame_patch_features(pretrained.load_encoder("scenes/dino"), frames, (32, 48))))
    first_mask = truth[0].masked_fill(truth[0] == 255, 0)
    assert torch.equal(predicted, propagate_labels(features, first_mask, radius=3))
    expected = j_and_f(predicted, truth)
    assert {name: metrics[name] for name in ("J", "F", "J&F")} == {name: expected[name] for name in ("J", "F", "J&F")}


def test_synthetic_clips_and_raw_pixels_need_no_files(capsys):
    assert main("track pixels clips --image_size 30 --num_clips 2 --num_frames 4 --patch_size 4".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["clip", "00000", "00001", "mean"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("nothing clips", "nothing"),
        ("scenes/nothing clips", "scenes/nothing"),
        ("pixels /nowhere/at/all", "/nowhere/at/all"),
        ("pixels {davis} --split test", "test"),
        ("pixels clips --split all", "'all'"),
        ("pixels clips --image_size 0", "--image_size 0"),
        ("pixels clips --num_clips 0", "--num_clips 0"),
        ("pixels clips --num_frames 2", "--num_frames 2 is too small; give 3"),
        ("pixels clips --patch_size 0", "--patch_size 0"),
        ("pixels clips --topk 0", "--topk is 0"),
        ("pixels clips --temperature 0", "--temperature is 0"),
        ("pixels clips --image_size large", "image_size"),
        ("pixels clips --out {davis}/ImageSets/2017/val.txt", "is a file"),
        ("pixels", "folder"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(davis, capsys, args, message):
    assert main(["track", *args.format(davis=davis).split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert message in line


def test_a_folder_without_objects_is_refused(davis, capsys):
    (davis / "ImageSets" / "2017" / "val.txt").write_text("void\n")
    assert main(f"track pixels {davis} --split val --image_size 16".split()) == 2
    assert str(davis) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "size", "patch", "expected"),
    [((480, 854), 480, 8, (480, 856)), ((480, 854), 480, 16, (480, 864)), ((854, 480), 60, 8, (112, 64)),
     ((64, 64), 64, 8, (64, 64)), ((1080, 1920), 960, 16, (960, 1712))],
)  # fmt: skip
def test_frames_are_resized_to_whole_patches(shape, size, patch, expected):
    assert encoder_size(shape, size, patch) == expected


def test_the_palette_is_that_of_davis():
    assert palette()[: 3 * 4] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert palette()[-3:] == [224, 224, 192]
