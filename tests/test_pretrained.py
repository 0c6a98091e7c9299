"""Encoders and methods are saved and loaded: shipped checkpoints, exported files, timm's models."""

import pytest
import torch
from safetensors.torch import save_file

from minissl.data.batch import Batch
from minissl.errors import InputError
from minissl.hub import pretrained
from minissl.methods.registry import create_method
from minissl.models.factory import create_encoder
from minissl.models.vit import vit
from minissl.training import checkpoint
from tests.golden import tiny_vit

SHIPPED = sorted(pretrained.CHECKPOINT_DIR.glob("*.safetensors"))
SMALL_DINO = {"crop_size": 16, "num_local_crops": 0, "num_prototypes": 8, "hidden_dim": 8, "bottleneck_dim": 4}


def small_dino():
    torch.manual_seed(0)
    return create_method("dino", create_encoder("nano", 8, 16), **SMALL_DINO)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_checkpoint_loads_by_name(path):
    encoder = pretrained.load_encoder(f"scenes/{path.stem}")
    _, info = checkpoint.load_tensors(path)
    size = info["encoder"]["image_size"]
    with torch.no_grad():
        maps = encoder.attention(torch.zeros(1, 3, size, size))
    assert maps.sum((-2, -1)).max() <= 1 + 1e-4
    assert encoder(torch.zeros(1, 3, size, size)).cls.isfinite().all()
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("from_folder", [True, False])
def test_a_saved_encoder_is_loaded(tmp_path, from_folder):
    encoder, path = create_encoder("nano", 8, 16, stem="conv"), tmp_path / "encoder.safetensors"
    pretrained.save_encoder(encoder, path)
    loaded, images = pretrained.load_encoder(tmp_path if from_folder else path), torch.randn(2, 3, 16, 16)
    assert loaded.config == encoder.config
    assert torch.equal(loaded(images).cls, encoder.eval()(images).cls)


def test_an_encoder_without_config_needs_one(tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(InputError, match="create_encoder"):
        pretrained.save_encoder(vit("nano", 8, 16), path)
    assert not path.exists()
    pretrained.save_encoder(vit("nano", 8, 16), path, {"name": "nano", "patch_size": 8, "image_size": 16})
    assert pretrained.load_encoder(path).patch_size == 8


def test_a_saved_method_is_loaded_in_half_precision(tmp_path):
    method, path = small_dino(), tmp_path / "dino.safetensors"
    pretrained.save_method(method, path)
    loaded = pretrained.load_method(path)
    assert loaded.config["name"] == "dino"
    assert loaded.config["options"]["num_prototypes"] == 8
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        expected = method.state_dict()[name]
        assert torch.equal(value, expected.half().float() if expected.is_floating_point() else expected), name
    encoder, images = pretrained.load_encoder(path), torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder(images).cls, loaded.encoder(images).cls)


def test_files_carry_a_format_version_and_newer_ones_raise(tmp_path, monkeypatch):
    path = tmp_path / "encoder.safetensors"
    pretrained.save_encoder(create_encoder("nano", 8, 16), path)
    pretrained.load_encoder(path)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION - 1)
    with pytest.raises(InputError, match="version"):
        pretrained.load_encoder(path)


OWN_METHOD = """
from pathlib import Path
import torch
from minissl.methods.base import Method
Path(__file__).with_name("executed").touch()

class Own(Method):
    def __init__(self, encoder):
        super().__init__()
        self.network = encoder
    encoder = property(lambda self: self.network)
    def loss(self, batch, progress):
        return {"loss": self.network(batch.images / 255).cls.square().mean()}
"""


def test_the_path_of_a_python_file_in_a_header_is_not_executed(tmp_path):
    (tmp_path / "own.py").write_text(OWN_METHOD)
    encoder, path = create_encoder("nano", 8, 16), tmp_path / "x.safetensors"
    info = {"method": str(tmp_path / "own.py"), "options": {}, "encoder": encoder.config}
    checkpoint.save_tensors(path, encoder.state_dict(), info)
    for load in (pretrained.load_method, pretrained.load_encoder):
        with pytest.raises(InputError, match=r"own\.py"):
            load(path)
    assert not (tmp_path / "executed").exists()


