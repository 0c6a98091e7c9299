"""Each piece that is left out brings its own collapse; with all of them there is none."""

import itertools
import math

import pytest
import torch

from minissl import lab
from minissl.data import load
from minissl.visualize import lab_figure


@pytest.fixture(scope="module")
def scenes():
    data = load("scenes:place", "val", 64)
    return data.take(torch.arange(1500)), data.take(torch.arange(1500, 1800))


@pytest.mark.parametrize(
    ("without", "verdict"), [((), "none"), (("centring",), "one-hot"), (("sharpening",), "uniform")]
)
def test_collapse_is_provoked_and_cured(scenes, without, verdict):
    cell = lab.run(*scenes, without, steps=36, seed=5, looks=1, local_crops=0)
    assert cell.verdict == verdict
    last, level = cell.lines[-1], math.log(lab.OPTIONS["prototypes"])
    if verdict == "one-hot":
        assert last["teacher_entropy"] < 0.1 * level
        assert len(cell.targets.argmax(dim=1).unique()) == 1
    if verdict == "uniform":
        assert last["teacher_entropy"] > 0.95 * level
        assert cell.targets.max() < 0.1
    if verdict == "none":
        assert len(cell.targets.argmax(dim=1).unique()) > 2


def test_every_piece_and_all_of_them_can_be_left_out():
    for n in range(5):
        for left in itertools.combinations(lab.PIECES, n):
            method = lab.make(left)
            assert (method.center_momentum == 1) == ("centring" in left)
            assert (method.temperatures["end"] == method.student_temperature) == ("sharpening" in left)
            assert (method.momentum == 0) == ("EMA" in left)
            assert method.stop_gradient == ("stop-gradient" not in left)


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (torch.full((16, 16), 1 / 16), "uniform"),
        (torch.eye(16)[:1].expand(16, 16), "one-hot"),
        (torch.tensor([[0.25] * 4 + [0.0] * 12]).expand(16, 16), "one answer"),
        (torch.eye(16), "none"),  # as sharp as one-hot collapse, but another prototype for every image
        (torch.eye(16).repeat_interleave(2, 0)[:16], "none"),
    ],
)
def test_the_kinds_of_collapse_are_told_apart(rows, verdict):
    entropy, of_mean = torch.special.entr(rows).sum(-1).mean(), torch.special.entr(rows.mean(0)).sum()
    assert lab.verdict(float(entropy), float(of_mean), 16) == verdict


def test_cells_are_kept_and_drawn(scenes, tmp_path):
    data, images = scenes
    cell = lab.run(data, images, ("EMA", "stop-gradient"), steps=3, looks=1, local_crops=0)
    lab.save([cell, cell._replace(without=())], tmp_path / "lab.jsonl")
    kept, other = lab.load(tmp_path / "lab.jsonl")
    assert kept.without == ("EMA", "stop-gradient")
    assert other.without == ()
    assert kept.verdict == cell.verdict
    torch.testing.assert_close(kept.targets, cell.targets, rtol=0, atol=0.0051)
    assert kept.lines[-1]["rank_me"] == pytest.approx(cell.lines[-1]["rank_me"], abs=1e-4)
    assert lab.load(tmp_path / "none.jsonl") == []
    figure = lab_figure({"one": kept, "two": other})
    assert [axis.get_title() for axis in figure.axes[:2]] == [f"{n}\ncollapse: {cell.verdict}" for n in ("one", "two")]
    figure.savefig(tmp_path / "lab.png")
