"""A checkpoint is whole or not there, is only numbers, and says clearly what is wrong with a file that is not one."""

import errno
import os
import pickle

import pytest
import torch
from torch import nn

from minissl import checkpoint, pretrained
from minissl.errors import InputError
from tests.golden import tiny_vit


def trained(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_run_comes_back_to_the_bit(tmp_path):
    model, optimizer = trained(0)
    checkpoint.save_training(tmp_path / "c", model, optimizer, {"step": 3})
    other, moments = trained(1)
    assert checkpoint.load_training(tmp_path / "c", other, moments) == {"step": 3}
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, moments.state_dict()["state"][i][name])


def test_a_full_disk_leaves_what_was_saved(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write(path, b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"disk is full.*whole"):
        checkpoint.write(path, b"after")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_with_too_little_space_is_said_before(tmp_path):
    with pytest.raises(InputError, match="MB left"):
        checkpoint.need_space(tmp_path, 1 << 62)


def test_a_cut_file_is_said(tmp_path):
    model, optimizer = trained(0)
    path = tmp_path / "c"
    checkpoint.save_training(path, model, optimizer, {"step": 3})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole checkpoint"):
        checkpoint.load_training(path, model, optimizer)


def test_a_pickle_is_refused_and_does_not_run(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "c").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(InputError, match="not a whole checkpoint"):
        checkpoint.load_tensors(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_another_model_is_said(tmp_path):
    model, optimizer = trained(0)
    checkpoint.save_training(tmp_path / "c", model, optimizer, {"step": 3})
    other = nn.Linear(3, 3)
    with pytest.raises(InputError, match="another method or another encoder"):
        checkpoint.load_training(tmp_path / "c", other, torch.optim.AdamW(other.parameters()))


def test_an_encoder_is_loaded_from_its_own_header(tmp_path):
    choices = {"name": "nano", "patch_size": 8, "img_size": 16, "stem": "conv"}
    encoder = pretrained.vit(**choices)
    pretrained.save(encoder, choices, tmp_path / "encoder.safetensors")
    found, images = pretrained.load(tmp_path), torch.randn(2, 3, 16, 16)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    torch.testing.assert_close(found(images).cls, encoder.eval()(images).cls.detach())


def test_what_is_no_encoder_is_said(tmp_path):
    checkpoint.save_tensors(tmp_path / "encoder.safetensors", tiny_vit().state_dict(), {})
    with pytest.raises(InputError, match="holds no encoder"):
        pretrained.load(tmp_path)
    with pytest.raises(InputError, match="no checkpoint"):
        pretrained.load(tmp_path / "nowhere")
