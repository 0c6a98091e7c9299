"""Tests of recording attention maps during training."""

import pytest
import torch

from minissl.cli import parse_run
from minissl.data import Images
from minissl.errors import InputError
from minissl.evaluation import dense_attention
from minissl.evaluation.attention_history import (
    AttentionHistory,
    SnapshotRecorder,
    attention_snapshot,
    load_history,
    log_spaced_steps,
    save_history,
)
from minissl.training import checkpoint
from minissl.training.run import RunConfig
from tests.benchmarks import attention_history as recorder
from tests.golden import tiny_vit


@pytest.mark.parametrize(
    ("steps", "n", "expected"),
    [(64, 7, [1, 2, 4, 8, 16, 32, 64]), (1000, 4, [1, 10, 100, 1000]), (3, 9, [1, 2, 3]), (1, 5, [1])],
)
def test_steps_are_spaced_logarithmically(steps, n, expected):
    assert log_spaced_steps(steps, n) == expected


@pytest.mark.parametrize("steps", [2, 17, 1560])
def test_steps_include_the_first_and_the_last(steps):
    spaced = log_spaced_steps(steps, 14)
    assert (spaced[0], spaced[-1]) == (1, steps)
    assert spaced == sorted(set(spaced))
    assert len(spaced) <= 14


def test_a_history_needs_two_steps():
    with pytest.raises(InputError, match="1 steps"):
        log_spaced_steps(100, 1)


def test_a_snapshot_is_the_dense_attention_relative_to_its_maximum():
    torch.manual_seed(0)
    encoder, images = tiny_vit(stem="conv", drop_path=0.5).train(), torch.randint(0, 256, (3, 3, 16, 16)).byte()
    state = {name: t.clone() for name, t in encoder.state_dict().items()}
    snapshot = attention_snapshot(encoder, images, 16)
    assert encoder.training
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())
    assert snapshot.dtype == torch.uint8
    assert snapshot.shape == (3, 4, 8, 8)
    assert (snapshot.flatten(2).max(-1).values == 255).all()
    maps = dense_attention(encoder.eval(), images, 16)
    maps = maps / maps.amax((-2, -1), keepdim=True)
    enlarged = snapshot.repeat_interleave(2, -2).repeat_interleave(2, -1)  # pooling by the stride loses nothing
    assert (enlarged / 255 - maps).abs().max() <= 0.5 / 255 + 1e-5


def test_a_recorder_calls_its_snapshot_at_its_steps_only():
    steps = []
    recorder = SnapshotRecorder(lambda: steps.append(recorder.step) or torch.tensor(len(steps)), [1, 2, 5])
    assert [recorder() for _ in range(6)] == [{}] * 6
    assert steps == [1, 2, 5]
    assert [int(snapshot) for snapshot in recorder.maps] == [1, 2, 3]


def test_a_history_is_saved_and_loaded(tmp_path):
    maps, path = torch.randint(0, 256, (2, 3, 4, 8, 8)).byte(), tmp_path / "history.safetensors"
    save_history(AttentionHistory(maps, [1, 64], {"head": 2}), path)
    history = load_history(path)
    assert torch.equal(history.maps, maps)
    assert (history.steps, history.info) == ([1, 64], {"head": 2})


def test_files_that_are_not_histories_are_rejected(tmp_path):
    with pytest.raises(InputError):
        load_history(tmp_path / "nowhere")
    (tmp_path / "cut").write_bytes(b"cut")
    with pytest.raises(InputError):
        load_history(tmp_path / "cut")
    checkpoint.save_tensors(tmp_path / "other", {"weights": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="not an attention history"):
        load_history(tmp_path / "other")


def small_dataset(self, split):
    generator = torch.Generator().manual_seed(len(split))
    masks = torch.zeros(24, 16, 16, dtype=torch.uint8)
    masks[:, 4:12, 4:12] = 1
    return Images(torch.randint(0, 256, (24, 3, 16, 16), generator=generator).byte(), masks=masks)


@pytest.mark.parametrize("max_bytes", [recorder.MAX_BYTES, 0])
def test_a_training_is_recorded(monkeypatch, max_bytes):
    monkeypatch.setattr(RunConfig, "load_dataset", small_dataset)
    monkeypatch.setattr(recorder, "NUM_HEAD_IMAGES", 8)
    monkeypatch.setattr(recorder, "MAX_BYTES", max_bytes)
    args = "dino --image_size 16 --crop_size 16 --local_crop_size 8 --encoder.patch_size 8 --num_prototypes 32"
    args += " --hidden_dim 16 --bottleneck_dim 8 --batch_size 8 --minutes 0 --epochs 2 --encoder.depth 2"
    run, _ = parse_run([*args.split(), "--device", "cpu", "--preset", "cpu"])
    history, layers = recorder.record(run, args.split(), 3)
    assert layers.maps.shape[0] == len(layers.steps) == len(layers.info["attention_fractions"]) == 2
    assert history.steps == [1, 2, 6]
    assert history.maps.shape == (3, 16, 1 if max_bytes == 0 else 4, 8, 8)
    assert history.info["head"] < history.maps.shape[2]
    assert [len(row) for row in history.info["attention_fractions"]] == [4] * 3
    assert history.info["command"].startswith("dino --image_size 16")
