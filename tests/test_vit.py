"""The ViT equals timm's and transformers' with copied weights, and has the parameter names and positions of DINO."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minissl.errors import InputError
from minissl.models.ema import EMATeacher
from minissl.models.layers import DropPath, attention
from minissl.models.outputs import Tokens
from minissl.models.vit import ViT, vit
from tests.golden import tiny_vit, wave

DINO_NAMES = {
    "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
    *(f"blocks.{i}.{name}.{kind}" for i in range(2) for kind in ("weight", "bias")
      for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
}  # fmt: skip


def timm_copy(encoder):
    """Build timm's VisionTransformer with the weights of `tiny_vit`."""
    from timm.models.vision_transformer import VisionTransformer

    reference = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    reference.load_state_dict(encoder.state_dict())
    return reference


def test_parameter_names_are_those_of_dino():
    assert set(tiny_vit().state_dict()) == DINO_NAMES


@pytest.mark.slow
def test_forward_and_backward_equal_timm():
    torch.manual_seed(0)
    encoder = tiny_vit().double()
    reference = timm_copy(encoder).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens, expected = encoder(images), reference.forward_features(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 1:], rtol=1e-10, atol=1e-10)
    (tokens.cls.square().sum() + tokens.patches.sin().sum()).backward()
    (expected[:, 0].square().sum() + expected[:, 1:].sin().sum()).backward()
    reference_parameters = dict(reference.named_parameters())
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, reference_parameters[name].grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.slow
def test_forward_equals_transformers():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    encoder = tiny_vit()
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                       image_size=16, patch_size=4, layer_norm_eps=1e-6)  # fmt: skip
    reference = ViTModel(config, add_pooling_layer=False).eval()
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}  # fmt: skip
    state, reference_state = {}, reference.state_dict()
    for name, value in encoder.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if name in names or stem in names:
            state[names[name] if name in names else f"{names[stem]}.{kind}"] = value
            continue
        _, i, *part = stem.split(".")
        state |= rename_block_parameter(reference_state, int(i), ".".join(part), kind, value)
    reference.load_state_dict(state)
    images = torch.randn(3, 3, 16, 16)
    expected = reference(images).last_hidden_state
    tokens = encoder(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 1:], rtol=1e-5, atol=1e-5)


def rename_block_parameter(reference_state, i, part, kind, value):
    """Return a parameter of block i by the names of transformers, which differ between its versions."""
    names = [name for name in reference_state if f"layer.{i}." in name or f"layers.{i}." in name]
    if part == "attn.qkv":
        keys = [[n for n in names if any(f"{w}.{kind}" in n for w in (full, short))]
                for full, short in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))]  # fmt: skip
        return {name: piece for (name,), piece in zip(keys, value.chunk(3))}
    synonyms = {"norm1": ("layernorm_before",), "norm2": ("layernorm_after",),
                "attn.proj": ("attention.output.dense", "o_proj", "out_proj"),
                "mlp.fc1": ("intermediate.dense", "fc1"), "mlp.fc2": ("output.dense", "fc2")}  # fmt: skip
    matches = [n for n in names if n.endswith(kind) and any(word in n for word in synonyms[part])]
    if part == "mlp.fc2":
        matches = [n for n in matches if "attention" not in n]
    (name,) = matches
    return {name: value}


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, [0.09102, 0.42134, -0.77079, 0.42508]), (6, [-0.00603, 0.58688, 1.05354, 0.71875])],
)
def test_position_embeddings_are_interpolated_as_in_dino(size, expected):
    encoder = tiny_vit()
    with torch.no_grad():
        encoder.pos_embed[:, 1:] = wave(16, c=1.3).float().view(1, 16, 1)
    positions = encoder.interpolate_pos_embed(size, size)
    torch.testing.assert_close(positions[0, 1:5, 0], torch.tensor(expected), rtol=0, atol=2e-5)
    torch.testing.assert_close(positions[:, :1], encoder.pos_embed[:, :1])