def test_a_method_of_ones_own_is_not_saved(tmp_path):
    (tmp_path / "own.py").write_text(OWN_METHOD)
    method = create_method(str(tmp_path / "own.py"), create_encoder("nano", 8, 16))
    assert method.loss(Batch(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), 0.0)["loss"].isfinite()
    with pytest.raises(InputError, match="save_encoder"):
        pretrained.save_method(method, tmp_path / "own.safetensors")
    pretrained.save_encoder(method.encoder, tmp_path / "encoder.safetensors")
    assert pretrained.load_encoder(tmp_path).embed_dim == 128


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "holds no encoder"),
        ({"encoder": {"name": "nano", "patch_size": 8, "image_size": 16, "unknown": 1}}, "unknown"),
        ({"encoder": {"name": "unknown_name"}}, "unknown_name"),
        ({"encoder": {"name": "timm:hf-hub:somebody/model"}}, "timm has no model"),
        ({"encoder": {"name": "nano", "patch_size": 8, "image_size": 16}}, "do not fit"),
        ({"encoder": {"name": "custom", "class": "mine.Net", "image_size": 16}}, r"mine\.Net"),
        ({"method": "dino", "options": {"unknown": 1}, "encoder": {"name": "nano"}}, "unknown"),
    ],
)
def test_a_header_that_builds_no_encoder_raises(tmp_path, info, message):
    checkpoint.save_tensors(tmp_path / "encoder.safetensors", tiny_vit().state_dict(), info)
    with pytest.raises(InputError, match=message):
        pretrained.load_encoder(tmp_path)


def test_unknown_names_raise_with_a_suggestion(tmp_path):
    with pytest.raises(InputError, match=r"did you mean 'scenes/dino'"):
        pretrained.load_encoder("scenes/dinos")
    with pytest.raises(InputError, match=r"did you mean 'dinov2_vits14_reg'"):
        pretrained.load_encoder("dinov2_vits14_regs")
    with pytest.raises(InputError, match="nowhere"):
        pretrained.load_encoder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="path"):
        pretrained.load_encoder("scenes/dino", path="weights.pth")
    pretrained.save_encoder(create_encoder("nano", 8, 16), tmp_path / "encoder.safetensors")
    with pytest.raises(InputError, match="holds no method"):
        pretrained.load_method(tmp_path)


def test_weights_of_another_grid_are_resampled(tmp_path):
    pretrained.save_encoder(create_encoder("nano", 8, 16), tmp_path / "encoder.safetensors")
    state = pretrained.load_encoder(tmp_path).state_dict()
    encoder = create_encoder("nano", 8, 32)
    pretrained.load_weights(encoder, tmp_path)
    assert encoder.pos_embed.shape == (1, 17, 128)
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items() if name != "pos_embed")
    with pytest.raises(InputError, match="--encoder"):
        pretrained.load_weights(create_encoder("cnn"), tmp_path)


def test_a_timm_model_loads_from_a_file_of_timm(tmp_path):
    import timm

    model = timm.create_model("resnet18").eval()  # with a classifier
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = pretrained.load_encoder("timm:resnet18", path=tmp_path / "model.safetensors")
    assert (encoder.config["image_size"], encoder.config["weights"], encoder.training) == (224, "none", False)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images).cls, model.forward_head(model.forward_features(images), pre_logits=True))
    pretrained.save_encoder(encoder, tmp_path / "encoder.safetensors")
    assert torch.equal(pretrained.load_encoder(tmp_path)(images).cls, encoder(images).cls)
    with pytest.raises(InputError, match="lacks"):
        pretrained.load_encoder("timm:resnet34", path=tmp_path / "model.safetensors")


def test_a_failed_download_of_timm_raises(monkeypatch):
    import timm

    def fail(name, pretrained, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(InputError, match="no network"):
        pretrained.load_encoder("timm:resnet18")
