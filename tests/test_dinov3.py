"""DINOv3's losses equal the authors'; the Gram teacher is updated when it should be and anchors the patch features."""

import copy

import pytest
import torch
import torch.nn.functional as F

from minissl.data.transforms.functional import normalize
from minissl.errors import InputError
from minissl.methods.dino import dino_loss
from minissl.methods.dinov2 import DINOv2
from minissl.methods.dinov3 import DINOv3, gram_loss, resize_patch_grid
from minissl.methods.losses import sinkhorn_knopp
from minissl.methods.registry import method_options
from minissl.methods.simclr import SimCLR
from minissl.models.factory import create_encoder
from minissl.models.outputs import Tokens
from minissl.training import checkpoint
from minissl.training.config import TrainConfig
from minissl.training.sampler import seed_step
from minissl.training.trainer import create_optimizer, training_step
from tests.golden import randomize_weights, tiny_vit, wave
from tests.test_contract import SMALL, batch

STUDENT, ANCHOR = wave(2, 5, 8), wave(2, 5, 8, c=0.9, phase=0.2)
GRAM_LOSSES = [  # options, loss within images, loss over all patches of the batch
    ({}, 0.09403699, 0.35115761),
    ({"negatives": "drop"}, 0.02033243, 0.12131894),
    ({"negatives": "drop anchor's"}, 0.12645595, 0.43801993),
    ({"normalize": False}, 1.68827450, 5.83778334),
]


@pytest.mark.parametrize(("options", "within_images", "over_batch"), GRAM_LOSSES)
def test_gram_loss_equals_the_golden_numbers(options, within_images, over_batch):
    assert gram_loss(STUDENT, ANCHOR, **options).item() == pytest.approx(within_images, rel=1e-6)
    flat = (x.flatten(0, 1)[None] for x in (STUDENT, ANCHOR))
    assert gram_loss(*flat, **options).item() == pytest.approx(over_batch, rel=1e-6)


def test_gram_loss_and_its_gradient_equal_loops():
    student, anchor = STUDENT.clone().requires_grad_(), ANCHOR.clone().requires_grad_()
    total = 0.0
    for x, y in zip(student, anchor.detach()):
        for i in range(5):
            for j in range(5):
                difference = F.cosine_similarity(x[i], x[j], dim=0) - F.cosine_similarity(y[i], y[j], dim=0)
                total = total + difference**2
    (expected,) = torch.autograd.grad(total / 50, student)
    loss = gram_loss(student, anchor)
    torch.testing.assert_close(loss, total / 50)
    loss.backward()
    torch.testing.assert_close(student.grad, expected)
    assert anchor.grad is None


def test_gram_loss_is_invariant_to_rotation_and_scale():
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert gram_loss(3 * STUDENT @ rotation, STUDENT).item() == pytest.approx(0, abs=1e-12)
    projected = STUDENT @ torch.randn(8, 30, dtype=torch.float64)
    assert gram_loss(STUDENT, projected).item() > 1e-3  # the anchor may have another width


def test_patch_grids_are_resized_as_the_authors_do():
    resized = resize_patch_grid(wave(4, 4, c=1.3)[None, :, :, None].float(), (2, 2)).flatten()
    torch.testing.assert_close(resized, torch.tensor([0.10478, 0.29437, -0.72011, 0.43022]), rtol=0, atol=1e-5)


def test_class_token_loss_and_its_local_weight_equal_the_authors():
    target = sinkhorn_knopp(wave(6, 8, c=0.9, phase=0.2), 0.07).view(2, 3, 8)
    assert dino_loss(wave(2, 3, 8), target).item() == pytest.approx(9.09590816, rel=1e-6)
    views = wave(4, 3, 8, c=0.4)
    full, half, none = (dino_loss(views, target, local_loss_weight=w).item() for w in (1.0, 0.5, 0.0))
    global_loss = dino_loss(views[:2], target).item()
    assert none == pytest.approx(global_loss * 2 / 6)  # 2 of 6 pairs are of global crops; the divisor stays 6
    assert half == pytest.approx((full + none) / 2)


def nano(**choices):
    return create_encoder("nano", 4, 16, pos_embed="rope", **choices)


