"""What has to be true of any right loss: bounds, invariances, sums.

Hypothesis draws the cases, the same ones every time. Every loss is asked as one of two sides, `a` and `b`, whose last
axis is that of the features; where a property must not hold, it is tested that it does not. What has to be true of
teachers, schedules, views and runs is in `test_properties_runs`.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from minissl.methods.clip import clip_loss
from minissl.methods.dino import center_and_sharpen, dino_loss, update_center
from minissl.methods.dinov2 import ibot_patch_loss
from minissl.methods.dinov3 import gram_loss
from minissl.methods.mae import masked_pixel_loss
from minissl.methods.simclr import nt_xent
from minissl.models.vit import patchify, unpatchify

stable = settings(max_examples=12, deadline=None, derandomize=True)
seeds, unit, value = st.integers(0, 2**32), st.floats(0, 1), st.floats(-10, 10)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sides(seed, shape):
    return normal(seed, 2, *shape).unbind()


def turn(seed, d):
    """An orthogonal matrix (d, d)."""
    return torch.linalg.qr(normal(seed, d, d))[0]


def same(one, other, within=1e-6):
    return math.isclose(float(one), float(other), rel_tol=within, abs_tol=within)


def entropy(p):
    return torch.special.entr(p).sum(-1)


def long(x):
    """Which vectors are, about half of them; it is the same however they are turned, scaled alike or ordered."""
    return x.norm(dim=-1) > x.norm(dim=-1).median()


def dino(a, b, temperature=0.3):
    return dino_loss(a, b[:2].softmax(-1), temperature)


def ibot(a, b, temperature=0.3):
    return ibot_patch_loss(a[long(b)], b.softmax(-1)[long(b)], long(b), temperature)


def mae(a, b, normalize=True):
    return masked_pixel_loss(a, unpatchify(b, 2, (2, 2)), long(b), 2, normalize)


plain_mae = partial(mae, normalize=False)


def contrast(a, b):
    return nt_xent(a, b, 0.3)


def clip(a, b):
    return clip_loss(a, b, 3.0)


def spread(a, b):
    return koleo_loss(a)


products = partial(gram_loss, normalize=False)
#        loss: (shape of a side, axis of the images, same when both are turned, same when vectors of `a` are scaled)
LOSSES = {
    contrast: ((6, 5), 0, True, True),
    clip: ((6, 5), 0, True, True),
    spread: ((6, 5), 0, True, True),
    gram_loss: ((6, 8, 5), 0, True, True),
    products: ((6, 8, 5), 0, True, False),
    dino: ((4, 6, 5), 1, False, False),  # prototypes are not directions one may turn
    ibot: ((6, 8, 5), 0, False, False),
    mae: ((6, 4, 12), 0, False, False),  # the mean that is taken off is a direction
    plain_mae: ((6, 4, 12), 0, True, False),
}
every_loss = pytest.mark.parametrize(("loss", "shape", "axis", "turns", "scales"), [(k, *v) for k, v in LOSSES.items()])


@every_loss
@stable
@given(seeds, st.permutations(range(6)))
def test_the_order_of_the_images_counts_on_one_side_only(loss, shape, axis, turns, scales, seed, order):
    a, b = sides(seed, shape)
    assert same(loss(a, b), loss(a.index_select(axis, torch.tensor(order)), b.index_select(axis, torch.tensor(order))))
    assert same(loss(a, b), loss(a.roll(1, axis), b)) == (loss is spread)


@every_loss
@stable
@given(seeds)
def test_features_may_be_turned_together_where_only_angles_or_distances_count(loss, shape, axis, turns, scales, seed):
    a, b = sides(seed, shape)
    q = turn(seed + 1, shape[-1])
    assert same(loss(a, b), loss(a @ q, b @ q)) == turns
    alone = loss in (spread, gram_loss, products)  # each side is compared within itself
    assert same(loss(a, b), loss(a @ q, b)) == alone


@every_loss
@stable
@given(seeds)
def test_vectors_may_be_longer_where_they_are_normalised(loss, shape, axis, turns, scales, seed):
    a, b = sides(seed, shape)
    assert same(loss(a, b), loss(a * normal(seed + 1, *shape[:-1], 1).exp(), b)) == scales


@stable
@given(seeds)
def test_what_is_symmetric_and_what_is_not(seed):
    a, b = sides(seed, (6, 8, 5))
    for loss in (contrast, clip):
        assert same(loss(a[0], b[0]), loss(b[0], a[0]))
    assert same(gram_loss(a, b), gram_loss(b, a))
    assert same(gram_loss(a, b, "drop"), gram_loss(b, a, "drop"))
    assert not same(gram_loss(a, b, "drop anchor's"), gram_loss(b, a, "drop anchor's"))
    assert not same(dino(a, b), dino(b, a))
    assert not same(ibot(a, b), ibot(b, a))
    views = [1, 0, *range(2, 6)]  # the teacher's views may change places, if the student's do; the others anyway
    assert same(dino(a, b), dino(a[views], b[views]))
    assert same(dino(a, b), dino(a[[0, 1, 5, 3, 4, 2]], b))
    assert not same(dino(a, b), dino(a[views], b))


@stable
@given(seeds, st.floats(0.05, 2), st.integers(2, 9))
def test_contrasts_lie_between_perfect_and_hopeless(seed, temperature, b):
    """A partner's cosine is at most 1, another's at least -1, and the other way round."""
    x, y = normal(seed, 2, b, 3).unbind()
    for found, others in ((nt_xent(x, y, temperature), 2 * b - 2), (clip_loss(x, y, 1 / temperature), b - 1)):
        low, high = (math.log1p(others * math.exp(sign * 2 / temperature)) for sign in (-1, 1))
        assert low - 1e-9 <= found <= high + 1e-9
    ends = torch.stack([x[0], -x[0]])
    assert same(nt_xent(ends, ends, temperature), math.log1p(2 * math.exp(-2 / temperature)))
    assert same(clip_loss(ends, -ends, 1 / temperature), math.log1p(math.exp(2 / temperature)))


@stable
@given(seeds, st.floats(0.05, 1))
def test_no_student_is_below_the_entropy_of_its_targets_and_their_own_logarithm_reaches_it(seed, temperature):
    logits = normal(seed, 4, 6, 5) * 3
    targets = logits[:2].softmax(-1)
    assert dino(normal(seed + 1, 4, 6, 5), logits, temperature) >= entropy(targets).mean()
    one = targets[:1].expand(4, -1, -1)
    assert same(dino_loss(temperature * one.log(), one[:2], temperature), entropy(one).mean())
    mask = normal(seed + 2, 6, 8) > 0
    targets = (normal(seed, 6, 8, 5) * 3).softmax(-1)
    least = sum(entropy(t[m]).mean() for t, m in zip(targets, mask) if m.any()) / 6
    assert ibot_patch_loss(normal(seed + 1, 6, 8, 5)[mask], targets[mask], mask, temperature) >= least
    assert same(ibot_patch_loss(temperature * targets[mask].log(), targets[mask], mask, temperature), least)


@stable
@given(seeds)
def test_what_is_perfect_costs_nothing(seed):
    apart = turn(seed, 6)  # six directions at right angles
    assert nt_xent(apart, 2 * apart, 0.01) < 1e-9
    assert clip_loss(apart, 2 * apart, 100.0) < 1e-9
    x = normal(seed, 6, 4, 12)
    assert gram_loss(x, 3 * x @ turn(seed + 1, 12)) < 1e-20
    assert plain_mae(x, x) < 1e-20
    assert mae((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True), x) < 1e-9
    sure = 100 * F.one_hot(torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(seed)), 5).double()
    assert dino(sure.expand(4, 6, 5), sure.expand(4, 6, 5)) < 1e-9
    patches = sure[:, None] * torch.arange(1, 9)[:, None]
    assert ibot(patches, patches) < 1e-9


@stable
@given(seeds)
def test_vectors_cannot_be_further_apart_than_opposite_nor_their_cosines(seed):
    x, y = normal(seed, 2, 6, 8, 3).unbind()
    assert koleo_loss(x[0]) >= -math.log(2) - 1e-6
    assert same(koleo_loss(torch.stack([x[0, 0], 1e-5 * x[0, 1] - x[0, 0]])), -math.log(2))
    assert koleo_loss(torch.cat([x[0], x[0] + 1e-3])) > koleo_loss(x[0])  # the more crowded the worse
    assert 0 <= gram_loss(x, y) <= 4


@stable
@given(seeds)
def test_only_the_pixels_that_were_hidden_count_and_of_each_patch_its_pattern(seed):
    a, b = sides(seed, (6, 4, 12))
    images, hidden = unpatchify(b, 2, (2, 2)), long(b)
    assert torch.equal(patchify(images, 2), b)
    elsewhere = a + normal(seed + 1, 6, 4, 12) * ~hidden[..., None]
    assert same(mae(a, b), mae(elsewhere, b))
    other = b * (1 + normal(seed + 2, 6, 4, 1).abs()) + normal(seed + 3, 6, 4, 1)  # brighter, and of more contrast
    brighter = unpatchify(other, 2, (2, 2))
    assert same(masked_pixel_loss(a, images, hidden, 2), masked_pixel_loss(a, brighter, hidden, 2), 1e-4)
    assert not same(*(masked_pixel_loss(a, x, hidden, 2, normalize=False) for x in (images, brighter)))


@stable
@given(seeds, value)
def test_a_softmax_does_not_see_what_is_added_to_all(seed, more):
    a, b = sides(seed, (4, 6, 5))
    assert same(dino(a, b), dino(a + more * normal(seed + 1, 4, 6, 1), b))
    assert same(ibot(a, b), ibot(a + more * normal(seed + 1, 4, 6, 1), b))
    center = normal(seed + 2, 5)
    targets = center_and_sharpen(b, center, 0.3)
    assert same(targets.sum(-1).sub(1).abs().max(), 0)
    torch.testing.assert_close(targets, center_and_sharpen(b + more, center, 0.3))
    torch.testing.assert_close(targets, center_and_sharpen(b + more * center, center + more * center, 0.3))
    assert not torch.allclose(targets, center_and_sharpen(b + more * center, center, 0.3)) or abs(more) < 1e-3


@stable
@given(seeds, st.integers(3, 12), st.integers(2, 6), st.floats(0.5, 1))
def test_sinkhorn_knopp_shares_out_the_prototypes_evenly(seed, n, k, temperature):
    logits = normal(seed, n, k)
    few, q = (sinkhorn_knopp(logits, temperature, iterations) for iterations in (3, 300))
    assert (q > 0).all()
    for found in (q, few):
        torch.testing.assert_close(found.sum(1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.full((k,), n / k, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(few, sinkhorn_knopp(logits + normal(seed + 1, k), temperature))  # favours of prototypes
    rows, columns = (torch.randperm(x, generator=torch.Generator().manual_seed(seed)) for x in (n, k))
    torch.testing.assert_close(few[rows][:, columns], sinkhorn_knopp(logits[rows][:, columns], temperature))
    assert (few - few.mean(0)).abs().max() > 1e-4  # and yet it says of each image something of its own


@stable
@given(seeds, unit)
def test_the_center_moves_towards_the_mean_whatever_the_order(seed, momentum):
    center, logits = normal(seed, 1, 5), normal(seed + 1, 2, 6, 5)
    moved, mean = update_center(center, logits, momentum), logits.mean((0, 1))
    assert (moved >= torch.minimum(center, mean) - 1e-12).all()
    assert (moved <= torch.maximum(center, mean) + 1e-12).all()
    torch.testing.assert_close(moved - mean, momentum * (center - mean))
    torch.testing.assert_close(moved, update_center(center, logits.flip(1), momentum))
    torch.testing.assert_close(update_center(mean[None], logits, momentum), mean[None])
