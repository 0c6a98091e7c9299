"""The ViT is the field's: equal to timm's and transformers' with copied weights, with DINO's names and positions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minissl.encoders import make_encoder
from minissl.errors import InputError
from minissl.method import Tokens, class_token
from minissl.teacher import Teacher
from minissl.transformer import DropPath, attend
from minissl.vit import ViT, vit
from tests.golden import tiny_vit, wave

DINO_NAMES = {
    "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
    *(f"blocks.{i}.{name}.{kind}" for i in range(2) for kind in ("weight", "bias")
      for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
}  # fmt: skip


def timm_twin(ours):
    from timm.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def test_parameters_have_dinos_names():
    assert set(tiny_vit().state_dict()) == DINO_NAMES


@pytest.mark.slow
def test_equals_timm_forward_and_backward():
    torch.manual_seed(0)
    ours = tiny_vit().double()
    theirs = timm_twin(ours).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens, expected = ours(images), theirs.forward_features(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 1:], rtol=1e-10, atol=1e-10)
    (tokens.cls.square().sum() + tokens.patches.sin().sum()).backward()
    (expected[:, 0].square().sum() + expected[:, 1:].sin().sum()).backward()
    twins = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, twins[name].grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.slow
def test_equals_transformers():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    ours = tiny_vit()
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                       image_size=16, patch_size=4, layer_norm_eps=1e-6)  # fmt: skip
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}  # fmt: skip
    state, wanted = {}, theirs.state_dict()
    for name, value in ours.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if name in names or stem in names:
            state[names[name] if name in names else f"{names[stem]}.{kind}"] = value
            continue
        _, i, *part = stem.split(".")
        state |= _layer(wanted, int(i), ".".join(part), kind, value)
    theirs.load_state_dict(state)
    images = torch.randn(3, 3, 16, 16)
    expected = theirs(images).last_hidden_state
    tokens = ours(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 1:], rtol=1e-5, atol=1e-5)


def _layer(wanted, i, part, kind, value):
    """A parameter of our block i under the names transformers has for it, which differ between its versions."""
    here = [name for name in wanted if f"layer.{i}." in name or f"layers.{i}." in name]
    if part == "attn.qkv":
        keys = [[n for n in here if any(f"{w}.{kind}" in n for w in (full, short))]
                for full, short in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))]  # fmt: skip
        return {name: piece for (name,), piece in zip(keys, value.chunk(3))}
    order = {"norm1": ("layernorm_before",), "norm2": ("layernorm_after",),
             "attn.proj": ("attention.output.dense", "o_proj", "out_proj"),
             "mlp.fc1": ("intermediate.dense", "fc1"), "mlp.fc2": ("output.dense", "fc2")}  # fmt: skip
    found = [n for n in here if n.endswith(kind) and any(word in n for word in order[part])]
    if part == "mlp.fc2":
        found = [n for n in found if "attention" not in n]
    (name,) = found
    return {name: value}


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, [0.09102, 0.42134, -0.77079, 0.42508]), (6, [-0.00603, 0.58688, 1.05354, 0.71875])],
)
def test_positions_stretch_as_dinos(size, expected):
    encoder = tiny_vit()
    with torch.no_grad():
        encoder.pos_embed[:, 1:] = wave(16, c=1.3).float().view(1, 16, 1)
    grid = encoder.positions(size, size)[0, 1:, 0]
    torch.testing.assert_close(grid[:4], torch.tensor(expected), rtol=0, atol=2e-5)
    torch.testing.assert_close(encoder.positions(size, size)[:, :1], encoder.pos_embed[:, :1])


def test_images_of_any_multiple_of_the_patch_have_their_own_grid():
    tokens = tiny_vit()(torch.randn(2, 3, 24, 12))
    assert isinstance(tokens, Tokens)
    assert tokens.cls.shape == (2, 32)
    assert tokens.patches.shape == (2, 6, 3, 32)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_patches_lie_where_the_image_has_them(stem):
    """What is painted into the lower left corner changes the patch embeddings there most."""
    encoder = tiny_vit(stem=stem).eval()
    images = torch.zeros(1, 3, 16, 16)
    marked = images.clone()
    marked[..., 12:, :4] = 3
    change = (encoder.patch_embed(marked) - encoder.patch_embed(images)).norm(dim=-1)[0]
    assert change[2:, :2].sum() > 0.5 * change.sum()  # all of it for the linear stem; convolutions see further


@pytest.mark.slow
def test_attention_is_the_class_tokens_row_of_timms_softmax():
    torch.manual_seed(0)
    ours = tiny_vit()
    theirs = timm_twin(ours).eval()
    images, seen = torch.randn(2, 3, 16, 16), {}
    attn = theirs.blocks[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.update(weights=inputs[0]))
    theirs.forward_features(images)
    found = ours.attention(images)
    assert found.shape == (2, 4, 4, 4)
    torch.testing.assert_close(found.flatten(2), seen["weights"][:, :, 0, 1:], rtol=1e-5, atol=1e-6)


def weights_by_hand(encoder, images):
    """The class token's row of every block's softmax, (blocks, B, heads, N), token by token and head by head."""
    x, _ = encoder.embed(images)
    out = []
    for block in encoder.blocks:
        normed, heads, width = block.norm1(x), block.attn.heads, x.shape[-1]
        queries, keys, _ = (normed @ part.mT for part in block.attn.qkv.weight.split(width))
        q_bias, k_bias, _ = block.attn.qkv.bias.split(width)
        rows = []
        for part in (queries + q_bias).split(width // heads, -1), (keys + k_bias).split(width // heads, -1):
            rows.append(part)
        scores = [torch.stack([(q[:, 0] * k[:, t]).sum(-1) for t in range(x.shape[1])], -1) for q, k in zip(*rows)]
        shares = [(s / math.sqrt(width // heads)).exp() for s in scores]
        out.append(torch.stack([s[:, 1:] / s.sum(-1, keepdim=True) for s in shares], 1))
        x = block(x)
    return torch.stack(out)


def test_every_block_shows_where_its_class_token_looks():
    torch.manual_seed(0)
    encoder, images = vit("nano", 8, 32, depth=3, stem="conv", init_std=0.2).eval(), torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        expected = weights_by_hand(encoder, images)
    for layer in range(-3, 3):
        found = encoder.attention(images, layer)
        assert found.shape == (2, 4, 4, 2)
        torch.testing.assert_close(found.flatten(2), expected[layer], rtol=1e-4, atol=1e-6)
    assert torch.equal(encoder.attention(images), encoder.attention(images, layer=2))
    assert not torch.allclose(expected[0], expected[2], atol=1e-2)


@pytest.mark.parametrize("layer", [2, -3])
def test_a_block_there_is_none_of_is_said(layer):
    with pytest.raises(InputError, match=f"no block {layer}; this ViT has 2, from 0 .or -2. to 1"):
        tiny_vit().attention(torch.zeros(1, 3, 16, 16), layer)


def test_depth_is_the_names_or_what_is_asked_for():
    assert [len(vit("nano", 8, 32, depth=depth).blocks) for depth in (0, 1, 3)] == [1, 1, 3]
    assert [len(make_encoder("nano", 8, 32, depth=depth).blocks) for depth in (0, 3)] == [1, 3]
    with pytest.raises(InputError, match="-1 blocks"):
        vit("nano", 8, 32, depth=-1)


def test_plain_attention_equals_the_fused_kernel():
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours, theirs = attend(*qkv), F.scaled_dot_product_attention(*qkv)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), qkv), torch.autograd.grad(theirs.sin().sum(), qkv)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_a_long_sequence_is_the_formula_too(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 8, dtype=torch.float64)
    weights = q @ k.mT / 8**0.5
    if causal:
        weights += torch.full((300, 300), -torch.inf, dtype=torch.float64).triu(1)
    torch.testing.assert_close(attend(q, k, v, causal), weights.softmax(dim=-1) @ v, rtol=1e-10, atol=1e-12)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
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


@pytest.mark.parametrize("arguments", [("huge", 16, 224), ("tiny", 16, 100), ("tiny", 16, 8)])
def test_what_cannot_be_built_is_said(arguments):
    with pytest.raises(InputError):
        vit(*arguments)


def test_what_cannot_be_cut_into_patches_is_said():
    with pytest.raises(InputError, match="15 x 16"):
        tiny_vit()(torch.zeros(1, 3, 15, 16))
    with pytest.raises(InputError, match="conv stem"):
        vit("nano", 6, 12, stem="conv")


@pytest.mark.slow
def test_the_image_tower_of_clip_equals_transformers():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPVisionConfig(**sizes, image_size=16, patch_size=4, projection_dim=24, hidden_act="quick_gelu")
    theirs = CLIPVisionModelWithProjection(config).eval().double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = ViT(32, 2, 4, 4, 16, clip=True).eval().double()
    state = {name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()}
    names = {
        "patch_embed.proj": "embeddings.patch_embedding", "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight", "norm_pre": "pre_layrnorm", "norm1": "layer_norm1",
        "norm2": "layer_norm2", "blocks": "encoder.layers", "attn.proj": "self_attn.out_proj",
    }  # fmt: skip
    for name, value in ours.state_dict().items():
        if name == "patch_embed.proj.bias":
            value.zero_()  # CLIP's has none
            continue
        for our, their in names.items():
            name = name.replace(our, their)
        name = name.replace("norm.", "post_layernorm.") if name.startswith("norm.") else name
        parts = [name.replace("attn.qkv", f"self_attn.{part}_proj") for part in "qkv"] if "qkv" in name else [name]
        value.copy_(torch.cat([state.pop(part) for part in parts]).view_as(value))
    projection = state.pop("visual_projection.weight")
    assert not [name for name in state if not name.endswith("position_ids")]
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours(images).cls @ projection.mT, theirs(pixel_values=images).image_embeds
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_a_patch_of_the_conv_stem_is_about_its_own_middle(patch_size):
    """The centre of what its vector depends on, weighted by how much."""
    torch.manual_seed(0)
    side, offsets = 6 * patch_size, []
    embed = vit("nano", patch_size, side, stem="conv").patch_embed.eval()
    for _ in range(8):
        images = torch.rand(1, 3, side, side, requires_grad=True)
        (embed(images)[0, 2, 3] * torch.randn(128)).sum().backward()
        weight = images.grad.abs().sum((0, 1))  # (side, side)
        middle = torch.arange(side) + 0.5
        y, x = (weight.sum(1) * middle).sum() / weight.sum(), (weight.sum(0) * middle).sum() / weight.sum()
        offsets.append(torch.stack([y / patch_size - 2.5, x / patch_size - 3.5]))
    assert torch.stack(offsets).mean(0).abs().max() < 0.5 / patch_size + 0.06  # half a pixel, of a patch, and chance


@pytest.mark.parametrize(
    "choices", [{}, {"registers": 2}, {"positions": "rotary"}, {"positions": "none"}, {"clip": True}, {"depth": 1}]
)
def test_a_class_token_alone_is_the_same_and_so_is_its_gradient(choices):
    torch.manual_seed(0)
    encoder = ViT(32, choices.pop("depth", 2), 4, 4, 16, drop_path=0.2, layer_scale=0.5, **choices).double()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)

    def told(find):
        torch.manual_seed(1)  # the same branches are left out
        cls = find()
        return cls, torch.autograd.grad(cls.sin().sum(), list(encoder.parameters()), materialize_grads=True)

    (whole, expected), (alone, found) = told(lambda: encoder(images).cls), told(lambda: class_token(encoder, images))
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert encoder(images, alone=True).patches.shape == (5, 0, 0, 32)


def test_a_class_token_alone_costs_less_in_the_last_block_through_a_teacher_too():
    encoder = ViT(32, 2, 4, 4, 16)

    def operations(ask, network):
        with FlopCounterMode(display=False) as counter:
            ask(network, torch.zeros(1, 3, 16, 16))
        return counter.get_total_flops()

    whole = operations(lambda network, images: network(images), encoder)
    for network in (encoder, Teacher(encoder)):
        assert operations(class_token, network) < 0.75 * whole  # of two blocks, most of one
