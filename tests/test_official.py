"""Official weights give the outputs of their own libraries; exported encoders give the same outputs elsewhere."""

import itertools
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from minissl.cli import main, parse_run
from minissl.data.transforms.functional import IMAGENET_MEAN, IMAGENET_STD
from minissl.errors import InputError
from minissl.hub import official, pretrained
from minissl.hub.export import export_encoder
from minissl.models.factory import create_encoder
from minissl.models.vit import ViT, vit


def randomize_weights(model):
    """Randomize all weights, so that no factor is 0 and no bias is missed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05 + (1.0 if "norm" in name or "ln_" in name else 0))
            if any(part in name for part in ("gamma", "lambda")):
                p.abs_().add_(0.1)
    return model.eval()


def to_clip_input(images):
    """Convert images from ImageNet's mean and standard deviation to CLIP's."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in official.CLIP_MEAN_STD)
    pixels = torch.stack([(images[:, c] * IMAGENET_STD[c] + IMAGENET_MEAN[c]) for c in range(3)], dim=1)
    return (pixels - mean) / std


def hugging_face(family):
    """Return a model of two blocks, its number of registers, and its image size."""
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "attn_implementation": "eager"}
    if family == "dino":
        config = transformers.ViTConfig(
            **sizes, intermediate_size=1536, image_size=64, patch_size=16, layer_norm_eps=1e-6
        )
        return transformers.ViTModel(config, add_pooling_layer=False), 0, 64
    if family == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=70, patch_size=14)), 0, 70
    if family == "dinov2_reg":
        config = transformers.Dinov2WithRegistersConfig(**sizes, image_size=70, patch_size=14, num_register_tokens=4)
        return transformers.Dinov2WithRegistersModel(config), 4, 70
    if family == "dinov3":
        config = transformers.DINOv3ViTConfig(**sizes, intermediate_size=1536, image_size=64, num_register_tokens=4)
        return transformers.DINOv3ViTModel(config), 4, 64
    sizes |= {"intermediate_size": 1536, "image_size": 64, "patch_size": 16, "projection_dim": 24}
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes)), 0, 64


FAMILIES = ("dino", "dinov2", "dinov2_reg", "dinov3", "clip")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_hugging_face_gives_its_outputs(tmp_path, family):
    """Attention included, and at two sizes where both interpolate position embeddings in the same way."""
    model, num_registers, size = hugging_face(family)
    randomize_weights(model).save_pretrained(tmp_path)
    encoder = pretrained.load_encoder(tmp_path / "model.safetensors")
    same_interpolation = family in ("dinov2_reg", "dinov3")
    for side in (size, size + 2 * encoder.patch_size) if same_interpolation else (size,):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            tokens = encoder(images)
            expected = model(to_clip_input(images) if family == "clip" else images, output_attentions=True)
        last = expected.last_hidden_state
        if family == "clip":  # transformers normalizes the class token only
            last = model.vision_model.post_layernorm(last) if hasattr(model, "vision_model") else last
        torch.testing.assert_close(tokens.cls, last[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens.patches.flatten(1, 2), last[:, 1 + num_registers :], rtol=1e-4, atol=1e-5)
        attention = expected.attentions[-1][:, :, 0, 1 + num_registers :]
        torch.testing.assert_close(encoder.attention(images).flatten(2), attention, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_registers"),
    [
        ("vit_small_patch16_224.dino", 0),
        ("vit_small_patch14_dinov2", 0),
        ("vit_small_patch14_reg4_dinov2", 4),
        ("vit_small_patch16_dinov3", 4),
        ("vit_small_patch16_dinov3_qkvb", 4),
        ("vit_base_patch16_clip_quickgelu_224", 0),
    ],
)
def test_a_file_of_timm_gives_its_outputs(tmp_path, name, num_registers):
    import timm

    size = 70 if "14" in name else 64
    model = timm.create_model(name, depth=2, img_size=size, num_classes=0, dynamic_img_size=True)
    save_file(randomize_weights(model).state_dict(), tmp_path / "model.safetensors")
    encoder = pretrained.load_encoder(tmp_path / "model.safetensors")
    for side in (size, size + 2 * encoder.patch_size) if num_registers else (size,):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            tokens = encoder(images)
            expected = model.forward_features(to_clip_input(images) if "clip" in name else images)
        torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 1 + num_registers :], rtol=1e-4, atol=1e-5)


