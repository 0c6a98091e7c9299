"""Rotary positions are DINOv3's, number for number, and its ViT is timm's and transformers'."""

import math

import pytest
import torch

from minissl.errors import InputError
from minissl.methods.dino import DINOHead
from minissl.positions import Stretch, coordinates, rotate, stretch, turn
from minissl.teacher import Teacher
from minissl.vit import vit
from tests.golden import shake, wave


def test_angles_are_the_authors():
    found = turn(coordinates((2, 3)), 8)
    sin, cos = torch.tensor([0, -0.30901700, 0, 0]), torch.tensor([-1, 0.95105654, 1, 1])
    torch.testing.assert_close(found.sin[1], sin.repeat(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.cos[1], cos.repeat(2), rtol=0, atol=1e-6)
    turned = rotate(wave(8).float().expand(1, 1, 6, 8), found)[0, 0, 1]
    golden = [0, 0.50428945, 0.98544973, 0.86320937, -0.33498815, -0.53268886, -0.87157577, -0.98245263]
    torch.testing.assert_close(turned, torch.tensor(golden), rtol=0, atol=1e-6)


def test_periods_are_geometric():
    angles = turn(torch.tensor([[1.0, 0.0]]), 64)
    cosines = [math.cos(2 * math.pi / 100 ** (i / 16)) for i in range(16)]  # 1, 1.15... each times 100 ** (1 / 16)
    torch.testing.assert_close(angles.cos[0, :16], torch.tensor(cosines), rtol=0, atol=1e-5)
    assert (angles.cos[0, 16:32] == 1).all()


def test_coordinates_are_of_the_middles():
    expected = [[y, x] for y in (-0.5, 0.5) for x in (-0.75, -0.25, 0.25, 0.75)]
    torch.testing.assert_close(coordinates((2, 4)), torch.tensor(expected))


def test_what_two_patches_say_depends_on_how_far_apart_they_are():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    places = torch.tensor([[0.1, 0.2], [0.4, -0.3], [0.6, 0.4], [0.9, -0.1]], dtype=torch.float64)  # two equal steps
    turned = turn(places, 16)
    first, second = (rotate(x.expand(1, 1, 4, 16), turned)[0, 0] for x in (q, k))
    assert first[0] @ second[1] == pytest.approx((first[2] @ second[3]).item(), abs=1e-9)
    assert first[0] @ second[1] != pytest.approx((first[0] @ second[3]).item(), abs=1e-3)


def test_tokens_that_are_nowhere_stay():
    x = torch.randn(2, 3, 5 + 6, 8)
    found = rotate(x, turn(coordinates((2, 3)), 8))
    assert torch.equal(found[:, :, :5], x[:, :, :5])
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


def test_a_stretch_is_one_draw_within_its_bounds():
    torch.manual_seed(0)
    points, factors = coordinates((4, 6)), []
    for _ in range(300):
        found = stretch(points, Stretch(jitter=2.0, rescale=3.0)) / points
        assert (found.std(dim=0) < 1e-4).all()
        factors.append(found[0])
    logs = torch.stack(factors).log().abs()  # (300, 2)
    assert logs.max() <= math.log(6)
    assert logs.max() > 0.8 * math.log(6)
    moved = torch.stack([stretch(points, Stretch(shift=0.3)) - points for _ in range(300)])
    assert (moved.std(dim=1) < 1e-5).all()
    assert 0.28 < moved.abs().max() <= 0.3
    assert torch.equal(stretch(points, Stretch()), points)


def test_only_a_student_in_training_is_stretched():
    torch.manual_seed(0)
    student, images = vit("nano", 8, 32, positions="rotary", stretch=(0.0, 1.0, 2.0)), torch.randn(2, 3, 32, 32)
    teacher = Teacher(student)
    draws = [[network.train()(images).cls for _ in range(2)] for network in (student, teacher)]
    assert not torch.equal(*draws[0])
    assert torch.equal(*draws[1])
    assert torch.equal(student.eval()(images).cls, teacher(images).cls)


def test_rotary_positions_need_a_grid():
    encoder = vit("nano", 8, 32, positions="rotary")
    with pytest.raises(InputError, match="all patches of a grid"):
        encoder.encode(torch.randn(1, 5, 128))


def test_a_plain_last_layer_starts_small_and_has_no_bound():
    torch.manual_seed(0)
    head, x = DINOHead(32, 64, 16, 8, cosines=False), torch.randn(500, 32)
    assert head(x).std().item() == pytest.approx(0.02, rel=0.2)
    with torch.no_grad():
        before = head(x)
        head.last_layer.weight.mul_(100)
    torch.testing.assert_close(head(x), 100 * before)


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


def renamed(name, names):
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def timms():
    """timm's DINOv3 and its weights under our names."""
    import timm

    theirs = shake(timm.create_model("vit_small_patch16_dinov3", depth=2, img_size=64, dynamic_img_size=True))
    state = {renamed(name, TIMM): x for name, x in theirs.state_dict().items()}
    return theirs.forward_features, state | {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * 384) for i in range(2)}


def transformers_():
    """transformers' DINOv3 and its weights under our names."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 1536}
    theirs = shake(DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=64, num_register_tokens=4)))
    state = {renamed(name, TRANSFORMERS): x for name, x in theirs.state_dict().items() if "mask_token" not in name}
    for i in range(2):
        state[f"blocks.{i}.attention.k_proj.bias"] = torch.zeros(384)
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attention.{part}_proj.{kind}") for part in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return lambda images: theirs(images).last_hidden_state, state


@pytest.mark.slow
@pytest.mark.parametrize("family", [timms, transformers_])
def test_the_vit_is_the_fields(family):
    """At the size it was made for and at two others, one of them not square."""
    theirs, state = family()
    ours = vit("small", 16, 64, depth=2, positions="rotary", registers=4, layer_scale=1e-5)
    ours.load_state_dict(state)
    ours.eval()
    for height, width in ((64, 64), (96, 96), (64, 112)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            found, right = ours(images), theirs(images)
        torch.testing.assert_close(found.cls, right[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.patches.flatten(1, 2), right[:, 5:], rtol=1e-4, atol=1e-5)