def test_the_grid_follows_the_image_size():
    tokens = tiny_vit()(torch.randn(2, 3, 24, 12))
    assert isinstance(tokens, Tokens)
    assert tokens.cls.shape == (2, 32)
    assert tokens.patches.shape == (2, 6, 3, 32)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_patch_embeddings_lie_where_the_pixels_are(stem):
    """A change of the lower left corner of an image changes the patch embeddings there most."""
    encoder = tiny_vit(stem=stem).eval()
    images = torch.zeros(1, 3, 16, 16)
    changed = images.clone()
    changed[..., 12:, :4] = 3
    difference = (encoder.patch_embed(changed) - encoder.patch_embed(images)).norm(dim=-1)[0]
    assert difference[2:, :2].sum() > 0.5 * difference.sum()  # all of it for the linear stem; convolutions see further


@pytest.mark.slow
def test_attention_equals_the_class_tokens_row_of_timms_softmax():
    torch.manual_seed(0)
    encoder = tiny_vit()
    reference = timm_copy(encoder).eval()
    images, captured = torch.randn(2, 3, 16, 16), {}
    attn = reference.blocks[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: captured.update(weights=inputs[0]))
    reference.forward_features(images)
    maps = encoder.attention(images)
    assert maps.shape == (2, 4, 4, 4)
    torch.testing.assert_close(maps.flatten(2), captured["weights"][:, :, 0, 1:], rtol=1e-5, atol=1e-6)