AUTHORS_VITS = {
    "dino": ("dino_vits16", {}),
    "dinov2": ("dinov2_vits14", {"layer_scale_init": 1e-5}),
    "dinov2_reg": ("dinov2_vits14_reg", {"layer_scale_init": 1e-5, "num_registers": 4}),
    "dinov3": ("dinov3_vits16", {"layer_scale_init": 1e-5, "num_registers": 4, "pos_embed": "rope"}),
}


def authors_state(family):
    """Return a state dict by the names of the authors' files, and the ViT it belongs to."""
    patch_size = 14 if "v2" in family else 16
    encoder = randomize_weights(vit("small", patch_size, 4 * patch_size, **AUTHORS_VITS[family][1]))
    state = {
        name.replace("register", "storage" if family == "dinov3" else "register"): t
        for name, t in encoder.state_dict().items()
    }
    if family == "dinov3":
        state["rope_embed.periods"] = torch.ones(16)
        for i, block in enumerate(encoder.blocks):
            keys = slice(384, 768)
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(1152)
            state[f"blocks.{i}.attn.qkv.bias_mask"][keys] = 0
            with torch.no_grad():
                block.attn.qkv.bias[keys] = 0
    return state | {"mask_token": torch.zeros(1, 384)}, encoder


@pytest.mark.parametrize("family", AUTHORS_VITS)
@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_file_of_the_authors_loads_by_name(tmp_path, family, in_checkpoint):
    """The encoder alone, and the teacher's in the checkpoint of a training, beside its head."""
    state, expected = authors_state(family)
    if in_checkpoint:
        teacher = {f"backbone.{name}": t for name, t in state.items()} | {"head.mlp.0.weight": torch.zeros(3, 3)}
        state = {"teacher": teacher, "student": {"x": torch.zeros(1)}}
    torch.save(state, tmp_path / "weights.pth")
    encoder = pretrained.load_encoder(AUTHORS_VITS[family][0], path=tmp_path / "weights.pth")
    images = torch.randn(1, 3, 6 * expected.patch_size, 4 * expected.patch_size)
    with torch.no_grad():
        torch.testing.assert_close(tuple(encoder(images)), tuple(expected(images)))
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.attention(images).shape == (1, 6, 6, 4)
    with pytest.raises(InputError, match="not dinov2_vitb14"):
        pretrained.load_encoder("dinov2_vitb14", path=tmp_path / "weights.pth")


def test_the_image_encoder_of_a_file_of_open_clip_is_loaded(tmp_path):
    """The file holds both encoders; `test_openai_clip` loads the text encoder as well."""
    import open_clip

    sizes = {"embed_dim": 24, "quick_gelu": True}
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    model = randomize_weights(open_clip.CLIP(**sizes, vision_cfg=vision, text_cfg=text))
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    encoder = official.load_official(tmp_path / "clip.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embeddings, expected = encoder(images).cls @ model.visual.proj, model.visual(to_clip_input(images))
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)


EXPORTED_VITS = {
    "vit": {},
    "dinov2": {"layer_scale_init": 1e-5},
    "dinov2_with_registers": {"layer_scale_init": 1e-5, "num_registers": 4},
    "dinov3_vit": {"layer_scale_init": 1e-5, "num_registers": 4, "pos_embed": "rope"},
    "registers only": {"num_registers": 2},
    "rope only": {"pos_embed": "rope"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTED_VITS)
def test_an_export_to_hugging_face_gives_the_same_outputs(tmp_path, kind):
    from transformers import AutoModel

    encoder = randomize_weights(ViT(128, 2, 2, 8, 32, **EXPORTED_VITS[kind]))
    export_encoder(encoder, tmp_path / "out", "huggingface")
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, expected = encoder(images), model(images).last_hidden_state
        reloaded = pretrained.load_encoder(tmp_path / "out" / "model.safetensors")(images)
    first_patch = 1 + encoder.num_registers
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, first_patch:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reloaded.patches, tokens.patches)