def build(seed=0, **options):
    torch.manual_seed(seed)
    known = method_options(DINOv3)
    return DINOv3(nano(num_registers=2), **{k: v for k, v in SMALL.items() if k in known} | options)


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def change_weights(method, progress):
    """Change the student's weights as a step would, and update the teachers."""
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(0.01)
    method.after_step(progress)


def test_gram_teacher_becomes_the_teacher_at_the_given_times():
    method = build(gram_update_at=(0.3, 0.6), teacher_momentum=0.9)
    updated = []
    for i in range(10):
        before = copy.deepcopy(method.gram_teacher.network)
        change_weights(method, i / 10)
        updated.append(not equal_weights(before, method.gram_teacher.network))
        assert updated[-1] == equal_weights(method.gram_teacher.network, method.teacher["encoder"].network)
    assert [i for i, u in enumerate(updated) if u] == [3, 6]


def test_gram_teacher_is_constant_without_update_times():
    method = build(gram_update_at=())
    before = copy.deepcopy(method.gram_teacher.network)
    for i in range(4):
        change_weights(method, i / 4)
    assert equal_weights(before, method.gram_teacher.network)


def test_a_resumed_run_does_not_update_the_gram_teacher_again():
    method, resumed = build(gram_update_at=(0.2,)), build(seed=1, gram_update_at=(0.2,))
    change_weights(method, 0.1)
    change_weights(method, 0.2)
    resumed.load_state_dict(method.state_dict())
    change_weights(resumed, 0.3)
    assert equal_weights(method.gram_teacher.network, resumed.gram_teacher.network)


def test_a_run_initialized_from_a_finished_one_starts_at_progress_0():
    method, other = build(gram_update_at=(0.0,)), build(seed=1, gram_update_at=(0.0,))
    change_weights(method, 0.9)
    other.load_state_dict(method.state_dict())
    change_weights(other, 0.0)
    assert equal_weights(other.gram_teacher.network, other.teacher["encoder"].network)


def test_without_the_gram_loss_it_equals_dinov2():
    """Up to the last layers, which DINOv3 does not normalize; here neither does."""
    method = build(gram_loss_weight=0.0, local_loss_weight=1.0)
    torch.manual_seed(0)
    known = method_options(DINOv2)
    other = DINOv2(nano(num_registers=2), **{k: v for k, v in SMALL.items() if k in known})
    for network in (*other.student.values(), *(part.network for part in other.teacher.values())):
        network.normalize_prototypes = False
    state = {k: v for k, v in method.state_dict().items() if "gram_teacher" not in k and "extra" not in k}
    other.load_state_dict(state)
    losses = []
    for m in (method, other):
        seed_step(0, 1)
        losses.append(m.loss(batch(), 0.5))
    assert losses[0] == losses[1]


def test_gram_loss_and_local_weight_follow_their_schedule():
    method = build(gram_loss_weight=2.0, gram_start_fraction=0.5, gram_warmup_fraction=0.2, local_loss_weight=0.5)
    terms = []
    for progress in (0.4, 0.6, 0.8):
        seed_step(0, 1)
        terms.append(method.loss(batch(), progress))
        assert ("gram" in terms[-1]) == (progress > 0.5)
    without = build(gram_loss_weight=2.0, gram_start_fraction=2.0)
    seed_step(0, 1)
    without = without.loss(batch(), 0.8)
    local = without["loss"] - terms[2]["loss"] + 2.0 * terms[2]["gram"]
    assert local > 0  # half of the local pairs' part of the loss
    assert "gram" not in without
    assert terms[1]["gram"] == terms[2]["gram"]
    rest = terms[1]["loss"] - 1.0 * terms[1]["gram"]  # in the middle of the warm-up both weights are half way
    torch.testing.assert_close(rest, without["loss"] - local / 2, rtol=1e-4, atol=1e-4)


