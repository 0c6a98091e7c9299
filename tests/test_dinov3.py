"""DINOv3's losses are the authors', number for number, and its anchor holds what it is for."""

import copy

import pytest
import torch
import torch.nn.functional as F

from minissl import checkpoint, train
from minissl.augment import normalize
from minissl.balance import sinkhorn_knopp
from minissl.encoders import make_encoder
from minissl.errors import InputError
from minissl.method import find, options
from minissl.methods.dino import cross_view_entropy
from minissl.methods.dinov2 import DINOv2
from minissl.methods.dinov3 import DINOv3, bring_down, gram_loss
from tests.golden import shake, wave
from tests.test_contract import SMALL, batch

STUDENT, ANCHOR = wave(2, 5, 8), wave(2, 5, 8, c=0.9, phase=0.2)
GRAM = [  # per image, and all patches of the batch with all
    ({}, 0.09403699, 0.35115761),
    ({"negatives": "drop"}, 0.02033243, 0.12131894),
    ({"negatives": "drop anchor's"}, 0.12645595, 0.43801993),
    ({"normalize": False}, 1.68827450, 5.83778334),
]


@pytest.mark.parametrize(("how", "by_image", "whole"), GRAM)
def test_gram_loss_is_the_authors(how, by_image, whole):
    assert gram_loss(STUDENT, ANCHOR, **how).item() == pytest.approx(by_image, rel=1e-6)
    flat = (x.flatten(0, 1)[None] for x in (STUDENT, ANCHOR))
    assert gram_loss(*flat, **how).item() == pytest.approx(whole, rel=1e-6)


def test_gram_loss_is_its_plain_loops_in_value_and_gradient():
    student, anchor = STUDENT.clone().requires_grad_(), ANCHOR.clone().requires_grad_()
    total = 0.0
    for ours, theirs in zip(student, anchor.detach()):
        for i in range(5):
            for j in range(5):
                total += (
                    F.cosine_similarity(ours[i], ours[j], dim=0) - F.cosine_similarity(theirs[i], theirs[j], dim=0)
                ) ** 2
    (expected,) = torch.autograd.grad(total / 50, student)
    loss = gram_loss(student, anchor)
    torch.testing.assert_close(loss, total / 50)
    loss.backward()
    torch.testing.assert_close(student.grad, expected)
    assert anchor.grad is None


def test_gram_loss_asks_who_is_like_whom_and_nothing_else():
    turned, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert gram_loss(3 * STUDENT @ turned, STUDENT).item() == pytest.approx(0, abs=1e-12)
    assert gram_loss(STUDENT, STUDENT @ torch.randn(8, 30, dtype=torch.float64)).item() > 1e-3  # another width is fine


def test_a_finer_map_is_brought_down_by_the_authors_interpolation():
    found = bring_down(wave(4, 4, c=1.3)[None, :, :, None].float(), (2, 2)).flatten()
    torch.testing.assert_close(found, torch.tensor([0.10478, 0.29437, -0.72011, 0.43022]), rtol=0, atol=1e-5)


def test_the_class_tokens_loss_is_the_authors():
    target = sinkhorn_knopp(wave(6, 8, c=0.9, phase=0.2), 0.07).view(2, 3, 8)
    assert cross_view_entropy(wave(2, 3, 8), target).item() == pytest.approx(9.09590816, rel=1e-6)
    views = wave(4, 3, 8, c=0.4)
    whole, half, none = (cross_view_entropy(views, target, local_weight=w).item() for w in (1.0, 0.5, 0.0))
    shared = cross_view_entropy(views[:2], target).item()
    assert none == pytest.approx(shared * 2 / 6)  # of 6 pairs, 2 are of large crops: the local ones leave their share
    assert half == pytest.approx((whole + none) / 2)


