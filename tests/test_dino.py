"""DINO's loss, centre and head are the authors', number for number."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from minissl.balance import koleo, sinkhorn_knopp
from minissl.errors import InputError
from minissl.method import Batch
from minissl.methods.dino import DINO, DINOHead, center_and_sharpen, cross_view_entropy, update_center
from minissl.train import seed_step
from tests.golden import tiny_vit, wave


def by_loops(student, teacher, temperature):
    """The paper's equation 3, pair by pair, image by image."""
    total, pairs = 0.0, 0
    for g in range(len(teacher)):
        for v in range(len(student)):
            if v == g:
                continue
            pairs += 1
            for b in range(student.shape[1]):
                scores = student[v, b] / temperature
                scores = scores - scores.exp().sum().log()
                total = total - (teacher[g, b] * scores).sum() / student.shape[1]
    return total / pairs


def test_loss_and_center_equal_the_authors():
    student, teacher = 2 * wave(4, 3, 16), 2 * wave(2, 3, 16, c=0.9, phase=0.2)
    center = 0.1 * wave(1, 16, c=0.3)
    loss = cross_view_entropy(student, center_and_sharpen(teacher, center, 0.055), 0.1)
    assert loss.item() == pytest.approx(20.42619324, rel=1e-8)
    moved = update_center(center, teacher, 0.9)
    first = torch.tensor([0.02952958, 0.04329170, 0.04204365, 0.04289632], dtype=torch.float64)
    torch.testing.assert_close(moved[0, :4], first, rtol=0, atol=1e-8)
    assert moved.sum().item() == pytest.approx(0.36289691, abs=1e-8)


@pytest.mark.parametrize(("views", "targets"), [(2, 2), (6, 2), (3, 1), (5, 3)])
def test_loss_and_gradient_equal_the_loops(views, targets):
    torch.manual_seed(views)
    student = torch.randn(views, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(targets, 3, 7, dtype=torch.float64).softmax(-1)
    fast, slow = cross_view_entropy(student, teacher, 0.3), by_loops(student, teacher, 0.3)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(fast, student), torch.autograd.grad(slow, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_loss_and_gradient_equal_lightlys():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.loss import DINOLoss
    torch.manual_seed(0)
    theirs = DINOLoss(output_dim=32, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=1)
    teacher = torch.randn(2, 5, 32)
    views = torch.randn(6, 5, 32, requires_grad=True)
    expected = theirs(list(teacher), list(views), epoch=0)
    found = cross_view_entropy(views, center_and_sharpen(teacher, torch.zeros(1, 32), 0.04), 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found, views)[0], torch.autograd.grad(expected, views)[0], rtol=1e-4, atol=1e-6
    )


def test_knowing_nothing_costs_ln_k():
    uniform = torch.full((2, 4, 64), 1 / 64)
    assert cross_view_entropy(torch.zeros(5, 4, 64), uniform).item() == pytest.approx(math.log(64), rel=1e-6)


def test_agreeing_on_one_prototype_costs_nothing():
    one = F.one_hot(torch.zeros(2, 4, dtype=torch.long), 8).float()
    assert cross_view_entropy(100 * one.repeat(2, 1, 1), one).item() == pytest.approx(0, abs=1e-6)


def test_no_gradient_flows_into_the_teacher():
    logits = torch.randn(2, 3, 8, requires_grad=True)
    assert not center_and_sharpen(logits, torch.zeros(1, 8), 0.04).requires_grad
    assert not update_center(torch.zeros(1, 8), logits).requires_grad


def test_head_gives_cosines_whatever_the_prototypes_lengths():
    torch.manual_seed(0)
    head = DINOHead(16, 10, hidden=32, bottleneck=8)
    x = torch.randn(6, 16)
    before = head(x)
    assert before.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.last_layer.weight.mul_(torch.rand(10, 1) * 5 + 0.1)
    torch.testing.assert_close(head(x), before)


def test_head_equals_torchs_weight_norm_with_length_one():
    torch.manual_seed(0)
    head = DINOHead(16, 10, hidden=32, bottleneck=8)
    last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 10, bias=False))
    last.parametrizations.weight.original0.data.fill_(1)
    last.parametrizations.weight.original1.data.copy_(head.last_layer.weight.data)
    x = torch.randn(6, 16)
    expected = last(F.normalize(head.mlp(x), dim=-1))
    torch.testing.assert_close(head(x), expected)


def test_frozen_prototypes_get_no_gradient_and_give_the_same_values():
    torch.manual_seed(0)
    head, x = DINOHead(16, 10, hidden=32, bottleneck=8), torch.randn(6, 16)
    torch.testing.assert_close(head(x, freeze_last=True), head(x))
    head(x, freeze_last=True).sum().backward()
    assert head.last_layer.weight.grad is None
    assert head.mlp[0].weight.grad is not None


def small_dino(**options):
    torch.manual_seed(0)
    small = {"size": 16, "local_size": 8, "local_crops": 2, "prototypes": 32, "hidden": 16, "bottleneck": 8}
    return DINO(tiny_vit(), **small | options)


