"""Others' weights load and give others' numbers; ours go into their formats and give the same numbers there."""

import itertools
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from minissl import official, pretrained
from minissl.__main__ import main, parse_run
from minissl.augment import MEAN, STD
from minissl.errors import InputError
from minissl.formats import export
from minissl.vit import ViT, vit


def shake(model):
    """Random weights everywhere, so that no factor is 0 and no bias is forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05 + (1.0 if "norm" in name or "ln_" in name else 0))
            if any(part in name for part in ("gamma", "lambda")):
                p.abs_().add_(0.1)
    return model.eval()


def as_clip(images):
    """Images of ImageNet's mean and deviation as CLIP wants them; the way is folded into our first layer."""
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in official.OF_CLIP)
    return torch.stack([(images[:, c] * STD[c] + MEAN[c]) for c in range(3)], dim=1).sub(mean) / deviation


def hugging_face(family):
    """(a model of two blocks, its registers, the size it was made for)"""
    import transformers as they

    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "attn_implementation": "eager"}
    if family == "dino":
        return they.ViTModel(they.ViTConfig(**sizes, intermediate_size=1536, image_size=64, patch_size=16,
                                            layer_norm_eps=1e-6), add_pooling_layer=False), 0, 64  # fmt: skip
    if family == "dinov2":
        return they.Dinov2Model(they.Dinov2Config(**sizes, image_size=70, patch_size=14)), 0, 70
    if family == "dinov2_reg":
        config = they.Dinov2WithRegistersConfig(**sizes, image_size=70, patch_size=14, num_register_tokens=4)
        return they.Dinov2WithRegistersModel(config), 4, 70
    if family == "dinov3":
        config = they.DINOv3ViTConfig(**sizes, intermediate_size=1536, image_size=64, num_register_tokens=4)
        return they.DINOv3ViTModel(config), 4, 64
    config = they.CLIPVisionConfig(**sizes, intermediate_size=1536, image_size=64, patch_size=16, projection_dim=24)
    return they.CLIPVisionModelWithProjection(config), 0, 64