def timm_model(encoder, options):
    """Build the model of timm that an exported encoder fits into."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
    if options.get("pos_embed") == "rope":
        return Eva(**shape, init_values=1e-5, num_reg_tokens=encoder.num_registers, use_abs_pos_emb=False,
                   qkv_bias=True, use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100.0,
                   rope_rotate_half=True, no_embed_class=True, use_fc_norm=False,
                   norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))  # fmt: skip
    return VisionTransformer(**shape, init_values=options.get("layer_scale_init"), reg_tokens=encoder.num_registers,
                             no_embed_class=encoder.num_registers > 0)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTED_VITS)
def test_an_export_to_timm_gives_the_same_outputs(tmp_path, kind):
    encoder = randomize_weights(ViT(128, 2, 2, 8, 32, **EXPORTED_VITS[kind]))
    if encoder.pos_embed is None:
        with pytest.raises(InputError, match="huggingface"):  # timm has no biases of the keys
            export_encoder(encoder, tmp_path / "out.safetensors", "timm")
        with torch.no_grad():
            for block in encoder.blocks:
                block.attn.qkv.bias[128:256] = 0
    export_encoder(encoder, tmp_path / "out.safetensors", "timm")
    model = timm_model(encoder, EXPORTED_VITS[kind])
    model.load_state_dict(load_file(tmp_path / "out.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, expected = encoder(images), model.eval().forward_features(images)
        reloaded = pretrained.load_encoder(tmp_path / "out.safetensors")(images)
    first_patch = 1 + encoder.num_registers
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, first_patch:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reloaded.patches, tokens.patches, rtol=1e-5, atol=1e-6)


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    torch.save({"cls_token": torch.zeros(1), "x": Bomb(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="more than tensors"):
        pretrained.load_encoder(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    """OpenAI's own files of CLIP are in this format."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(InputError, match="more than tensors"):
        pretrained.load_encoder(tmp_path / "clip.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no such thing" * 50,
        b"<!DOCTYPE html><html>404</html>",
        b"\x80\x02.",
        b"\x80\x02h\x05.",
        {"a": torch.zeros(2)},
        {"blocks.0.norm1.weight": torch.zeros(2)},  # a block, without the rest
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_without_an_encoder_raises(tmp_path, content, suffix):
    path = tmp_path / f"file{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    with pytest.raises(InputError, match=f"file{suffix}"):
        official.load_official(path)


def test_a_name_without_a_file_raises_with_source_and_license():
    for name in official.OFFICIAL_ENCODERS:
        with pytest.raises(InputError, match=r"(Apache|MIT|license).*load_encoder.*path=FILE"):
            pretrained.load_encoder(name)
    with pytest.raises(InputError, match="There is no file"):
        pretrained.load_encoder("dino_vits16", path="nowhere.pth")
    for first, second in itertools.pairwise(official.OFFICIAL_ENCODERS):
        assert official.OFFICIAL_ENCODERS[first] != official.OFFICIAL_ENCODERS[second]


@pytest.mark.parametrize("options", [{"stem": "conv"}, {"swiglu": True}, {"pos_embed": "none"}, {"clip": True}])
@pytest.mark.parametrize("form", ["timm", "huggingface"])
def test_an_encoder_that_a_format_cannot_represent_raises(tmp_path, options, form):
    with pytest.raises(InputError):
        export_encoder(vit("nano", 8, 32, **options), tmp_path / "x", form)
    assert not (tmp_path / "x").exists()


def test_unknown_formats_and_other_encoders_are_not_exported(tmp_path):
    with pytest.raises(InputError, match="ViT"):
        export_encoder(create_encoder("cnn"), tmp_path / "x", "timm")
    with pytest.raises(InputError, match="choose timm or huggingface"):
        export_encoder(vit("nano", 8, 32), tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_a_run_is_exported_by_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    encoder = create_encoder("nano", 8, 32)
    pretrained.save_encoder(encoder, run / "encoder.safetensors")
    assert main(["export", str(run), str(tmp_path / "file.safetensors"), "--form", "timm"]) == 0
    assert str(tmp_path / "file.safetensors") in capsys.readouterr().out
    state = pretrained.load_encoder(tmp_path / "file.safetensors").state_dict()
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())
    assert main(["export", str(run), str(tmp_path / "x"), "--form", "onnx"]) == 2


def test_a_run_starts_from_an_official_file(tmp_path):
    """By --encoder.weights, with another crop size than the file's."""
    expected = randomize_weights(vit("tiny", 16, 64, depth=2)).state_dict()
    torch.save(expected, tmp_path / "weights.pth")
    args = "dino --encoder.name tiny --encoder.patch_size 16 --encoder.stem patch --encoder.depth 2 --crop_size 48"
    run, _ = parse_run([*args.split(), "--encoder.weights", str(tmp_path / "weights.pth")])
    state = run.build().student["encoder"].state_dict()
    assert state.pop("pos_embed").shape == (1, 10, 192)
    assert all(torch.equal(t, expected[name]) for name, t in state.items())
