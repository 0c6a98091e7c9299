"""DINOv2's losses are the authors', number for number; its ViT is timm's and transformers'."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from minissl.balance import sinkhorn_knopp
from minissl.errors import InputError
from minissl.method import Batch
from minissl.methods import dinov2
from minissl.methods.dino import center_and_sharpen, cross_view_entropy
from minissl.methods.dinov2 import DINOv2, masked_patch_entropy
from minissl.optim import param_groups
from minissl.train import seed_step
from minissl.vit import vit
from tests.golden import shake, tiny_vit, wave


def test_the_fixed_names_are_there():
    for name in ("sinkhorn_knopp", "koleo", "masked_patch_entropy", "block_masks"):
        assert callable(getattr(dinov2, name))


def test_masked_patches_equal_the_authors():
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    teacher = sinkhorn_knopp(wave(5, 8, c=0.9, phase=0.2), 0.07)
    assert masked_patch_entropy(wave(5, 8), teacher, masks).item() == pytest.approx(6.98835330, abs=1e-5)


def test_image_and_patches_equal_the_authors_of_ibot():
    student, patches, local = 2 * wave(4, 16), 2 * wave(4, 4, 16, c=0.6), 2 * wave(2, 16, c=1.1)
    teacher, seen = 2 * wave(4, 16, c=0.9, phase=0.2), 2 * wave(4, 4, 16, c=0.8, phase=0.3)
    zero = torch.zeros(1, 16, dtype=torch.float64)
    views = torch.cat([student, local]).unflatten(0, (3, 2))
    image = cross_view_entropy(views, center_and_sharpen(teacher, zero, 0.04).unflatten(0, (2, 2)))
    assert image.item() == pytest.approx(20.69134857, rel=1e-7)
    masks = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    targets = center_and_sharpen(seen, zero, 0.07)
    found = masked_patch_entropy(patches[masks], targets[masks], masks)
    assert found.item() == pytest.approx(12.20627368, rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_masked_patches_and_their_gradient_equal_loops_and_lightlys(seed):
    from lightly.loss import IBOTPatchLoss

    torch.manual_seed(seed)
    masks = torch.rand(6, 5) < 0.4
    masks[0] = False
    m = int(masks.sum())
    student, teacher = torch.randn(m, 7, requires_grad=True), torch.randn(m, 7)
    targets, slow, row = (teacher / 0.07).softmax(-1), 0.0, 0
    for mask in masks:
        crop = []
        for _ in range(int(mask.sum())):
            scores = student[row] / 0.1
            crop.append(-(targets[row] * (scores - scores.exp().sum().log())).sum())
            row += 1
        slow = slow + (sum(crop) / len(crop) if crop else 0) / len(masks)
    fast = masked_patch_entropy(student, targets, masks)
    torch.testing.assert_close(fast, slow)
    theirs = IBOTPatchLoss(output_dim=7, teacher_temp=0.07, student_temp=0.1)(teacher, student, masks[:, None])
    torch.testing.assert_close(fast, theirs)
    ours, others = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (fast, theirs))
    torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-6)


def small(**options):
    torch.manual_seed(0)
    sizes = {"size": 16, "local_size": 8, "local_crops": 2, "prototypes": 32, "hidden": 16, "bottleneck": 8}
    return DINOv2(tiny_vit(), **sizes | options)


def batch(n=8):
    return Batch(torch.randint(0, 256, (n, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_without_its_own_terms_it_is_dino():
    """No patches, no KoLeo, the centre: the loss and its gradient are those of `dino.DINO`."""
    from minissl.methods.dino import DINO

    torch.manual_seed(0)
    sizes = {"size": 16, "local_size": 8, "local_crops": 2, "prototypes": 32, "hidden": 16, "bottleneck": 8}
    sizes |= {"global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4), "teacher_temperature": 0.07}
    old, new = DINO(tiny_vit(), **sizes), small(**sizes, ibot=0.0, koleo=0.0, sinkhorn=0)
    for method in (old, new):
        seed_step(0, 0)
        method.loss(batch(), 0.5)["loss"].backward()
    for (name, p), (_, q) in zip(new.student.named_parameters(), old.student.named_parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(new.center, old.center)


def test_the_student_does_not_see_what_is_hidden():
    encoder, token = tiny_vit(stem="conv").eval(), torch.randn(1, 32)
    images, masks = torch.randn(2, 3, 16, 16), torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1:3, 1:3] = True
    other = images.clone()
    other[0, :, 4:12, 4:12] = 5.0
    a, b = (encoder(x, masks, token) for x in (images, other))
    torch.testing.assert_close(a.patches, b.patches)
    torch.testing.assert_close(a.cls, b.cls)
    plain = encoder(images)
    torch.testing.assert_close(a.cls[1], plain.cls[1])  # nothing is hidden in this one
    assert (a.cls[0] - plain.cls[0]).abs().max() > 1e-3


def test_a_mask_token_stands_where_a_patch_is_hidden_and_keeps_its_place():
    encoder, token = tiny_vit(), torch.full((1, 32), 3.0)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 2, 1] = True
    x, _ = encoder.embed(torch.randn(1, 3, 16, 16), masks, token)
    torch.testing.assert_close(x[0, 1 + 2 * 4 + 1], token[0] + encoder.pos_embed[0, 1 + 2 * 4 + 1])


def test_heads_are_shared_or_not():
    assert "patch_head" not in small().student
    own = small(patch_prototypes=24)
    assert own.student["patch_head"].last_layer.weight.shape[0] == 24
    seed_step(0, 0)
    own.loss(batch(), 0.5)["loss"].backward()
    assert own.student["patch_head"].last_layer.weight.grad.abs().sum() > 0
    assert own.mask_token.grad.abs().sum() > 0


def test_terms_add_up():
    method = small(koleo=0.5, ibot=2.0)
    seed_step(0, 1)
    whole = method.loss(batch(), 0.5)
    method.koleo, method.ibot = 0.25, 1.0
    seed_step(0, 1)
    half = method.loss(batch(), 0.5)  # the same masks and views
    besides = [
        terms["loss"] - k * terms["koleo"] - i * terms["ibot"] for terms, k, i in ((whole, 0.5, 2), (half, 0.25, 1))
    ]
    torch.testing.assert_close(*besides)
    assert set(whole) == {"loss", "teacher_entropy", "koleo", "ibot"}
    assert whole["teacher_entropy"].item() < math.log(32)


def test_from_some_time_on_nothing_is_hidden_and_it_is_dino():
    method, plain = small(ibot_until=0.5), small(ibot=0.0)
    plain.load_state_dict(method.state_dict())
    assert "ibot" in method.loss(batch(), 0.49)
    seed_step(0, 1)
    late = method.loss(batch(), 0.5)
    seed_step(0, 1)
    torch.testing.assert_close(late, plain.loss(batch(), 0.5))
    late["loss"].backward()
    assert method.mask_token.grad is None


def test_layers_learn_at_their_own_rates():
    method = small(slower=(0.5, 0.2))
    rates = {}
    for group in param_groups(method):
        for p in group["params"]:
            rates[id(p)] = group["rate"]
    found = {name: rates[id(p)] for name, p in method.student["encoder"].named_parameters()}
    depth = 2  # the authors': decay ** (depth + 1 - id), with id 0 before the blocks, i + 1 for them, depth + 1 above
    assert found["norm.weight"] == 1.0
    assert found["blocks.1.attn.qkv.weight"] == 0.5 ** (depth + 1 - 2)
    assert found["blocks.0.attn.qkv.weight"] == 0.5 ** (depth + 1 - 1)
    assert found["patch_embed.proj.weight"] == pytest.approx(0.5 ** (depth + 1) * 0.2)
    assert found["cls_token"] == rates[id(method.mask_token)] == 0.5 ** (depth + 1)
    assert rates[id(method.student["head"].mlp[0].weight)] == 1.0


def test_an_encoder_without_patches_is_refused():
    from minissl.convnet import SmallCNN

    with pytest.raises(InputError, match="--ibot 0"):
        DINOv2(SmallCNN(), size=16, prototypes=8, hidden=8, bottleneck=4)
    DINOv2(SmallCNN(), size=16, local_crops=0, prototypes=8, hidden=8, bottleneck=4, ibot=0.0)


def ours_like(theirs, rename, **choices):
    """Our ViT with the weights of another library's."""
    encoder = vit("small", 14, 70, depth=2, **choices)
    state = {rename(name): tensor for name, tensor in theirs.items() if rename(name)}
    encoder.load_state_dict(state)
    return encoder.eval()