FAMILIES = ("dino", "dinov2", "dinov2_reg", "dinov3", "clip")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_faces_file_loads_and_gives_the_same_numbers(tmp_path, family):
    """At two sizes, attention included. At other sizes DINO's own stretch of positions is another one than theirs."""
    model, registers, size = hugging_face(family)
    shake(model).save_pretrained(tmp_path)
    ours = pretrained.load(tmp_path / "model.safetensors")
    stretched = {"dino": (), "dinov2": (), "clip": ()}.get(family, (size + 2 * ours.patch_size,))
    for side in (size, *stretched):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            found = ours(images)
            right = model(as_clip(images) if family == "clip" else images, output_attentions=True)
        last = right.last_hidden_state
        if family == "clip":  # theirs is normed for the class token alone
            last = model.vision_model.post_layernorm(last) if hasattr(model, "vision_model") else last
        torch.testing.assert_close(found.cls, last[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.patches.flatten(1, 2), last[:, 1 + registers :], rtol=1e-4, atol=1e-5)
        attention = right.attentions[-1][:, :, 0, 1 + registers :]
        torch.testing.assert_close(ours.attention(images).flatten(2), attention, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "registers"),
    [
        ("vit_small_patch16_224.dino", 0),
        ("vit_small_patch14_dinov2", 0),
        ("vit_small_patch14_reg4_dinov2", 4),
        ("vit_small_patch16_dinov3", 4),
        ("vit_small_patch16_dinov3_qkvb", 4),
        ("vit_base_patch16_clip_quickgelu_224", 0),
    ],
)
def test_timms_file_loads_and_gives_the_same_numbers(tmp_path, name, registers):
    import timm

    size = 70 if "14" in name else 64
    model = shake(timm.create_model(name, depth=2, img_size=size, num_classes=0, dynamic_img_size=True))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours = pretrained.load(tmp_path / "model.safetensors")
    for side in (size, size + 2 * ours.patch_size) if registers else (size,):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            found, right = ours(images), model.forward_features(as_clip(images) if "clip" in name else images)
        torch.testing.assert_close(found.cls, right[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.patches.flatten(1, 2), right[:, 1 + registers :], rtol=1e-4, atol=1e-5)


def authors(family):
    """A state dict with the names of the authors' files, and the ViT it is of."""
    kinds = {"dino": {}, "dinov2": {"layer_scale": 1e-5}, "dinov2_reg": {"layer_scale": 1e-5, "registers": 4}}
    kinds["dinov3"] = {"layer_scale": 1e-5, "registers": 4, "positions": "rotary"}
    patch = 14 if "v2" in family else 16
    ours = shake(vit("small", patch, 4 * patch, depth=12, **kinds[family]))
    state = {name.replace("register", "storage" if family == "dinov3" else "register"): t
             for name, t in ours.state_dict().items()}  # fmt: skip
    if family == "dinov3":
        state["rope_embed.periods"] = torch.ones(16)
        for block, i in zip(ours.blocks, range(12)):
            keys = slice(384, 768)
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(1152)
            state[f"blocks.{i}.attn.qkv.bias_mask"][keys] = 0
            with torch.no_grad():
                block.attn.qkv.bias[keys] = 0
    return state | {"mask_token": torch.zeros(1, 384)}, ours


@pytest.mark.parametrize("family", FAMILIES[:4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_file_loads_by_its_name(tmp_path, family, wrapped):
    """As a hub has it, and as a training leaves it: the teacher's, beside its head."""
    state, right = authors(family)
    if wrapped:
        whole = {f"backbone.{name}": t for name, t in state.items()} | {"head.mlp.0.weight": torch.zeros(3, 3)}
        state = {"teacher": whole, "student": {"x": torch.zeros(1)}}
    torch.save(state, tmp_path / "weights.pth")
    name = {"dino": "dino_vits16", "dinov2": "dinov2_vits14", "dinov2_reg": "dinov2_vits14_reg"}.get(
        family, "dinov3_vits16"
    )
    found = pretrained.load(name, path=tmp_path / "weights.pth")
    images = torch.randn(1, 3, 6 * right.patch_size, 4 * right.patch_size)
    with torch.no_grad():
        for one, other in zip(found(images), right(images)):
            torch.testing.assert_close(one, other)
    assert not any(p.requires_grad for p in found.parameters())
    assert found.attention(images).shape == (1, 6, 6, 4)
    other = "dinov2_vitb14" if name != "dinov2_vitb14" else "dino_vits16"
    with pytest.raises(InputError, match=f"which is not {other}"):
        pretrained.load(other, path=tmp_path / "weights.pth")


def test_open_clips_file_is_read(tmp_path):
    """The towers of a whole CLIP lie side by side; only the images' is taken, the other in `test_official_text`."""
    import open_clip

    sizes = {"embed_dim": 24, "quick_gelu": True}
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    model = shake(open_clip.CLIP(**sizes, vision_cfg=vision, text_cfg=text))
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    ours = official.load(tmp_path / "clip.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, right = ours(images).cls @ model.visual.proj, model.visual(as_clip(images))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


KINDS = {
    "vit": {},
    "dinov2": {"layer_scale": 1e-5},
    "dinov2_with_registers": {"layer_scale": 1e-5, "registers": 4},
    "dinov3_vit": {"layer_scale": 1e-5, "registers": 4, "positions": "rotary"},
    "registers alone": {"registers": 2},
    "rotary alone": {"positions": "rotary"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_at_hugging_face_and_here(tmp_path, kind):
    from transformers import AutoModel

    ours = shake(ViT(128, 2, 2, 8, 32, **KINDS[kind]))
    export(ours, tmp_path / "out", "huggingface")
    theirs = AutoModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, right, back = ours(images), theirs(images).last_hidden_state, None
        back = pretrained.load(tmp_path / "out" / "model.safetensors")(images)
    torch.testing.assert_close(found.cls, right[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patches.flatten(1, 2), right[:, 1 + ours.registers :], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back.patches, found.patches)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_in_timm_and_here(tmp_path, kind):
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    ours = shake(ViT(128, 2, 2, 8, 32, **KINDS[kind]))
    rotary = ours.stretch is not None
    if rotary:
        with pytest.raises(InputError, match="keys' biases"):
            export(ours, tmp_path / "out.safetensors", "timm")
        with torch.no_grad():
            for block in ours.blocks:
                block.attn.qkv.bias[128:256] = 0
    export(ours, tmp_path / "out.safetensors", "timm")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
    if rotary:
        theirs = Eva(**shape, init_values=1e-5, num_reg_tokens=ours.registers, use_abs_pos_emb=False, qkv_bias=True,
                     use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100.0, rope_rotate_half=True,
                     no_embed_class=True, use_fc_norm=False, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
                     )  # fmt: skip
    else:
        scale = 1e-5 if "layer_scale" in KINDS[kind] else None
        theirs = VisionTransformer(**shape, init_values=scale, reg_tokens=ours.registers,
                                   no_embed_class=ours.registers > 0)  # fmt: skip
    from safetensors.torch import load_file

    theirs.load_state_dict(load_file(tmp_path / "out.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, right = ours(images), theirs.eval().forward_features(images)
        back = pretrained.load(tmp_path / "out.safetensors")(images)
    torch.testing.assert_close(found.cls, right[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patches.flatten(1, 2), right[:, 1 + ours.registers :], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back.patches, found.patches, rtol=1e-5, atol=1e-6)


class Bomb:
    """What a pickle may be."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_is_a_program_is_refused_and_does_not_run(tmp_path):
    torch.save({"cls_token": torch.zeros(1), "x": Bomb(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="left closed"):
        pretrained.load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_is_refused_too(tmp_path):
    """OpenAI's own files of CLIP are such programs."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(InputError, match="left closed"):
        pretrained.load(tmp_path / "clip.pt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "get it again"),
        (b"no such thing" * 50, "get it again"),
        (b"<!DOCTYPE html><html>404</html>", "get it again"),
        (b"\x80\x02.", "get it again"),
        (b"\x80\x02h\x05.", "get it again"),
        ({"a": torch.zeros(2)}, "first names are a"),
        ({"blocks.0.norm1.weight": torch.zeros(2)}, "first names are blocks"),  # of a block, not all
    ],
)
@pytest.mark.parametrize("end", [".pth", ".safetensors"])
def test_what_is_no_encoder_is_said(tmp_path, content, says, end):
    path = tmp_path / f"file{end}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path) if end == ".safetensors" else torch.save(content, path)
    with pytest.raises(InputError, match=says):
        official.load(path)


def test_a_name_without_a_file_says_where_to_get_it_and_its_licence():
    for name in official.NAMES:
        with pytest.raises(InputError, match=r"nothing is downloaded.*(Apache|MIT|licence)"):
            pretrained.load(name)
    with pytest.raises(InputError, match="There is no file"):
        pretrained.load("dino_vits16", path="nowhere.pth")
    for one, other in itertools.pairwise(official.NAMES):
        assert official.NAMES[one] != official.NAMES[other]


@pytest.mark.parametrize(("encoder", "says"), [
    (vit("nano", 8, 32, stem="conv"), "linear patches"), (vit("nano", 8, 32, gated=True), "gate"),
    (torch.nn.Linear(2, 2), "Only a ViT"),
])  # fmt: skip
def test_what_cannot_be_exported_is_said(tmp_path, encoder, says):
    with pytest.raises(InputError, match=says):
        export(encoder, tmp_path / "x", "timm")
    with pytest.raises(InputError, match="choose timm or huggingface"):
        export(vit("nano", 8, 32), tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_a_run_is_exported_by_a_command(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    choices = {"name": "nano", "patch_size": 8, "img_size": 32, "stem": "patch"}
    encoder = vit("nano", 8, 32)
    pretrained.save(encoder, choices, run / "encoder.safetensors")
    assert main(["export", str(run), str(tmp_path / "file.safetensors"), "--form", "timm"]) == 0
    assert "Written for timm" in capsys.readouterr().out
    found = pretrained.load(tmp_path / "file.safetensors").state_dict()
    assert all(torch.equal(t, found[name]) for name, t in encoder.state_dict().items())
    assert main(["export", str(run), str(tmp_path / "x"), "--form", "onnx"]) == 2


def test_training_goes_on_from_an_official_file(tmp_path):
    """By --encoder.weights, at another size of crops than the file's."""
    right = shake(vit("tiny", 16, 64, depth=2))
    torch.save(right.state_dict(), tmp_path / "weights.pth")
    asked = "dino --encoder.name tiny --encoder.patch_size 16 --encoder.stem patch --encoder.depth 2 --size 48 "
    run, _ = parse_run([*asked.split(), "--encoder.weights", str(tmp_path / "weights.pth")])
    found = run.build().student["encoder"].state_dict()
    assert found.pop("pos_embed").shape == (1, 10, 192)
    assert all(torch.equal(t, right.state_dict()[name]) for name, t in found.items())
