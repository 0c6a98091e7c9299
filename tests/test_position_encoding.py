"""RoPE equals that of DINOv3 number by number, and the ViT with it equals timm's and transformers' DINOv3."""

import math

import pytest
import torch

from minissl.errors import InputError
from minissl.models.ema import EMATeacher
from minissl.models.position_encoding import (
    RopeAugmentation,
    apply_rope,
    augment_coordinates,
    patch_coordinates,
    rope_angles,
)
from minissl.models.vit import vit
from tests.golden import randomize_weights, wave


def test_angles_equal_the_authors():
    rope = rope_angles(patch_coordinates((2, 3)), 8)
    sin, cos = torch.tensor([0, -0.30901700, 0, 0]), torch.tensor([-1, 0.95105654, 1, 1])
    torch.testing.assert_close(rope.sin[1], sin.repeat(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(rope.cos[1], cos.repeat(2), rtol=0, atol=1e-6)
    rotated = apply_rope(wave(8).float().expand(1, 1, 6, 8), rope)[0, 0, 1]
    golden = [0, 0.50428945, 0.98544973, 0.86320937, -0.33498815, -0.53268886, -0.87157577, -0.98245263]
    torch.testing.assert_close(rotated, torch.tensor(golden), rtol=0, atol=1e-6)


def test_periods_are_geometric():
    rope = rope_angles(torch.tensor([[1.0, 0.0]]), 64)
    cosines = [math.cos(2 * math.pi / 100 ** (i / 16)) for i in range(16)]  # 1, 1.15... each times 100 ** (1 / 16)
    torch.testing.assert_close(rope.cos[0, :16], torch.tensor(cosines), rtol=0, atol=1e-5)
    assert (rope.cos[0, 16:32] == 1).all()


def test_coordinates_are_those_of_patch_centers():
    expected = [[y, x] for y in (-0.5, 0.5) for x in (-0.75, -0.25, 0.25, 0.75)]
    torch.testing.assert_close(patch_coordinates((2, 4)), torch.tensor(expected))


def test_logits_depend_on_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    coordinates = torch.tensor([[0.1, 0.2], [0.4, -0.3], [0.6, 0.4], [0.9, -0.1]], dtype=torch.float64)  # 1 - 0 = 3 - 2
    rope = rope_angles(coordinates, 16)
    queries, keys = (apply_rope(x.expand(1, 1, 4, 16), rope)[0, 0] for x in (q, k))
    assert queries[0] @ keys[1] == pytest.approx((queries[2] @ keys[3]).item(), abs=1e-9)
    assert queries[0] @ keys[1] != pytest.approx((queries[0] @ keys[3]).item(), abs=1e-3)


def test_tokens_without_position_are_not_rotated():
    x = torch.randn(2, 3, 5 + 6, 8)
    rotated = apply_rope(x, rope_angles(patch_coordinates((2, 3)), 8))
    assert torch.equal(rotated[:, :, :5], x[:, :, :5])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_augmentation_is_one_random_shift_and_scale_within_its_bounds():
    torch.manual_seed(0)
    coordinates, factors = patch_coordinates((4, 6)), []
    for _ in range(300):
        ratios = augment_coordinates(coordinates, RopeAugmentation(jitter=2.0, rescale=3.0)) / coordinates
        assert (ratios.std(dim=0) < 1e-4).all()
        factors.append(ratios[0])
    logs = torch.stack(factors).log().abs()  # (300, 2)
    assert logs.max() <= math.log(6)
    assert logs.max() > 0.8 * math.log(6)
    shifted = [augment_coordinates(coordinates, RopeAugmentation(shift=0.3)) - coordinates for _ in range(300)]
    shifts = torch.stack(shifted)
    assert (shifts.std(dim=1) < 1e-5).all()
    assert 0.28 < shifts.abs().max() <= 0.3
    assert torch.equal(augment_coordinates(coordinates, RopeAugmentation()), coordinates)


def test_coordinates_are_augmented_for_a_student_in_training_only():
    torch.manual_seed(0)
    student = vit("nano", 8, 32, pos_embed="rope", rope_augmentation=(0.0, 1.0, 2.0))
    teacher, images = EMATeacher(student), torch.randn(2, 3, 32, 32)
    outputs = [[network.train()(images).cls for _ in range(2)] for network in (student, teacher)]
    assert not torch.equal(*outputs[0])
    assert torch.equal(*outputs[1])
    assert torch.equal(student.eval()(images).cls, teacher(images).cls)


def test_rope_without_a_grid_raises():
    encoder = vit("nano", 8, 32, pos_embed="rope")
    with pytest.raises(InputError, match=r"--encoder\.pos_embed"):
        encoder.encode(torch.randn(1, 5, 128))


TIMM = {"reg_token": "register_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "model.layer": "blocks",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def rename(name, names):
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def timm_dinov3():
    """Return timm's DINOv3 and its weights by minissl's names."""
    import timm

    model = timm.create_model("vit_small_patch16_dinov3", depth=2, img_size=64, dynamic_img_size=True)
    state = {rename(name, TIMM): x for name, x in randomize_weights(model).state_dict().items()}
    return model.forward_features, state | {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * 384) for i in range(2)}


def transformers_dinov3():
    """Return transformers' DINOv3 and its weights by minissl's names."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 1536}
    model = randomize_weights(DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=64, num_register_tokens=4)))
    state = {rename(name, TRANSFORMERS): x for name, x in model.state_dict().items() if "mask_token" not in name}
    for i in range(2):
        state[f"blocks.{i}.attention.k_proj.bias"] = torch.zeros(384)
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attention.{part}_proj.{kind}") for part in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return lambda images: model(images).last_hidden_state, state


@pytest.mark.slow
@pytest.mark.parametrize("build_reference", [timm_dinov3, transformers_dinov3])
def test_the_vit_with_rope_equals_the_reference(build_reference):
    """At the training size and at two others, one of them not square."""
    reference, state = build_reference()
    encoder = vit("small", 16, 64, depth=2, pos_embed="rope", num_registers=4, layer_scale_init=1e-5)
    encoder.load_state_dict(state)
    encoder.eval()
    for height, width in ((64, 64), (96, 96), (64, 112)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            tokens, expected = encoder(images), reference(images)
        torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 5:], rtol=1e-4, atol=1e-5)
