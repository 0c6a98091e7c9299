"""A run's folder outlives the options that come after it."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from minissl import checkpoint, pretrained, runs
from minissl.__main__ import parse_run
from minissl.errors import InputError
from minissl.machine import Plan


def test_a_run_from_before_an_option_of_its_encoder_goes_on(tmp_path):
    run, _ = parse_run(["dino", "--device", "cpu", "--preset", "cpu"])
    plan = Plan(10, 0.1, 0)
    checkpoint.write_json(tmp_path / "config.json", {"run": asdict(run), "plan": asdict(plan)})
    content = json.loads((tmp_path / "config.json").read_text())
    del content["run"]["encoder"]["depth"], content["run"]["options"]["stop_gradient"], content["run"]["start"]
    checkpoint.write_json(tmp_path / "config.json", content)
    found, _ = runs.read(tmp_path)
    assert json.loads(json.dumps(asdict(found))) == json.loads(json.dumps(asdict(run)))  # but for tuples
    assert found.options["stop_gradient"] is True
    runs.check_folder(run, tmp_path, resume=True)
    deeper, _ = parse_run(["dino", "--device", "cpu", "--preset", "cpu", "--encoder.depth", "3"])
    assert len(deeper.build().encoder.blocks) == 3
    with pytest.raises(InputError, match="depth 0, not 3"):
        runs.check_folder(deeper, tmp_path, resume=True)


def test_a_run_begins_where_another_ended_at_another_size(tmp_path):
    """A last phase at high resolution: the same weights, positions resampled, teacher and heads included."""
    words = ["dinov2", "--device", "cpu", "--preset", "cpu"]
    before, _ = parse_run([*words, "--size", "32"])
    after, _ = parse_run([*words, "--size", "64", "--start", "x"])
    assert after.start == "x"
    first, second = before.build(), after.build()
    with torch.no_grad():
        for p in first.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    state = {f"method.{name}": t for name, t in first.state_dict().items()}
    checkpoint.save_tensors(tmp_path / "checkpoint.safetensors", state, {"step": 1})
    pretrained.begin_from(tmp_path, second)
    for (name, old), new in zip(first.state_dict().items(), second.state_dict().values()):
        if not name.endswith("pos_embed"):
            assert torch.equal(old, new), name
    assert second.encoder.pos_embed.shape == (1, 1 + 64, 128)
    images = torch.rand(2, 3, 64, 64)
    near = F.cosine_similarity(first.encoder.eval()(images).cls, second.encoder.eval()(images).cls)
    assert near.min() > 0.99  # the first resamples its positions on the way
    for other in (["simclr"], ["dinov2", "--encoder.depth", "2"], ["dinov2", "--prototypes", "8"]):
        with pytest.raises(InputError, match="another method or another encoder"):
            pretrained.begin_from(tmp_path, parse_run([*other, "--device", "cpu", "--preset", "cpu"])[0].build())


def test_a_part_that_a_run_does_without_is_left_where_it_was(tmp_path):
    words = ["dinov3", "--device", "cpu", "--preset", "cpu"]
    first, second = (parse_run([*words, *more])[0].build() for more in ([], ["--ibot", "0", "--seed", "1"]))
    state = {f"method.{name}": t for name, t in first.state_dict().items()}
    checkpoint.save_tensors(tmp_path / "checkpoint.safetensors", state, {"step": 1})
    pretrained.begin_from(tmp_path, second)
    assert "patch_head" in first.student
    assert "patch_head" not in second.student
    for name, new in second.state_dict().items():
        assert torch.equal(first.state_dict()[name], new), name


def test_no_part_of_an_encoder_is_left(tmp_path):
    words = ["dinov3", "--device", "cpu", "--preset", "cpu"]
    deep, plain = (parse_run([*words, *more])[0].build() for more in (["--encoder.depth", "2"], []))
    state = {f"method.{name}": t for name, t in deep.state_dict().items()}
    checkpoint.save_tensors(tmp_path / "checkpoint.safetensors", state, {"step": 1})
    with pytest.raises(InputError, match="another method or another encoder"):
        pretrained.begin_from(tmp_path, plain)


def test_words_are_learnt_on_a_trained_encoder_only():
    with pytest.raises(InputError, match="on a trained encoder"):
        parse_run(["dinotxt", "--device", "cpu", "--preset", "cpu"])[0].build()
