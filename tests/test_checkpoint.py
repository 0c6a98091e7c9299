"""A checkpoint is complete or absent, holds only tensors and JSON, and a file that is not one is refused."""

import errno
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minissl.errors import InputError
from minissl.hub import pretrained
from minissl.models.factory import create_encoder
from minissl.training import checkpoint
from tests.golden import tiny_vit


def trained(seed):
    """Return a network and its optimizer after three steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def load_training(path, method, optimizer):
    """Load a training as the training loop does. Returns its info."""
    tensors, info = checkpoint.load_method_state(path, method)
    checkpoint.load_optimizer_state(tensors, optimizer)
    return info


def test_a_training_is_restored_bit_for_bit(tmp_path):
    model, optimizer = trained(0)
    checkpoint.save_training_state(tmp_path / "c", model, optimizer, {"step": 3})
    other, other_optimizer = trained(1)
    assert load_training(tmp_path / "c", other, other_optimizer) == {"step": 3}
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other_optimizer.state_dict()["state"][i][name])


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_full_disk_keeps_the_previous_file(tmp_path, monkeypatch):
    checkpoint.write_atomic(tmp_path / "file", b"before")
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match="disk is full"):
        checkpoint.write_atomic(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["builtins.open", "os.fsync", "os.replace"])
def test_a_write_that_fails_anywhere_keeps_the_previous_file(tmp_path, monkeypatch, call):
    checkpoint.write_atomic(tmp_path / "file", b"before")
    with monkeypatch.context() as broken:
        broken.setattr(call, failing(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
            checkpoint.write_atomic(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_keeps_the_last_checkpoint_usable(tmp_path, monkeypatch):
    model, optimizer = trained(0)
    checkpoint.save_training_state(tmp_path / "c", model, optimizer, {"step": 3})
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(InputError, match="disk is full"):
            checkpoint.save_training_state(tmp_path / "c", *trained(1), {"step": 4})
    assert load_training(tmp_path / "c", *trained(2)) == {"step": 3}


def test_a_partial_file_left_by_a_kill_is_replaced(tmp_path):
    (tmp_path / "file.partial").write_bytes(b"half of some")
    checkpoint.write_atomic(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["file"]


def test_too_little_disk_space_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="MB left"):
        checkpoint.check_disk_space(tmp_path, 1 << 62)


@pytest.mark.parametrize("length", [0, 1, 8, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_one_sentence(tmp_path, length):
    model, optimizer = trained(0)
    path = tmp_path / "c"
    checkpoint.save_training_state(path, model, optimizer, {"step": 3})
    whole = path.read_bytes()
    path.write_bytes(whole[: length if isinstance(length, int) else int(length * len(whole))])
    with pytest.raises(InputError, match="not a complete checkpoint") as error:
        load_training(path, model, optimizer)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    (tmp_path / "c").write_text("a diary")
    with pytest.raises(InputError, match="not a complete checkpoint"):
        checkpoint.load_tensors(tmp_path / "c")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"minissl": "not json"}])
def test_a_safetensors_file_of_another_program_is_refused(tmp_path, metadata):
    save_file({"weight": torch.ones(2)}, tmp_path / "c", metadata=metadata)
    with pytest.raises(InputError, match="not a complete checkpoint of minissl"):
        checkpoint.load_tensors(tmp_path / "c")


def test_a_file_of_torch_save_is_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(InputError, match="not a complete checkpoint"):
        checkpoint.load_tensors(tmp_path / "c")


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "c").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(InputError, match="not a complete checkpoint"):
        checkpoint.load_tensors(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = trained(0)
    checkpoint.save_training_state(tmp_path / "c", model, optimizer, {"step": 3})
    other = nn.Linear(3, 3)
    with pytest.raises(InputError, match="another method or another encoder"):
        load_training(tmp_path / "c", other, torch.optim.AdamW(other.parameters()))


def test_an_encoder_is_built_from_the_header_of_its_file(tmp_path):
    encoder = create_encoder("nano", 8, 16, stem="conv")
    pretrained.save_encoder(encoder, tmp_path / "encoder.safetensors")
    loaded, images = pretrained.load_encoder(tmp_path), torch.randn(2, 3, 16, 16)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(images).cls, encoder.eval()(images).cls.detach())


def test_a_file_without_an_encoder_is_refused(tmp_path):
    checkpoint.save_tensors(tmp_path / "encoder.safetensors", tiny_vit().state_dict(), {})
    with pytest.raises(InputError, match="no encoder"):
        pretrained.load_encoder(tmp_path)
    with pytest.raises(InputError, match="no checkpoint"):
        pretrained.load_encoder(tmp_path / "nowhere")


def test_every_file_carries_the_format_version(tmp_path, monkeypatch):
    checkpoint.save_tensors(tmp_path / "c", {"a": torch.zeros(2)}, {"step": 1})
    assert b'format_version\\": 1' in (tmp_path / "c").read_bytes()
    assert checkpoint.load_tensors(tmp_path / "c")[1] == {"step": 1}
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    checkpoint.save_tensors(tmp_path / "c", {"a": torch.zeros(2)}, {"step": 1})
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 1)
    with pytest.raises(InputError, match=r"format version 2.*newer minissl"):
        checkpoint.load_tensors(tmp_path / "c")