def test_a_step_uses_the_center_before_it_moves_it(monkeypatch):
    """The loss of a step is that of the old centre; the new centre is the teacher's mean, 0.1 of it."""
    method, images = small_dino(), torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8)
    seen = {}
    monkeypatch.setattr(
        "minissl.methods.dino.center_and_sharpen",
        lambda t, c, *others: seen.update(t=t, c=c.clone()) or center_and_sharpen(t, c, *others),
    )
    method.loss(Batch(images), 0.0)
    assert seen["c"].abs().sum() == 0
    torch.testing.assert_close(method.center, 0.1 * seen["t"].mean((0, 1)).view(1, -1))


def test_the_teacher_starts_as_the_student_and_follows_it():
    method = small_dino(momentum=0.5)
    student, teacher = method.student["encoder"].cls_token, method.encoder.cls_token
    torch.testing.assert_close(student, teacher)
    with torch.no_grad():
        student.add_(1)
    before = teacher.clone()
    method.after_step(0.0)
    torch.testing.assert_close(teacher, before + 0.5)


def test_batch_norm_in_the_head_is_each_networks_own():
    head = DINOHead(16, 10, hidden=32, bottleneck=8, batch_norm=True).eval()
    x = torch.randn(64, 16)
    torch.testing.assert_close(head(x), head(3 * x + 1), rtol=1e-2, atol=1e-2)  # a shift and a scale are forgotten


def test_koleo_is_taken_crop_by_crop_of_the_students_class_tokens():
    method = DINO(tiny_vit(), size=16, local_crops=0, prototypes=8, hidden=8, bottleneck=4, koleo=0.5)
    batch = Batch(torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8), None)
    seen = []
    method.student["encoder"].register_forward_hook(lambda layer, inputs, output: seen.append(output.cls))
    terms = method.loss(batch, 0.5)
    assert terms["koleo"].item() == pytest.approx(sum(koleo(crop) for crop in seen[0].split(4)).item())


def test_with_sinkhorn_the_prototypes_of_a_batch_are_used_equally():
    torch.manual_seed(0)
    options = {"size": 16, "local_crops": 0, "prototypes": 4, "hidden": 8, "bottleneck": 4}
    method = DINO(tiny_vit(), **options, sinkhorn=20, teacher_temperature=0.1, warmup_temperature=0.1)
    batch, logits = Batch(torch.randint(0, 256, (8, 3, 20, 20), dtype=torch.uint8), None), []
    method.teacher["head"].register_forward_hook(lambda layer, inputs, output: logits.append(output))
    entropy = method.loss(batch, 0.5)["teacher_entropy"]
    q = sinkhorn_knopp(logits[0], 0.1, 20)
    torch.testing.assert_close(q.sum(0), torch.full((4,), 4.0), rtol=0.02, atol=0)
    torch.testing.assert_close(entropy, torch.special.entr(q).sum(-1).mean())


def test_without_stop_gradient_the_targets_move_the_student():
    """As if student and teacher were one network: the gradient through both is that of their common weights."""
    method = small_dino(momentum=0.0, stop_gradient=False, local_crops=0)
    batch = Batch(torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8))

    def gradients():
        method.zero_grad()
        method.center.zero_()
        seed_step(0, 0)
        method.loss(batch, 0.5)["loss"].backward()
        return {name: p.grad.clone() for name, p in method.student.named_parameters()}

    leaking = gradients()
    assert all(p.grad is None for p in method.teacher.parameters())
    method.ask_teacher = lambda views: method.student["head"](method.student["encoder"](views).cls)
    for name, gradient in gradients().items():
        torch.testing.assert_close(leaking[name], gradient, rtol=1e-4, atol=1e-6)
    method.stop_gradient = True
    assert (gradients()["head.mlp.0.weight"] - leaking["head.mlp.0.weight"]).abs().max() > 1e-4


def test_sinkhorn_without_stop_gradient_is_refused():
    with pytest.raises(InputError, match="--sinkhorn 0"):
        small_dino(sinkhorn=3, stop_gradient=False)


def test_the_loss_is_the_same_under_autocast():
    student, target = 5 + torch.randn(4, 6, 32), torch.randn(2, 6, 32).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_view_entropy(student, target)
    assert torch.equal(found, cross_view_entropy(student, target))


def test_the_loss_is_the_teachers_entropy_and_the_distance_to_it():
    """What the collapse lab draws: H(teacher, student) = H(teacher) + KL(teacher | student)."""
    student, target = torch.randn(4, 6, 32), torch.randn(2, 6, 32).softmax(-1)
    scores = (student / 0.1).log_softmax(-1)
    apart = [(target[g] * (target[g].log() - scores[v])).sum(-1).mean() for g in (0, 1) for v in range(4) if v != g]
    entropy = torch.special.entr(target).sum(-1).mean()
    torch.testing.assert_close(cross_view_entropy(student, target), entropy + torch.stack(apart).mean())
