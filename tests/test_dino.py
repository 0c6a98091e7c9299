"""DINO's loss and center equal the authors'; a step uses them as the paper describes."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from minissl.data.batch import Batch
from minissl.errors import InputError
from minissl.methods.dino import DINO, center_and_sharpen, dino_loss, update_center
from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from minissl.models.heads import DINOHead
from minissl.training.sampler import seed_step
from tests.golden import tiny_vit, wave


def dino_loss_by_loops(student_logits, teacher_probs, temperature):
    """Equation 3, pair by pair, image by image."""
    total, num_pairs = 0.0, 0
    for g in range(len(teacher_probs)):
        for v in range(len(student_logits)):
            if v == g:
                continue
            num_pairs += 1
            for b in range(student_logits.shape[1]):
                logits = student_logits[v, b] / temperature
                log_probs = logits - logits.exp().sum().log()
                total = total - (teacher_probs[g, b] * log_probs).sum() / student_logits.shape[1]
    return total / num_pairs


def test_loss_and_center_equal_the_golden_numbers():
    student, teacher = 2 * wave(4, 3, 16), 2 * wave(2, 3, 16, c=0.9, phase=0.2)
    center = 0.1 * wave(1, 16, c=0.3)
    loss = dino_loss(student, center_and_sharpen(teacher, center, 0.055), 0.1)
    assert loss.item() == pytest.approx(20.42619324, rel=1e-8)
    updated = update_center(center, teacher, 0.9)
    expected = torch.tensor([0.02952958, 0.04329170, 0.04204365, 0.04289632], dtype=torch.float64)
    torch.testing.assert_close(updated[0, :4], expected, rtol=0, atol=1e-8)
    assert updated.sum().item() == pytest.approx(0.36289691, abs=1e-8)


@pytest.mark.parametrize(("views", "targets"), [(2, 2), (6, 2), (3, 1), (5, 3)])
def test_loss_and_gradient_equal_loops(views, targets):
    torch.manual_seed(views)
    student = torch.randn(views, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(targets, 3, 7, dtype=torch.float64).softmax(-1)
    fast, slow = dino_loss(student, teacher, 0.3), dino_loss_by_loops(student, teacher, 0.3)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    (fast_gradient,), (slow_gradient,) = torch.autograd.grad(fast, student), torch.autograd.grad(slow, student)
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-10, atol=1e-12)


def test_loss_and_gradient_equal_lightly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.loss import DINOLoss
    torch.manual_seed(0)
    reference = DINOLoss(output_dim=32, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=1)
    teacher = torch.randn(2, 5, 32)
    views = torch.randn(6, 5, 32, requires_grad=True)
    expected = reference(list(teacher), list(views), epoch=0)
    loss = dino_loss(views, center_and_sharpen(teacher, torch.zeros(1, 32), 0.04), 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, views), torch.autograd.grad(expected, views)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_uniform_outputs_have_a_loss_of_ln_k():
    uniform = torch.full((2, 4, 64), 1 / 64)
    assert dino_loss(torch.zeros(5, 4, 64), uniform).item() == pytest.approx(math.log(64), rel=1e-6)


def test_equal_one_hot_outputs_have_a_loss_of_0():
    one_hot = F.one_hot(torch.zeros(2, 4, dtype=torch.long), 8).float()
    assert dino_loss(100 * one_hot.repeat(2, 1, 1), one_hot).item() == pytest.approx(0, abs=1e-6)


def test_targets_and_center_have_no_gradient():
    logits = torch.randn(2, 3, 8, requires_grad=True)
    assert not center_and_sharpen(logits, torch.zeros(1, 8), 0.04).requires_grad
    assert not update_center(torch.zeros(1, 8), logits).requires_grad


def test_loss_is_the_same_under_autocast():
    student, target = 5 + torch.randn(4, 6, 32), torch.randn(2, 6, 32).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_loss(student, target)
    assert torch.equal(loss, dino_loss(student, target))


def test_loss_is_the_teachers_entropy_plus_the_kl_divergence():
    student, target = torch.randn(4, 6, 32), torch.randn(2, 6, 32).softmax(-1)
    log_probs = (student / 0.1).log_softmax(-1)
    divergences = [
        (target[g] * (target[g].log() - log_probs[v])).sum(-1).mean() for g in (0, 1) for v in range(4) if v != g
    ]
    entropy = torch.special.entr(target).sum(-1).mean()
    torch.testing.assert_close(dino_loss(student, target), entropy + torch.stack(divergences).mean())


def test_head_equals_torchs_weight_norm_with_norm_1():
    torch.manual_seed(0)
    head = DINOHead(16, 10, hidden_dim=32, bottleneck_dim=8)
    last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 10, bias=False))
    last.parametrizations.weight.original0.data.fill_(1)
    last.parametrizations.weight.original1.data.copy_(head.last_layer.weight.data)
    x = torch.randn(6, 16)
    torch.testing.assert_close(head(x), last(F.normalize(head.mlp(x), dim=-1)))
    torch.testing.assert_close(head(x, freeze_last_layer=True), head(x))


def build(**options):
    torch.manual_seed(0)
    sizes = {"crop_size": 16, "local_crop_size": 8, "num_local_crops": 2}
    return DINO(tiny_vit(), **sizes | {"num_prototypes": 32, "hidden_dim": 16, "bottleneck_dim": 8} | options)


def noise_batch(n=4):
    return Batch(torch.randint(0, 256, (n, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_a_step_uses_the_center_before_its_update(monkeypatch):
    method, recorded = build(), {}

    def record(logits, center, *others):
        recorded.update(logits=logits, center=center.clone())
        return center_and_sharpen(logits, center, *others)

    monkeypatch.setattr("minissl.methods.dino.center_and_sharpen", record)
    method.loss(noise_batch(), 0.0)
    assert recorded["center"].abs().sum() == 0
    torch.testing.assert_close(method.center, 0.1 * recorded["logits"].mean((0, 1)).view(1, -1))


def test_teacher_starts_as_the_student_and_is_its_ema():
    method = build(teacher_momentum=0.5)
    student, teacher = method.student["encoder"].cls_token, method.encoder.cls_token
    torch.testing.assert_close(student, teacher)
    with torch.no_grad():
        student.add_(1)
    before = teacher.clone()
    method.after_step(0.0)
    torch.testing.assert_close(teacher, before + 0.5)


def test_batch_norms_of_the_head_use_batch_statistics():
    head = DINOHead(16, 10, hidden_dim=32, bottleneck_dim=8, use_bn=True).eval()
    x = torch.randn(64, 16)
    torch.testing.assert_close(head(x), head(3 * x + 1), rtol=1e-2, atol=1e-2)  # invariant to shift and scale


def test_koleo_is_computed_for_each_global_crop_of_the_students_class_tokens():
    method, cls_tokens = build(num_local_crops=0, koleo_loss_weight=0.5), []
    method.student["encoder"].register_forward_hook(lambda layer, inputs, output: cls_tokens.append(output.cls))
    terms = method.loss(noise_batch(), 0.5)
    expected = sum(koleo_loss(crop) for crop in cls_tokens[0].split(4))
    assert terms["koleo"].item() == pytest.approx(expected.item())


def test_sinkhorn_knopp_uses_the_prototypes_of_a_batch_equally():
    options = {"num_local_crops": 0, "num_prototypes": 4, "teacher_temp": 0.1, "warmup_teacher_temp": 0.1}
    method, logits = build(**options, sinkhorn_iterations=20), []
    method.teacher["head"].register_forward_hook(lambda layer, inputs, output: logits.append(output))
    entropy = method.loss(noise_batch(8), 0.5)["teacher_entropy"]
    q = sinkhorn_knopp(logits[0], 0.1, 20)
    torch.testing.assert_close(q.sum(0), torch.full((4,), 4.0), rtol=0.02, atol=0)
    torch.testing.assert_close(entropy, torch.special.entr(q).sum(-1).mean())


def test_without_stop_gradient_the_gradient_is_that_of_tied_weights():
    """Student and teacher then act as one network: the gradient through both is that of their common weights."""
    method = build(teacher_momentum=0.0, stop_gradient=False, num_local_crops=0)

    def gradients():
        method.zero_grad()
        method.center.zero_()
        seed_step(0, 0)
        method.loss(noise_batch(), 0.5)["loss"].backward()
        return {name: p.grad.clone() for name, p in method.student.named_parameters()}

    through_teacher = gradients()
    assert all(p.grad is None for p in method.teacher.parameters())
    method.teacher_logits = lambda views: method.student["head"](method.student["encoder"](views).cls)
    for name, gradient in gradients().items():
        torch.testing.assert_close(through_teacher[name], gradient, rtol=1e-4, atol=1e-6)
    method.stop_gradient = True
    name = "head.mlp.0.weight"
    assert (gradients()[name] - through_teacher[name]).abs().max() > 1e-4


def test_sinkhorn_knopp_without_stop_gradient_is_rejected():
    with pytest.raises(InputError, match="--sinkhorn_iterations 0"):
        build(sinkhorn_iterations=3, stop_gradient=False)


@pytest.mark.parametrize("sinkhorn_iterations", [0, 3])
def test_target_probs_use_the_final_temperature_and_the_center_unless_sinkhorn_is_used(sinkhorn_iterations):
    method = build(teacher_temp=0.05, warmup_teacher_temp=0.2, sinkhorn_iterations=sinkhorn_iterations)
    method.center.normal_()
    features = torch.randn(6, 32)
    logits = method.teacher["head"].network(features)
    center = 0 if sinkhorn_iterations else method.center
    torch.testing.assert_close(method.target_probs(features), ((logits - center) / 0.05).softmax(-1))
