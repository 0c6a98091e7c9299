"""`track` follows objects through a folder of clips, writes what DAVIS writes, and refuses in one sentence."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from minissl import pretrained
from minissl.__main__ import main
from minissl.evaluate import frame_patches, j_and_f, patch_of, track
from minissl.footage import fitting, palette
from tests.folders import picture
from tests.test_davis import mask_of, save_mask

T, H, W = 4, 20, 32


@pytest.fixture
def davis(tmp_path):
    """Two clips, the second without an object in its first frame; a list that names the first."""
    for name in ("swan", "void"):
        for t in range(T):
            picture(tmp_path / "davis" / "JPEGImages" / "480p" / name / f"{t:05}.jpg", (H, W), seed=t)
            mask = mask_of(t) if name == "swan" or t else np.full((H, W), 255, dtype=np.uint8)
            save_mask(tmp_path / "davis" / "Annotations" / "480p" / name / f"{t:05}.png", mask)
    (tmp_path / "davis" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "davis" / "ImageSets" / "2017" / "val.txt").write_text("swan\n")
    return tmp_path / "davis"


def test_a_folder_is_tracked_and_written_as_davis_does(davis, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(f"track scenes/dino {davis} --size 30 --radius 3 --out {out} --device cpu".split()) == 0
    said = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert re.search(r"^swan +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", said, re.MULTILINE)
    assert re.search(r"^void +left out", said, re.MULTILINE)
    assert list(metrics["clips"]) == ["swan"]
    masks = [Image.open(out / "swan" / f"{t:05}.png") for t in range(T)]
    assert {mask.mode for mask in masks} == {"P"}
    found = torch.from_numpy(np.stack([np.asarray(mask) for mask in masks])).long()
    truth = torch.from_numpy(np.stack([mask_of(t) for t in range(T)])).long()
    frames = [np.array(Image.open(davis / f"JPEGImages/480p/swan/{t:05}.jpg")) for t in range(T)]
    frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    patches = torch.stack(list(frame_patches(pretrained.load("scenes/dino"), frames, (32, 48))))
    first = truth[0].masked_fill(truth[0] == 255, 0)
    assert torch.equal(found, track(patches, first, radius=3))
    expected = j_and_f(found, truth)
    assert {name: metrics[name] for name in ("J", "F", "J&F")} == {name: expected[name] for name in ("J", "F", "J&F")}


def test_drawn_clips_and_pixels_need_no_files(capsys):
    assert main("track pixels clips --size 30 --count 2 --frames 4 --patch_size 4".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["clip", "00000", "00001", "mean"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("nothing clips", "There is no checkpoint nothing"),
        ("scenes/nothing clips", "There is no checkpoint scenes/nothing; the project's own are"),
        ("pixels /nowhere/at/all", "There is no folder"),
        ("pixels {davis} --split test", "There is no list"),
        ("pixels clips --split all", "no split 'all'"),
        ("pixels clips --size 0", "--size 0"),
        ("pixels clips --count 0", "--count 0"),
        ("pixels clips --frames 2", "--frames 2 is too small; give 3"),
        ("pixels clips --patch_size 0", "--patch_size 0"),
        ("pixels clips --topk 0", "topk 0"),
        ("pixels clips --temperature 0", "temperature 0"),
        ("pixels clips --size large", "size"),
        ("pixels clips --out {davis}/ImageSets/2017/val.txt", "is a file"),
        ("pixels", "folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(davis, capsys, words, says):
    assert main(["track", *words.format(davis=davis).split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (sentence,) = said.err.splitlines()
    assert says in sentence


def test_a_folder_without_objects_is_said(davis, capsys):
    (davis / "ImageSets" / "2017" / "val.txt").write_text("void\n")
    assert main(f"track pixels {davis} --split val --size 16".split()) == 2
    assert "No clip of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "size", "patch", "expected"),
    [((480, 854), 480, 8, (480, 856)), ((480, 854), 480, 16, (480, 864)), ((854, 480), 60, 8, (112, 64)),
     ((64, 64), 64, 8, (64, 64)), ((1080, 1920), 960, 16, (960, 1712))],
)  # fmt: skip
def test_frames_are_brought_to_whole_patches(shape, size, patch, expected):
    assert fitting(shape, size, patch) == expected


def test_a_patch_is_as_large_as_the_encoder_says_or_shows():
    from minissl.encoders import make_encoder

    assert patch_of(pretrained.load("scenes/dino")) == 8
    assert patch_of(make_encoder("cnn").eval()) == 16


def test_the_palette_is_davis():
    assert palette()[: 3 * 4] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert palette()[-3:] == [224, 224, 192]