def test_gram_anchoring_keeps_the_similarities_of_patches():
    """After equal steps on the class token's loss, Gram matrices are closer to the anchor's with the Gram loss."""
    images, distances = batch(16, 16), []
    options = {"gram_warmup_fraction": 0.0, "ibot_loss_weight": 0.0, "gram_update_at": (), "gram_crop_scale": 1.0}
    for weight in (0.0, 20.0):
        method = build(gram_loss_weight=weight, **options, num_local_crops=0)
        method.gram_teacher.update(randomize_weights(method.student["encoder"]), 0.0)
        config = TrainConfig(batch_size=16, lr=2e-3, warmup_fraction=0.0, precision="fp32")
        optimizer = create_optimizer(method, config)
        for i in range(10):
            seed_step(0, i)
            training_step(method, optimizer, images, i / 10, config)
        normalized = normalize(images.images)
        with torch.no_grad():
            networks = (method.student["encoder"].eval(), method.gram_teacher)
            distances.append(gram_loss(*(network(normalized).patches.flatten(1, 2) for network in networks)).item())
    assert distances[1] < 0.5 * distances[0]


def test_resolutions_are_sampled_with_the_given_frequencies(monkeypatch):
    method, sizes = build(multi_resolution_crops=((16, 8, 0.75), (24, 12, 0.25)), gram_crop_scale=1.5), []

    def record_size(images):
        sizes.append(images.shape[-1])
        return Tokens(images.new_zeros(len(images), 1), images.new_zeros(len(images), 1, 1, 1))

    monkeypatch.setattr(method.gram_teacher.network, "forward", record_size)
    monkeypatch.setattr("minissl.methods.dinov3.gram_loss", lambda *x: torch.zeros(()))
    for i in range(60):
        seed_step(0, i)
        method.loss(batch(2, 30), 0.5)
    assert set(sizes) == {24, 36}
    assert sizes.count(24) == pytest.approx(45, abs=9)


def test_options_include_dinov2s():
    assert set(method_options(DINOv2)) < set(method_options(DINOv3))
    assert method_options(DINOv3)["num_patch_prototypes"].default == 65_536


def test_a_checkpoint_contains_the_progress(tmp_path):
    method, other = build(), build(seed=1)
    change_weights(method, 0.25)
    optimizer = create_optimizer(method, TrainConfig())
    checkpoint.save_training_state(tmp_path / "x", method, optimizer, {"step": 1})
    checkpoint.load_method_state(tmp_path / "x", other)
    assert other.last_progress == 0.25


def build_student(**choices):
    torch.manual_seed(2)
    known = method_options(DINOv3)
    options = {k: v for k, v in SMALL.items() if k in known} | {"gram_loss_weight": 0.0, "hidden_dim": 24}
    return DINOv3(nano(**choices), **options)


def test_distillation_trains_the_student_and_keeps_the_teacher_frozen():
    student = build_student()
    student.set_distillation_teacher(build())
    teacher, encoder = copy.deepcopy(student.teacher), copy.deepcopy(student.encoder)
    config = TrainConfig(lr=1e-3, warmup_fraction=0.0, precision="fp32")
    optimizer, losses = create_optimizer(student, config), []
    student.train()
    assert not student.teacher["encoder"].training
    for i in range(12):
        seed_step(0, 0)
        losses.append(training_step(student, optimizer, batch(), i / 12, config)["loss"].item())
    assert equal_weights(teacher, student.teacher)
    assert not equal_weights(encoder, student.encoder)
    assert losses[-1] < losses[0] - 0.05
    assert {k for k, p in student.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert student.target_probs(torch.randn(2, student.encoder.embed_dim)) is None


def test_the_ema_encoder_of_a_distillation_has_the_students_running_statistics():
    student = build_student(stem="conv")
    student.set_distillation_teacher(build())
    config = TrainConfig(lr=1e-3, warmup_fraction=0.0, precision="fp32")
    training_step(student.train(), create_optimizer(student, config), batch(), 0.0, config)
    ema, trained = dict(student.encoder.named_buffers()), dict(student.student["encoder"].named_buffers())
    assert any("running_var" in name and not torch.equal(x, torch.ones_like(x)) for name, x in ema.items())
    assert all(torch.equal(x, trained[name]) for name, x in ema.items())


def test_a_teacher_with_other_heads_is_rejected():
    with pytest.raises(InputError, match="--num_prototypes"):
        build(num_prototypes=48).set_distillation_teacher(build())


def test_a_teacher_of_another_method_is_rejected():
    with pytest.raises(InputError, match="SimCLR"):
        build().set_distillation_teacher(SimCLR(tiny_vit()))
    with pytest.raises(InputError, match="--teacher"):
        SimCLR(tiny_vit()).set_distillation_teacher(build())