def build(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = make_encoder("nano", 4, 16, positions="rotary", registers=2)
    return DINOv3(encoder, **{k: v for k, v in SMALL.items() if k in options(DINOv3)} | changes)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def step(method, progress):
    """What a step does to the weights, without its loss."""
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(0.01)
    method.after_step(progress)


def test_the_anchor_becomes_the_teacher_when_it_is_told_to():
    method = build(anchor_at=(0.3, 0.6), momentum=0.9)
    moved = []
    for i in range(10):
        before = copy.deepcopy(method.anchor.network)
        step(method, i / 10)
        moved.append(not same(before, method.anchor.network))
        assert moved[-1] == same(method.anchor.network, method.teacher["encoder"].network)
    assert [i for i, m in enumerate(moved) if m] == [3, 6]


def test_the_anchor_stays_when_nothing_is_asked_of_it():
    method = build(anchor_at=())
    before = copy.deepcopy(method.anchor.network)
    for i in range(4):
        step(method, i / 4)
    assert same(before, method.anchor.network)


def test_a_run_that_is_gone_on_with_does_not_move_the_anchor_twice():
    method, other = build(anchor_at=(0.2,)), build(seed=1, anchor_at=(0.2,))
    step(method, 0.1)
    step(method, 0.2)
    other.load_state_dict(method.state_dict())
    step(other, 0.3)
    assert same(method.anchor.network, other.anchor.network)


def test_a_run_that_starts_from_the_end_of_another_counts_from_its_own_beginning():
    method, other = build(anchor_at=(0.0,)), build(seed=1, anchor_at=(0.0,))
    step(method, 0.9)
    other.load_state_dict(method.state_dict())
    step(other, 0.0)
    assert same(other.anchor.network, other.teacher["encoder"].network)


def test_without_an_anchor_and_its_weight_it_is_dinov2():
    """The same networks: but for the last layers, which DINOv3 takes as they are, so here both do."""
    method = build(gram=0.0, local_weight=1.0)
    torch.manual_seed(0)
    other = DINOv2(make_encoder("nano", 4, 16, positions="rotary", registers=2), **{
        k: v for k, v in SMALL.items() if k in options(DINOv2)
    })  # fmt: skip
    for part in (*other.student.values(), *(t.network for t in other.teacher.values())):
        part.cosines = False
    other.load_state_dict({k: v for k, v in method.state_dict().items() if "anchor" not in k and "extra" not in k})
    losses = []
    for each in (method, other):
        train.seed_step(0, 1)
        losses.append(each.loss(batch(), 0.5))
    assert losses[0] == losses[1]


def test_the_terms_rise_when_they_should():
    method = build(gram=2.0, gram_from=0.5, gram_rise=0.2, local_weight=0.5)
    found = []
    for progress in (0.4, 0.6, 0.8):
        train.seed_step(0, 1)
        terms = method.loss(batch(), progress)
        assert ("gram" in terms) == (progress > 0.5)
        found.append(terms)
    plain = build(gram=2.0, gram_from=2.0)
    train.seed_step(0, 1)
    alone = plain.loss(batch(), 0.8)
    local = alone["loss"] - found[2]["loss"] + 2.0 * found[2]["gram"]
    assert local > 0  # what half of the local pairs' weight took away
    assert "gram" not in alone
    assert found[1]["gram"] == found[2]["gram"]
    gained = found[1]["loss"] - 1.0 * found[1]["gram"]  # at half the rise both are half way
    torch.testing.assert_close(gained, alone["loss"] - local / 2, rtol=1e-4, atol=1e-4)


def test_the_anchor_holds_the_patches_likeness():
    """The same steps on the class token's loss alone: with the anchor the cosines of patches stay nearer to it."""
    images, apart = batch(16, 16), []
    for weight in (0.0, 20.0):
        method = build(gram=weight, gram_rise=0.0, ibot=0.0, anchor_at=(), anchor_scale=1.0, local_crops=0)
        method.anchor.follow(shake(method.student["encoder"]), 0.0)
        config = train.TrainConfig(batch_size=16, lr=2e-3, warmup=0.0, precision="fp32")
        optimizer = train.make_optimizer(method, config)
        for i in range(10):
            train.seed_step(0, i)
            train.training_step(method, optimizer, images, i / 10, config)
        seen = normalize(images.images)
        with torch.no_grad():
            patches = (part(seen).patches.flatten(1, 2) for part in (method.student["encoder"].eval(), method.anchor))
            apart.append(gram_loss(*patches).item())
    assert apart[1] < 0.5 * apart[0]


def test_sizes_are_mixed_as_often_as_asked(monkeypatch):
    seen = []
    method = build(mixed=((16, 8, 0.75), (24, 12, 0.25)), anchor_scale=1.5)
    monkeypatch.setattr(method.anchor.network, "forward", lambda x: seen.append(x.shape[-1]) or F)
    monkeypatch.setattr("minissl.methods.dinov3.gram_loss", lambda *x: torch.zeros(()))
    monkeypatch.setattr("minissl.methods.dinov3.bring_down", lambda *x: torch.zeros(1, 1, 1, 1))
    monkeypatch.setattr(F, "patches", None, raising=False)
    for i in range(60):
        train.seed_step(0, i)
        method.loss(batch(2, 30), 0.5)
    assert set(seen) == {24, 36}
    assert seen.count(24) == pytest.approx(45, abs=9)


def test_its_options_are_its_own_and_dinov2s():
    assert set(options(find("dinov2"))) < set(options(DINOv3))
    assert options(DINOv3)["patch_prototypes"].default == 65_536


def test_a_checkpoint_keeps_how_far_it_was(tmp_path):
    method, other = build(), build(seed=1)
    step(method, 0.25)
    checkpoint.save_training(tmp_path / "x", method, train.make_optimizer(method, train.TrainConfig()), {"step": 1})
    checkpoint.load_method(tmp_path / "x", other)
    assert other.passed == 0.25


def test_distillation_moves_a_smaller_encoder_and_nothing_else():
    master = build()
    torch.manual_seed(2)
    small = DINOv3(make_encoder("nano", 4, 16, positions="rotary"), **{
        k: v for k, v in SMALL.items() if k in options(DINOv3)
    } | {"gram": 0.0, "hidden": 24})  # fmt: skip
    small.learn_from(master)
    kept, before = copy.deepcopy(small.teacher), copy.deepcopy(small.encoder)
    config = train.TrainConfig(lr=1e-3, warmup=0.0, precision="fp32")
    optimizer, losses = train.make_optimizer(small, config), []
    small.train()
    assert not small.teacher["encoder"].training
    for i in range(12):
        train.seed_step(0, 0)
        losses.append(train.training_step(small, optimizer, batch(), i / 12, config)["loss"].item())
    assert same(kept, small.teacher)
    assert not same(before, small.encoder)
    assert losses[-1] < losses[0] - 0.05
    assert {k for k, p in small.named_parameters() if p.requires_grad and p.grad is None} == set()


def test_what_a_distillation_keeps_has_the_running_statistics_of_its_student():
    torch.manual_seed(2)
    small = DINOv3(make_encoder("nano", 4, 16, positions="rotary", stem="conv"), **{
        k: v for k, v in SMALL.items() if k in options(DINOv3)
    } | {"gram": 0.0, "hidden": 24})  # fmt: skip
    small.learn_from(build())
    config = train.TrainConfig(lr=1e-3, warmup=0.0, precision="fp32")
    train.training_step(small.train(), train.make_optimizer(small, config), batch(), 0.0, config)
    kept, learnt = dict(small.encoder.named_buffers()), dict(small.student["encoder"].named_buffers())
    assert any("running_var" in name and not torch.equal(x, torch.ones_like(x)) for name, x in kept.items())
    assert all(torch.equal(x, learnt[name]) for name, x in kept.items())


def test_a_teacher_with_other_heads_is_refused():
    with pytest.raises(InputError, match="prototypes"):
        build(prototypes=48).learn_from(build())
