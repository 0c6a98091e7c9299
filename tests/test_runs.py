"""A run's folder outlives the options that come after it."""

import json
from dataclasses import asdict

import pytest

from minissl import checkpoint, runs
from minissl.__main__ import parse_run
from minissl.errors import InputError
from minissl.machine import Plan


def test_a_run_from_before_an_option_of_its_encoder_goes_on(tmp_path):
    run, _ = parse_run(["dino", "--device", "cpu", "--preset", "cpu"])
    plan = Plan(10, 0.1, 0)
    checkpoint.write_json(tmp_path / "config.json", {"run": asdict(run), "plan": asdict(plan)})
    content = json.loads((tmp_path / "config.json").read_text())
    del content["run"]["encoder"]["depth"]
    checkpoint.write_json(tmp_path / "config.json", content)
    found, _ = runs.read(tmp_path)
    assert found.encoder == run.encoder
    runs.check_folder(run, tmp_path, resume=True)
    deeper, _ = parse_run(["dino", "--device", "cpu", "--preset", "cpu", "--encoder.depth", "3"])
    assert len(deeper.build().encoder.blocks) == 3
    with pytest.raises(InputError, match="depth 0, not 3"):
        runs.check_folder(deeper, tmp_path, resume=True)
