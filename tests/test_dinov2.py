"""DINOv2's losses equal the authors', lightly's and loops; its ViT equals timm's and transformers'."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from minissl.data.batch import Batch
from minissl.errors import InputError
from minissl.methods.dino import DINO, center_and_sharpen, dino_loss
from minissl.methods.dinov2 import DINOv2, ibot_patch_loss
from minissl.methods.losses import sinkhorn_knopp
from minissl.models.convnets import SmallCNN
from minissl.models.vit import vit
from minissl.training.optimizers import param_groups
from minissl.training.sampler import seed_step
from tests.golden import randomize_weights, tiny_vit, wave


def test_patch_loss_equals_the_golden_number():
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    teacher = sinkhorn_knopp(wave(5, 8, c=0.9, phase=0.2), 0.07)
    assert ibot_patch_loss(wave(5, 8), teacher, masks).item() == pytest.approx(6.98835330, abs=1e-5)


def test_image_and_patch_loss_equal_ibots_golden_numbers():
    student, student_patches, local = 2 * wave(4, 16), 2 * wave(4, 4, 16, c=0.6), 2 * wave(2, 16, c=1.1)
    teacher, teacher_patches = 2 * wave(4, 16, c=0.9, phase=0.2), 2 * wave(4, 4, 16, c=0.8, phase=0.3)
    center = torch.zeros(1, 16, dtype=torch.float64)
    views = torch.cat([student, local]).unflatten(0, (3, 2))
    loss = dino_loss(views, center_and_sharpen(teacher, center, 0.04).unflatten(0, (2, 2)))
    assert loss.item() == pytest.approx(20.69134857, rel=1e-7)
    masks = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    targets = center_and_sharpen(teacher_patches, center, 0.07)
    loss = ibot_patch_loss(student_patches[masks], targets[masks], masks)
    assert loss.item() == pytest.approx(12.20627368, rel=1e-7)


def patch_loss_by_loops(student_logits, targets, masks):
    total, row = 0.0, 0
    for mask in masks:
        losses = []
        for _ in range(int(mask.sum())):
            logits = student_logits[row] / 0.1
            losses.append(-(targets[row] * (logits - logits.exp().sum().log())).sum())
            row += 1
        total = total + (sum(losses) / len(losses) if losses else 0) / len(masks)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_patch_loss_and_its_gradient_equal_loops_and_lightly(seed):
    from lightly.loss import IBOTPatchLoss

    torch.manual_seed(seed)
    masks = torch.rand(6, 5) < 0.4
    masks[0] = False
    m = int(masks.sum())
    student, teacher = torch.randn(m, 7, requires_grad=True), torch.randn(m, 7)
    targets = (teacher / 0.07).softmax(-1)
    loss = ibot_patch_loss(student, targets, masks)
    (gradient,) = torch.autograd.grad(loss, student)
    reference = IBOTPatchLoss(output_dim=7, teacher_temp=0.07, student_temp=0.1)
    for expected in (patch_loss_by_loops(student, targets, masks), reference(teacher, student, masks[:, None])):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-6)


SIZES = {
    "crop_size": 16,
    "local_crop_size": 8,
    "num_local_crops": 2,
    "num_prototypes": 32,
    "hidden_dim": 16,
    "bottleneck_dim": 8,
}


def build(**options):
    torch.manual_seed(0)
    return DINOv2(tiny_vit(), **SIZES | options)


def noise_batch(n=8):
    return Batch(torch.randint(0, 256, (n, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_without_its_own_terms_it_equals_dino():
    """Without masked patches, KoLeo and Sinkhorn-Knopp, the loss and its gradient are those of `DINO`."""
    scales = {"global_crops_scale": (0.4, 1.0), "local_crops_scale": (0.05, 0.4)}
    torch.manual_seed(0)
    dino = DINO(tiny_vit(), **SIZES, **scales, teacher_temp=0.07)
    dinov2 = build(**scales, teacher_temp=0.07, ibot_loss_weight=0.0, koleo_loss_weight=0.0, sinkhorn_iterations=0)
    for method in (dino, dinov2):
        seed_step(0, 0)
        method.loss(noise_batch(), 0.5)["loss"].backward()
    for (name, p), (_, q) in zip(dinov2.student.named_parameters(), dino.student.named_parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(dinov2.center, dino.center)


def test_the_student_does_not_see_masked_patches():
    encoder, token = tiny_vit(stem="conv").eval(), torch.randn(1, 32)
    images, masks = torch.randn(2, 3, 16, 16), torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1:3, 1:3] = True
    changed = images.clone()
    changed[0, :, 4:12, 4:12] = 5.0
    tokens, changed_tokens = (encoder(x, masks, token) for x in (images, changed))
    torch.testing.assert_close(tokens.patches, changed_tokens.patches)
    torch.testing.assert_close(tokens.cls, changed_tokens.cls)
    unmasked = encoder(images)
    torch.testing.assert_close(tokens.cls[1], unmasked.cls[1])  # image 1 has no masked patch
    assert (tokens.cls[0] - unmasked.cls[0]).abs().max() > 1e-3


def test_the_mask_token_replaces_the_patch_embedding_and_keeps_its_position():
    encoder, token = tiny_vit(), torch.full((1, 32), 3.0)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 2, 1] = True
    x, _ = encoder.prepare_tokens(torch.randn(1, 3, 16, 16), masks, token)
    torch.testing.assert_close(x[0, 1 + 2 * 4 + 1], token[0] + encoder.pos_embed[0, 1 + 2 * 4 + 1])


def test_heads_are_tied_or_untied():
    assert "patch_head" not in build().student
    untied = build(num_patch_prototypes=24)
    assert untied.student["patch_head"].last_layer.weight.shape[0] == 24
    seed_step(0, 0)
    untied.loss(noise_batch(), 0.5)["loss"].backward()
    assert untied.student["patch_head"].last_layer.weight.grad.abs().sum() > 0
    assert untied.mask_token.grad.abs().sum() > 0


def test_loss_is_the_weighted_sum_of_its_terms():
    method = build(koleo_loss_weight=0.5, ibot_loss_weight=2.0)
    seed_step(0, 1)
    full = method.loss(noise_batch(), 0.5)
    method.koleo_loss_weight, method.ibot_loss_weight = 0.25, 1.0
    seed_step(0, 1)
    half = method.loss(noise_batch(), 0.5)  # the same masks and views
    rests = [x["loss"] - k * x["koleo"] - i * x["ibot"] for x, k, i in ((full, 0.5, 2), (half, 0.25, 1))]
    torch.testing.assert_close(*rests)
    assert set(full) == {"loss", "teacher_entropy", "koleo", "ibot"}
    assert full["teacher_entropy"].item() < math.log(32)


def test_after_ibot_end_fraction_nothing_is_masked():
    method, without = build(ibot_end_fraction=0.5), build(ibot_loss_weight=0.0)
    without.load_state_dict(method.state_dict())
    assert "ibot" in method.loss(noise_batch(), 0.49)
    seed_step(0, 1)
    late = method.loss(noise_batch(), 0.5)
    seed_step(0, 1)
    torch.testing.assert_close(late, without.loss(noise_batch(), 0.5))
    late["loss"].backward()
    assert method.mask_token.grad is None


def test_learning_rates_decay_by_layer_as_the_authors():
    method = build(layer_decay=0.5, patch_embed_lr_mult=0.2)
    scales = {id(p): group["lr_scale"] for group in param_groups(method) for p in group["params"]}
    encoder = {name: scales[id(p)] for name, p in method.student["encoder"].named_parameters()}
    depth = 2  # the authors: decay ** (depth + 1 - i), with i = 0 before the blocks, i + 1 for block i, depth + 1 above
    assert encoder["norm.weight"] == 1.0
    assert encoder["blocks.1.attn.qkv.weight"] == 0.5 ** (depth + 1 - 2)
    assert encoder["blocks.0.attn.qkv.weight"] == 0.5 ** (depth + 1 - 1)
    assert encoder["patch_embed.proj.weight"] == pytest.approx(0.5 ** (depth + 1) * 0.2)
    assert encoder["cls_token"] == scales[id(method.mask_token)] == 0.5 ** (depth + 1)
    assert scales[id(method.student["head"].mlp[0].weight)] == 1.0


def test_an_encoder_that_cannot_mask_patches_is_rejected_unless_ibot_is_off():
    with pytest.raises(InputError, match="--ibot_loss_weight 0"):
        DINOv2(SmallCNN(), **SIZES)
    method = DINOv2(SmallCNN(), **SIZES | {"num_local_crops": 0}, ibot_loss_weight=0.0)
    assert method.loss(noise_batch(), 0.5)["loss"].isfinite()


def test_target_probs_follow_the_sinkhorn_option():
    features = torch.randn(6, 32)
    for sinkhorn_iterations in (0, 3):
        method = build(sinkhorn_iterations=sinkhorn_iterations)
        method.center.normal_()
        center = 0 if sinkhorn_iterations else method.center
        logits = method.teacher["head"].network(features)
        torch.testing.assert_close(method.target_probs(features), ((logits - center) / 0.07).softmax(-1))


def vit_with_weights(state, rename, **choices):
    """Build minissl's ViT with the weights of another library's."""
    encoder = vit("small", 14, 70, depth=2, **choices)
    encoder.load_state_dict({rename(name): tensor for name, tensor in state.items() if rename(name)})
    return encoder.eval()


@pytest.mark.slow
@pytest.mark.parametrize("size", [70, 98])
@pytest.mark.parametrize("num_registers", [0, 4])
def test_vit_equals_timms(num_registers, size):
    import timm

    name = f"vit_small_patch14_{'reg4_' if num_registers else ''}dinov2"
    model = timm.create_model(name, pretrained=False, img_size=70, depth=2, dynamic_img_size=True)
    reference = randomize_weights(model)
    state = dict(reference.state_dict())
    if num_registers:  # timm's model with registers has no position embedding of the class token
        state["cls_token"], first = state["cls_token"] * 0.4, state["cls_token"] * 0.6
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)

    def rename(name):
        return name.replace("reg_token", "register_tokens")

    encoder = vit_with_weights(state, rename, num_registers=num_registers, layer_scale_init=1e-5)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        tokens, expected = encoder(images), reference.forward_features(images)
        if not num_registers and size != 70:  # timm interpolates by size, as models with registers
            scale_based = tokens
            encoder.register_tokens = torch.nn.Parameter(torch.zeros(1, 0, 384))
            tokens = encoder(images)
            assert (tokens.cls - scale_based.cls).abs().max() < 0.5
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 1 + num_registers :], rtol=1e-4, atol=1e-5)


NAMES = {  # transformers' names and minissl's
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
MERGED = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}


def transformers_dinov2(num_registers, swiglu):
    """Return transformers' model with random weights, and its weights under minissl's names."""
    import transformers

    family = "Dinov2WithRegisters" if num_registers else "Dinov2"
    options = {"num_register_tokens": num_registers} if num_registers else {}
    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 70, "patch_size": 14}
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**sizes, use_swiglu_ffn=swiglu, attn_implementation="eager", **options)
    reference = randomize_weights(getattr(transformers, f"{family}Model")(config))
    state = dict(reference.state_dict())
    for (merged, parts), i, kind in itertools.product(MERGED.items(), range(2), ("weight", "bias")):
        names = [f"encoder.layer.{i}.{name}.{kind}" for name in parts]
        if names[0] in state:
            state[f"blocks.{i}.{merged}.{kind}"] = torch.cat([state.pop(name) for name in names])
    return reference, state


def rename_transformers(name):
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return "" if "mask_token" in name else name


@pytest.mark.slow
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("size", [70, 98])
@pytest.mark.parametrize("num_registers", [0, 4])
def test_vit_equals_transformers(num_registers, size, swiglu):
    reference, state = transformers_dinov2(num_registers, swiglu)
    choices = {"num_registers": num_registers, "layer_scale_init": 1e-5, "swiglu": swiglu}
    encoder = vit_with_weights(state, rename_transformers, **choices)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        tokens, expected = encoder(images), reference(images, output_attentions=True)
    if num_registers or size == 70:
        torch.testing.assert_close(tokens.cls, expected.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
        patches = expected.last_hidden_state[:, 1 + num_registers :]
        torch.testing.assert_close(tokens.patches.flatten(1, 2), patches, rtol=1e-4, atol=1e-5)
        attention = expected.attentions[-1][:, :, 0, 1 + num_registers :]
        torch.testing.assert_close(encoder.attention(images).flatten(2), attention, rtol=1e-4, atol=1e-6)
    else:  # position embeddings are interpolated by scale here and by size there: similar, not equal
        assert F.cosine_similarity(tokens.cls, expected.last_hidden_state[:, 0]).min() > 0.99