@pytest.mark.slow
@pytest.mark.parametrize("size", [70, 98])
@pytest.mark.parametrize("registers", [0, 4])
def test_the_vit_is_timms(registers, size):
    import timm

    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    theirs = shake(timm.create_model(name, pretrained=False, img_size=70, depth=2, dynamic_img_size=True))
    state = dict(theirs.state_dict())
    if registers:  # timm's has no position for the class token there
        state["cls_token"], first = state["cls_token"] * 0.4, state["cls_token"] * 0.6
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    ours = ours_like(state, lambda n: n.replace("reg_token", "register_tokens"), registers=registers, layer_scale=1e-5)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found, right = ours(images), theirs.forward_features(images)
    if not registers and size != 70:
        ours.register_tokens, kept = torch.nn.Parameter(torch.zeros(1, 0, 384)), found  # size-based, as timm's
        with torch.no_grad():
            found = ours(images)
        assert (found.cls - kept.cls).abs().max() < 0.5
    torch.testing.assert_close(found.cls, right[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patches.flatten(1, 2), right[:, 1 + registers :], rtol=1e-4, atol=1e-5)


NAMES = {  # transformers' names and ours
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.down_proj": "mlp.w3",
    "layernorm": "norm",
}
JOINED = {"attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
          "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [70, 98])
@pytest.mark.parametrize("registers", [0, 4])
def test_the_vit_is_transformers(registers, size, gated):
    import transformers

    family = "Dinov2WithRegisters" if registers else "Dinov2"
    options = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=70, patch_size=14,
        use_swiglu_ffn=gated, attn_implementation="eager", **options,
    )  # fmt: skip
    theirs = shake(getattr(transformers, f"{family}Model")(config))
    state = dict(theirs.state_dict())
    for (one, several), i, kind in itertools.product(JOINED.items(), range(2), ("weight", "bias")):
        names = [f"encoder.layer.{i}.{name}.{kind}" for name in several]
        if names[0] in state:
            state[f"blocks.{i}.{one}.{kind}"] = torch.cat([state.pop(name) for name in names])

    def rename(name):
        for old, new in NAMES.items():
            name = name.replace(old, new)
        return "" if "mask_token" in name else name

    ours = ours_like(state, rename, registers=registers, layer_scale=1e-5, gated=gated)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found, right = ours(images), theirs(images, output_attentions=True)
    if registers or size == 70:
        torch.testing.assert_close(found.cls, right.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
        patches = right.last_hidden_state[:, 1 + registers :]
        torch.testing.assert_close(found.patches.flatten(1, 2), patches, rtol=1e-4, atol=1e-5)
        attention = right.attentions[-1][:, :, 0, 1 + registers :]
        torch.testing.assert_close(ours.attention(images).flatten(2), attention, rtol=1e-4, atol=1e-6)
    else:  # another rounding of the positions: near, not equal
        assert F.cosine_similarity(found.cls, right.last_hidden_state[:, 0]).min() > 0.99
