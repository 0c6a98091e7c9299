"""Every encoder is built by name and keeps one interface, those around other libraries' networks included."""

import importlib

import pytest
import torch
from torch import nn

from minissl.errors import InputError
from minissl.evaluation import extract_features
from minissl.models.ema import EMATeacher
from minissl.models.factory import PixelEncoder, create_encoder, list_encoders, wrap_encoder
from minissl.models.outputs import Encoder, Tokens
from minissl.models.wrappers import TimmEncoder

NAMES = ["nano", "vit_tiny", "cnn", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)]


def check_interface(encoder, image_size):
    """Check the shapes that `Encoder` promises, for square and other images."""
    p = encoder.patch_size
    for height, width in ((image_size, image_size), (image_size, image_size + p)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            tokens = encoder.eval()(images)
            cls = encoder.cls_tokens(images)
        assert isinstance(tokens, Tokens)
        assert tokens.cls.shape == (2, encoder.embed_dim)
        assert tokens.patches.shape == (2, height // p, width // p, encoder.embed_dim)
        torch.testing.assert_close(cls, tokens.cls, rtol=1e-4, atol=1e-5)
        maps = encoder.attention(images)
        assert maps.shape[2:] == tokens.patches.shape[1:3]
        assert (maps.sum((-2, -1)) <= 1 + 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
def test_encoders_have_one_interface(name):
    check_interface(create_encoder(name, 16, 64), 64)


@pytest.mark.slow
def test_a_resnet_of_large_images_has_patches_of_32_pixels():
    encoder = create_encoder("resnet18", image_size=96)
    assert encoder.patch_size == 32
    check_interface(encoder, 96)


def test_pixels_are_an_encoder():
    encoder, images = PixelEncoder(4), torch.randn(2, 3, 8, 12)
    check_interface(encoder, 8)
    assert encoder(images).patches.shape == (2, 2, 3, 48)
    torch.testing.assert_close(encoder(images).patches[1, 1, 2].view(4, 4, 3), images[1, :, 4:, 8:].permute(1, 2, 0))


def test_all_names_are_listed():
    assert list_encoders() == ["nano", "tiny", "small", "base", "large", "cnn", "resnet18", "resnet50"]


def test_a_config_builds_the_encoder_again():
    options = {
        "depth": 2,
        "stem": "conv",
        "pos_embed": "rope",
        "rope_augmentation": (0.0, 1.0, 2.0),
        "num_registers": 2,
    }
    encoder = create_encoder("nano", 8, 32, **options, layer_scale_init=1e-5, init_std=0.1, drop_path=0.1)
    copy = create_encoder(**encoder.config)
    assert encoder.config["weights"] == "none"
    assert encoder.config["depth"] == 2
    assert copy.config == encoder.config
    copy.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(copy.eval()(images).cls, encoder.eval()(images).cls)
    assert EMATeacher(encoder).network.config == encoder.config


@pytest.mark.parametrize(("name", "near"), [("smal", "small"), ("resnet19", "resnet18"), ("vit_bas", "vit_base")])
def test_an_unknown_name_gets_a_suggestion(name, near):
    with pytest.raises(InputError, match=rf"{name}.*did you mean '{near}'"):
        create_encoder(name)


def test_weights_that_do_not_exist_raise():
    with pytest.raises(InputError, match="load_encoder"):
        create_encoder("nano", 8, 32, weights="runs/a")
    with pytest.raises(InputError, match=r"--encoder\.name"):
        create_encoder("nano", 8, 32, weights="imagenet")


def test_weights_that_cannot_be_downloaded_raise(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(InputError, match=r"--encoder\.weights"):
        create_encoder("resnet18", weights="imagenet")


class Features(nn.Module):
    """A network that returns a fixed kind of output."""

    def __init__(self, output):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)
        self.norm = nn.BatchNorm2d(6)
        self.output = output

    def forward(self, images):
        return self.output(self.norm(self.conv(images)))


def as_tokens(x):
    return Tokens(x.amax((2, 3)), x.permute(0, 2, 3, 1))


@pytest.mark.parametrize(("output", "patch_size"), [(lambda x: x, 4), (as_tokens, 4), (lambda x: x.mean((2, 3)), 32)])
def test_wrapped_networks_have_the_interface(output, patch_size):
    network = Features(output)
    encoder = wrap_encoder(network, image_size=32)
    assert isinstance(encoder, Encoder)
    assert (encoder.embed_dim, encoder.patch_size, encoder.config) == (6, patch_size, None)
    assert network.training
    assert network.norm.num_batches_tracked == 0  # the trial pass changes nothing
    images = torch.randn(2, 3, 32, 32)
    tokens = encoder.eval()(images)
    assert tokens.patches.shape == (2, 32 // patch_size, 32 // patch_size, 6)
    reference = network(images)
    cls = (
        reference.cls
        if isinstance(reference, Tokens)
        else reference.flatten(2).mean(-1)
        if reference.ndim == 4
        else reference
    )
    torch.testing.assert_close(tokens.cls, cls)
    assert encoder.attention(images).shape == (2, 1, 32 // patch_size, 32 // patch_size)


def test_wrapping_an_encoder_returns_it():
    encoder = create_encoder("nano", 8, 32)
    assert wrap_encoder(encoder) is encoder


@pytest.mark.parametrize("output", [lambda x: x.flatten(2), lambda x: (x, x), lambda x: {"x": x}])
def test_wrapping_a_network_with_another_output_raises(output):
    with pytest.raises(InputError, match="vectors"):
        wrap_encoder(Features(output), image_size=32)


def test_wrapping_a_network_of_another_width_raises():
    assert wrap_encoder(Features(lambda x: x), 32, embed_dim=6).embed_dim == 6
    with pytest.raises(InputError, match="width 6, not 8"):
        wrap_encoder(Features(lambda x: x), 32, embed_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize(("pooled", "patch_size"), [(True, 64), (False, 32)])
def test_a_wrapped_resnet50_of_torchvision_extracts_features(pooled, patch_size):
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None)
    network.fc = nn.Identity()
    if not pooled:
        network = nn.Sequential(*list(network.children())[:-2])
    encoder = wrap_encoder(network, image_size=64)
    assert (encoder.embed_dim, encoder.patch_size) == (2048, patch_size)
    tokens = encoder.eval()(torch.randn(2, 3, 64, 64))
    assert tokens.patches.shape == (2, 64 // patch_size, 64 // patch_size, 2048)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    assert extract_features(encoder, images).shape == (3, 2048)
    assert extract_features(encoder, images, pooling="both").shape == (3, 4096)


def test_timms_resnet18_extracts_features_and_equals_timm():
    import timm

    torch.manual_seed(0)
    encoder = create_encoder("timm:resnet18", image_size=64)
    assert (encoder.embed_dim, encoder.patch_size, encoder.config["name"]) == (512, 32, "timm:resnet18")
    check_interface(encoder, 64)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    assert extract_features(encoder, images).shape == (3, 512)
    reference = timm.create_model("resnet18", num_classes=0).eval()
    reference.load_state_dict(encoder.network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images).cls, reference(images))  # timm's global average pooling


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size", "width", "patch_size"),
    [
        ("vit_tiny_patch16_224", 64, 192, 16),  # class token
        ("vit_small_patch14_reg4_dinov2", 56, 384, 14),  # class token and registers
        ("vit_pwee_patch16_reg1_gap_256", 64, 256, 16),  # a register and no class token
        ("swin_tiny_patch4_window7_224", 64, 768, 32),  # feature map (B, h, w, D)
        ("convnext_atto", 64, 320, 32),  # feature map (B, D, h, w)
    ],
)
def test_timms_models_have_the_interface(name, image_size, width, patch_size):
    encoder = create_encoder(f"timm:{name}", image_size=image_size)
    assert (encoder.embed_dim, encoder.patch_size) == (width, patch_size)
    check_interface(encoder, image_size)


@pytest.mark.slow
def test_timms_tokens_are_the_class_token_and_the_patches():
    encoder = create_encoder("timm:vit_small_patch14_reg4_dinov2", image_size=56).eval()
    images = torch.randn(2, 3, 56, 28)
    with torch.no_grad():
        tokens, sequence = encoder(images), encoder.network.forward_features(images)
    assert torch.equal(tokens.cls, sequence[:, 0])
    assert torch.equal(tokens.patches.flatten(1, 2), sequence[:, 5:])


def test_timms_own_normalization_replaces_that_of_imagenet():
    """Images with values in [-1, 1], as this model was trained on, give the same output as timm's own input."""
    encoder = TimmEncoder("vit_tiny_patch16_224", 32).eval()
    assert encoder.network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        cls, expected = encoder((pixels - mean) / std).cls, encoder.network.forward_features(pixels * 2 - 1)[:, 0]
    torch.testing.assert_close(cls, expected, rtol=1e-4, atol=1e-5)
    assert not any(name in ("scale", "shift") for name in encoder.state_dict())


def test_an_unknown_timm_name_raises():
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        create_encoder("timm:resnet_18")
    with pytest.raises(InputError, match="no model"):
        create_encoder("timm:hf-hub:somebody/model")  # would be downloaded


def test_an_image_size_that_timm_rejects_raises():
    encoder = create_encoder("timm:mixer_s32_224")
    with pytest.raises(InputError, match="224"):
        encoder(torch.randn(1, 3, 64, 64))


def test_timm_is_optional(monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(InputError, match="pip install timm"):
        create_encoder("timm:resnet18")