def attention_of_all_blocks(encoder, images):
    """Compute the class token's attention in every block, (blocks, B, heads, N), token by token and head by head."""
    x, _ = encoder.prepare_tokens(images)
    maps = []
    for block in encoder.blocks:
        normed, heads, width = block.norm1(x), block.attn.num_heads, x.shape[-1]
        q, k, _ = (normed @ w.mT + b for w, b in zip(*(p.split(width) for p in block.attn.qkv.parameters())))
        pairs = zip(q.split(width // heads, -1), k.split(width // heads, -1))
        logits = [torch.stack([(q[:, 0] * k[:, t]).sum(-1) for t in range(x.shape[1])], -1) for q, k in pairs]
        weights = [(head / math.sqrt(width // heads)).exp() for head in logits]
        maps.append(torch.stack([w[:, 1:] / w.sum(-1, keepdim=True) for w in weights], 1))
        x = block(x)
    return torch.stack(maps)


def test_attention_of_every_block_equals_a_loop():
    torch.manual_seed(0)
    encoder, images = vit("nano", 8, 32, depth=3, stem="conv", init_std=0.2).eval(), torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        expected = attention_of_all_blocks(encoder, images)
    for layer in range(-3, 3):
        maps = encoder.attention(images, layer)
        assert maps.shape == (2, 4, 4, 2)
        torch.testing.assert_close(maps.flatten(2), expected[layer], rtol=1e-4, atol=1e-6)
    assert torch.equal(encoder.attention(images), encoder.attention(images, layer=2))
    assert not torch.allclose(expected[0], expected[2], atol=1e-2)


@pytest.mark.parametrize("layer", [2, -3])
def test_attention_of_an_unknown_block_raises(layer):
    with pytest.raises(InputError, match=f"{layer}"):
        tiny_vit().attention(torch.zeros(1, 3, 16, 16), layer)


def test_depth_overrides_that_of_the_name():
    assert [len(vit("nano", 8, 32, depth=depth).blocks) for depth in (0, 1, 3)] == [1, 1, 3]
    with pytest.raises(InputError, match="-1"):
        vit("nano", 8, 32, depth=-1)


def test_unfused_attention_equals_the_fused_kernel():
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    output, expected = attention(*qkv), F.scaled_dot_product_attention(*qkv)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(output.sin().sum(), qkv), torch.autograd.grad(expected.sin().sum(), qkv)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_a_long_sequence_equals_the_formula(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 8, dtype=torch.float64)
    weights = q @ k.mT / 8**0.5
    if causal:
        weights += torch.full((300, 300), -torch.inf, dtype=torch.float64).triu(1)
    torch.testing.assert_close(attention(q, k, v, causal), weights.softmax(dim=-1) @ v, rtol=1e-10, atol=1e-12)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 1, 3)
    y = drop(x)
    assert {round(v, 4) for v in y.flatten().tolist()} == {0.0, round(1 / 0.75, 4)}
    assert (y[:, 0, :1] == y[:, 0]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_rises_with_depth():
    rates = [block.drop_path.rate for block in vit("tiny", 16, 32, drop_path=0.11).blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize("arguments", [("huge", 16, 224), ("tiny", 16, 100), ("tiny", 16, 8), ("tiny", 0, 32)])
def test_invalid_sizes_raise(arguments):
    with pytest.raises(InputError):
        vit(*arguments)


def test_images_that_patches_do_not_divide_raise():
    with pytest.raises(InputError, match="15 x 16"):
        tiny_vit()(torch.zeros(1, 3, 15, 16))
    with pytest.raises(InputError, match=r"--encoder\.stem"):
        vit("nano", 6, 12, stem="conv")


@pytest.mark.slow
def test_the_form_of_clip_equals_transformers():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPVisionConfig(**sizes, image_size=16, patch_size=4, projection_dim=24, hidden_act="quick_gelu")
    reference = CLIPVisionModelWithProjection(config).eval().double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = ViT(32, 2, 4, 4, 16, clip=True).eval().double()
    state = {name.removeprefix("vision_model."): value for name, value in reference.state_dict().items()}
    names = {
        "patch_embed.proj": "embeddings.patch_embedding", "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight", "norm_pre": "pre_layrnorm", "norm1": "layer_norm1",
        "norm2": "layer_norm2", "blocks": "encoder.layers", "attn.proj": "self_attn.out_proj",
    }  # fmt: skip
    for name, value in encoder.state_dict().items():
        if name == "patch_embed.proj.bias":
            value.zero_()  # CLIP has none
            continue
        for own, other in names.items():
            name = name.replace(own, other)
        name = name.replace("norm.", "post_layernorm.") if name.startswith("norm.") else name
        parts = [name.replace("attn.qkv", f"self_attn.{part}_proj") for part in "qkv"] if "qkv" in name else [name]
        value.copy_(torch.cat([state.pop(part) for part in parts]).view_as(value))
    projection = state.pop("visual_projection.weight")
    assert not [name for name in state if not name.endswith("position_ids")]
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        embeddings, expected = encoder(images).cls @ projection.mT, reference(pixel_values=images).image_embeds
    torch.testing.assert_close(embeddings, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_a_patch_of_the_conv_stem_is_centered_on_itself(patch_size):
    """The center of the gradient with respect to the pixels is that of the patch."""
    torch.manual_seed(0)
    side, offsets = 6 * patch_size, []
    embed = vit("nano", patch_size, side, stem="conv").patch_embed.eval()
    for _ in range(8):
        images = torch.rand(1, 3, side, side, requires_grad=True)
        (embed(images)[0, 2, 3] * torch.randn(128)).sum().backward()
        weight = images.grad.abs().sum((0, 1))  # (side, side)
        pixels = torch.arange(side) + 0.5
        y, x = (weight.sum(1) * pixels).sum() / weight.sum(), (weight.sum(0) * pixels).sum() / weight.sum()
        offsets.append(torch.stack([y / patch_size - 2.5, x / patch_size - 3.5]))
    assert torch.stack(offsets).mean(0).abs().max() < 0.5 / patch_size + 0.06  # half a pixel, and sampling error


@pytest.mark.parametrize(
    "options",
    [{}, {"num_registers": 2}, {"pos_embed": "rope"}, {"pos_embed": "none"}, {"clip": True}, {"depth": 1}],
)
def test_cls_tokens_equal_those_of_forward_with_gradients(options):
    torch.manual_seed(0)
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 4, "image_size": 16}
    encoder = ViT(**arguments | {"drop_path": 0.2, "layer_scale_init": 0.5} | options).double()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)

    def with_gradients(function):
        torch.manual_seed(1)  # the same branches are dropped
        cls = function(images)
        return cls, torch.autograd.grad(cls.sin().sum(), list(encoder.parameters()), materialize_grads=True)

    cls, gradients = with_gradients(encoder.cls_tokens)
    expected_cls, expected_gradients = with_gradients(lambda images: encoder(images).cls)
    torch.testing.assert_close(cls, expected_cls, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)
    assert encoder(images, cls_only=True).patches.shape == (5, 0, 0, 32)


def test_cls_tokens_skip_most_of_the_last_block():
    encoder = ViT(32, 2, 4, 4, 16)

    def count_flops(function):
        with FlopCounterMode(display=False) as counter:
            function(torch.zeros(1, 3, 16, 16))
        return counter.get_total_flops()

    for network in (encoder, EMATeacher(encoder)):
        assert count_flops(network.cls_tokens) < 0.75 * count_flops(encoder)  # of two blocks, most of one
