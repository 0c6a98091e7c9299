"""Tests of measuring collapse, and of the collapse lab: without each component DINO collapses in its own way."""

import itertools
import math

import pytest
import torch

from minissl.data import Images, load_dataset
from minissl.evaluation import alignment, collapse_type, knn, measure_collapse, rank_me
from minissl.notebook import collapse_lab
from minissl.visualization import collapse_lab_figure


@pytest.fixture(scope="module")
def scenes() -> tuple[Images, Images]:
    dataset = load_dataset("scenes:place", "val", 64)
    return dataset.subset(torch.arange(1500)), dataset.subset(torch.arange(1500, 1800))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (torch.full((16, 16), 1 / 16), "uniform"),
        (torch.eye(16)[:1].expand(16, 16), "one-hot"),
        (torch.tensor([[0.25] * 4 + [0.0] * 12]).expand(16, 16), "constant"),
        (torch.eye(16), "none"),  # as sharp as a one-hot collapse, but with another prototype for every image
        (torch.eye(16).repeat_interleave(2, 0)[:16], "none"),
    ],
)
def test_types_of_collapse(targets, expected):
    features = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    metrics = measure_collapse(features, features, targets, torch.arange(16), features, torch.arange(16))
    assert collapse_type(metrics["entropy"], metrics["entropy_of_mean"], 16) == expected


def test_collapse_metrics_equal_their_parts():
    torch.manual_seed(0)
    features, flipped, train_features = torch.randn(8, 4), torch.randn(8, 4), torch.randn(20, 4)
    labels, train_labels, targets = torch.arange(8) % 2, torch.arange(20) % 2, torch.rand(8, 5).softmax(-1)
    metrics = measure_collapse(features, flipped, targets, labels, train_features, train_labels)
    entropies = [-sum(p * math.log(p) for p in row) for row in targets.tolist()]
    assert metrics["entropy"] == pytest.approx(sum(entropies) / 8, rel=1e-5)
    mean = [sum(column) / 8 for column in zip(*targets.tolist())]
    assert metrics["entropy_of_mean"] == pytest.approx(-sum(p * math.log(p) for p in mean), rel=1e-5)
    assert metrics["alignment"] == alignment(features, flipped)
    assert (metrics["rank_me"], metrics["embed_dim"]) == (rank_me(features), 4)
    assert metrics["knn"] == (knn(train_features, train_labels, features) == labels).float().mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("removed", "expected"), [((), "none"), (("centering",), "one-hot"), (("sharpening",), "uniform")]
)
def test_dino_collapses_without_a_component(scenes, removed, expected):
    run = collapse_lab.run_experiment(*scenes, removed, steps=36, seed=5, num_evaluations=1, num_local_crops=0)
    assert run.collapse_type == expected
    last, max_entropy = run.lines[-1], math.log(collapse_lab.METHOD_OPTIONS["num_prototypes"])
    num_used = len(run.targets.argmax(dim=1).unique())
    if expected == "one-hot":
        assert last["teacher_entropy"] < 0.1 * max_entropy
        assert num_used == 1
    if expected == "uniform":
        assert last["teacher_entropy"] > 0.95 * max_entropy
        assert run.targets.max() < 0.1
    if expected == "none":
        assert num_used > 2


def test_every_combination_of_components_can_be_removed():
    for n in range(5):
        for removed in itertools.combinations(collapse_lab.COMPONENTS, n):
            method = collapse_lab.create_dino(removed)
            assert (method.center_momentum == 1) == ("centering" in removed)
            assert (method.teacher_temp == method.student_temp) == ("sharpening" in removed)
            assert (method.teacher_momentum == 0) == ("EMA" in removed)
            assert method.stop_gradient == ("stop-gradient" not in removed)


def test_runs_are_saved_loaded_and_drawn(scenes, tmp_path):
    removed = ("EMA", "stop-gradient")
    run = collapse_lab.run_experiment(*scenes, removed, steps=3, num_evaluations=1, num_local_crops=0)
    collapse_lab.save_runs([run, run._replace(removed=())], tmp_path / "runs.jsonl")
    loaded, other = collapse_lab.load_runs(tmp_path / "runs.jsonl")
    assert (loaded.removed, other.removed) == (removed, ())
    assert loaded.collapse_type == run.collapse_type
    torch.testing.assert_close(loaded.targets, run.targets, rtol=0, atol=0.0051)
    assert loaded.lines[-1]["rank_me"] == pytest.approx(run.lines[-1]["rank_me"], abs=1e-4)
    assert collapse_lab.load_runs(tmp_path / "none.jsonl") == []
    figure = collapse_lab_figure({"one": loaded, "two": other})
    titles = [axis.get_title() for axis in figure.axes[:2]]
    assert titles == [f"{name}\ncollapse: {run.collapse_type}" for name in ("one", "two")]
    figure.savefig(tmp_path / "lab.png")
