"""A checkpoint is whole or not there, is only numbers, and says clearly what is wrong with a file that is not one."""

import errno
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minissl import checkpoint, pretrained
from minissl.encoders import make_encoder
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


def load_training(path, method, optimizer):
    """Put a run back as `save_training` left it, as the loop does; returns its info."""
    tensors, info = checkpoint.load_method(path, method)
    checkpoint.load_optimizer(tensors, optimizer)
    return info


def test_a_run_comes_back_to_the_bit(tmp_path):
    model, optimizer = trained(0)
    checkpoint.save_training(tmp_path / "c", model, optimizer, {"step": 3})
    other, moments = trained(1)
    assert load_training(tmp_path / "c", other, moments) == {"step": 3}
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, moments.state_dict()["state"][i][name])


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_full_disk_leaves_what_was_saved(tmp_path, monkeypatch):
    checkpoint.write(tmp_path / "file", b"before")
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match=r"disk is full.*whole"):
        checkpoint.write(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["builtins.open", "os.fsync", "os.replace"])
def test_a_write_that_fails_anywhere_leaves_what_was_saved(tmp_path, monkeypatch, call):
    checkpoint.write(tmp_path / "file", b"before")
    with monkeypatch.context() as broken:
        broken.setattr(call, failing(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
            checkpoint.write(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_keeps_the_last_checkpoint_usable(tmp_path, monkeypatch):
    model, optimizer = trained(0)
    checkpoint.save_training(tmp_path / "c", model, optimizer, {"step": 3})
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(InputError, match="disk is full"):
            checkpoint.save_training(tmp_path / "c", *trained(1), {"step": 4})
    assert load_training(tmp_path / "c", *trained(2)) == {"step": 3}


def test_what_a_kill_left_half_written_is_in_nobodys_way(tmp_path):
    (tmp_path / "file.partial").write_bytes(b"half of some")
    checkpoint.write(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_with_too_little_space_is_said_before(tmp_path):
    with pytest.raises(InputError, match="MB left"):
        checkpoint.need_space(tmp_path, 1 << 62)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.5, 0.999])
def test_a_cut_file_is_refused_in_one_sentence(tmp_path, kept):
    model, optimizer = trained(0)
    path = tmp_path / "c"
    checkpoint.save_training(path, model, optimizer, {"step": 3})
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(InputError, match="not a whole checkpoint") as refusal:
        load_training(path, model, optimizer)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "c").write_text("a diary")
    with pytest.raises(InputError, match="not a whole checkpoint"):
        checkpoint.load_tensors(tmp_path / "c")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"minissl": "not json"}])
def test_a_safetensors_file_of_someone_else_is_refused(tmp_path, metadata):
    save_file({"weight": torch.ones(2)}, tmp_path / "c", metadata=metadata)
    with pytest.raises(InputError, match="not a whole checkpoint of minissl"):
        checkpoint.load_tensors(tmp_path / "c")


def test_a_file_of_torch_save_is_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(InputError, match="not a whole checkpoint"):
        checkpoint.load_tensors(tmp_path / "c")


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
        load_training(tmp_path / "c", other, torch.optim.AdamW(other.parameters()))


def test_an_encoder_is_loaded_from_its_own_header(tmp_path):
    choices = {"name": "nano", "patch_size": 8, "img_size": 16, "stem": "conv"}
    encoder = make_encoder(**choices)
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
