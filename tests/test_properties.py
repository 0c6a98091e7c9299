"""Properties that every correct loss has: bounds, invariances, sums.

Hypothesis generates the cases, the same ones in every run. Every loss is called as a function of two sides, `a` and
`b`, whose last axis is that of the features. Where a property must not hold, its absence is tested. Properties of
teachers, schedules, views and runs are in `test_properties_runs`.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minissl.methods.clip import clip_loss
from minissl.methods.dino import center_and_sharpen, dino_loss, update_center
from minissl.methods.dinov2 import ibot_patch_loss
from minissl.methods.dinov3 import gram_loss
from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from minissl.methods.mae import masked_pixel_loss
from minissl.methods.simclr import nt_xent
from minissl.models.vit import patchify, unpatchify

deterministic = settings(max_examples=12, deadline=None, derandomize=True)
seeds, unit_interval, numbers = st.integers(0, 2**32), st.floats(0, 1), st.floats(-10, 10)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_sides(seed, shape):
    return normal(seed, 2, *shape).unbind()


def random_rotation(seed, d):
    """Return an orthogonal matrix (d, d)."""
    return torch.linalg.qr(normal(seed, d, d))[0]


def close(a, b, tolerance=1e-6):
    return math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance)


def entropy(p):
    return torch.special.entr(p).sum(-1)


def longer_half(x):
    """Return a mask of the longer half of the vectors, which rotation, common scaling and permutation do not change."""
    return x.norm(dim=-1) > x.norm(dim=-1).median()


def dino(a, b, temperature=0.3):
    return dino_loss(a, b[:2].softmax(-1), temperature)


def ibot(a, b, temperature=0.3):
    mask = longer_half(b)
    return ibot_patch_loss(a[mask], b.softmax(-1)[mask], mask, temperature)


def mae(a, b, normalize=True):
    return masked_pixel_loss(a, unpatchify(b, 2, (2, 2)), longer_half(b), 2, normalize)


mae_unnormalized = partial(mae, normalize=False)


def simclr(a, b):
    return nt_xent(a, b, 0.3)


def clip(a, b):
    return clip_loss(a, b, 3.0)


def koleo(a, b):
    return koleo_loss(a)


gram_unnormalized = partial(gram_loss, normalize=False)
# loss: (shape of a side, axis of the images, invariant to a common rotation, invariant to lengths of a's vectors)
LOSSES = {
    simclr: ((6, 5), 0, True, True),
    clip: ((6, 5), 0, True, True),
    koleo: ((6, 5), 0, True, True),
    gram_loss: ((6, 8, 5), 0, True, True),
    gram_unnormalized: ((6, 8, 5), 0, True, False),
    dino: ((4, 6, 5), 1, False, False),  # a rotation mixes the prototypes
    ibot: ((6, 8, 5), 0, False, False),
    mae: ((6, 4, 12), 0, False, False),  # subtracting the mean removes a fixed direction
    mae_unnormalized: ((6, 4, 12), 0, True, False),
}
each_loss = pytest.mark.parametrize(
    ("loss", "shape", "axis", "rotation_invariant", "scale_invariant"), [(k, *v) for k, v in LOSSES.items()]
)


@each_loss
@deterministic
@given(seeds, st.permutations(range(6)))
def test_a_loss_is_invariant_to_a_common_permutation_of_the_images_only(
    loss, shape, axis, rotation_invariant, scale_invariant, seed, order
):
    a, b = two_sides(seed, shape)
    index = torch.tensor(order)
    assert close(loss(a, b), loss(a.index_select(axis, index), b.index_select(axis, index)))
    assert close(loss(a, b), loss(a.roll(1, axis), b)) == (loss is koleo)


@each_loss
@deterministic
@given(seeds)
def test_a_loss_of_angles_or_distances_is_invariant_to_a_common_rotation(
    loss, shape, axis, rotation_invariant, scale_invariant, seed
):
    a, b = two_sides(seed, shape)
    q = random_rotation(seed + 1, shape[-1])
    assert close(loss(a, b), loss(a @ q, b @ q)) == rotation_invariant
    compares_within_a_side = loss in (koleo, gram_loss, gram_unnormalized)
    assert close(loss(a, b), loss(a @ q, b)) == compares_within_a_side


@each_loss
@deterministic
@given(seeds)
def test_a_loss_that_normalizes_is_invariant_to_the_lengths_of_the_vectors(
    loss, shape, axis, rotation_invariant, scale_invariant, seed
):
    a, b = two_sides(seed, shape)
    lengths = normal(seed + 1, *shape[:-1], 1).exp()
    assert close(loss(a, b), loss(a * lengths, b)) == scale_invariant


@deterministic
@given(seeds)
def test_losses_are_symmetric_in_their_sides_or_not(seed):
    a, b = two_sides(seed, (6, 8, 5))
    for loss in (simclr, clip):
        assert close(loss(a[0], b[0]), loss(b[0], a[0]))
    assert close(gram_loss(a, b), gram_loss(b, a))
    assert close(gram_loss(a, b, "drop"), gram_loss(b, a, "drop"))
    assert not close(gram_loss(a, b, "drop anchor's"), gram_loss(b, a, "drop anchor's"))
    assert not close(dino(a, b), dino(b, a))
    assert not close(ibot(a, b), ibot(b, a))
    swapped = [1, 0, *range(2, 6)]  # the global views: of student and teacher at once, or else the local views
    assert close(dino(a, b), dino(a[swapped], b[swapped]))
    assert close(dino(a, b), dino(a[[0, 1, 5, 3, 4, 2]], b))
    assert not close(dino(a, b), dino(a[swapped], b))


@deterministic
@given(seeds, st.floats(0.05, 2), st.integers(2, 9))
def test_contrastive_losses_are_bounded_by_the_extreme_similarities(seed, temperature, b):
    """In the best case the positive has cosine 1 and the negatives -1, in the worst case the other way round."""
    x, y = normal(seed, 2, b, 3).unbind()
    losses = (nt_xent(x, y, temperature), 2 * b - 2), (clip_loss(x, y, 1 / temperature), b - 1)
    for loss, num_negatives in losses:
        low, high = (math.log1p(num_negatives * math.exp(sign * 2 / temperature)) for sign in (-1, 1))
        assert low - 1e-9 <= loss <= high + 1e-9
    opposite = torch.stack([x[0], -x[0]])
    assert close(nt_xent(opposite, opposite, temperature), math.log1p(2 * math.exp(-2 / temperature)))
    assert close(clip_loss(opposite, -opposite, 1 / temperature), math.log1p(math.exp(2 / temperature)))


@deterministic
@given(seeds, st.floats(0.05, 1))
def test_cross_entropy_is_at_least_the_entropy_of_the_targets_and_reaches_it(seed, temperature):
    """It is reached by the logarithm of the targets."""
    logits = normal(seed, 4, 6, 5) * 3
    targets = logits[:2].softmax(-1)
    assert dino(normal(seed + 1, 4, 6, 5), logits, temperature) >= entropy(targets).mean()
    equal = targets[:1].expand(4, -1, -1)
    assert close(dino_loss(temperature * equal.log(), equal[:2], temperature), entropy(equal).mean())
    mask = normal(seed + 2, 6, 8) > 0
    targets = (normal(seed, 6, 8, 5) * 3).softmax(-1)
    minimum = sum(entropy(t[m]).mean() for t, m in zip(targets, mask) if m.any()) / 6
    assert ibot_patch_loss(normal(seed + 1, 6, 8, 5)[mask], targets[mask], mask, temperature) >= minimum
    assert close(ibot_patch_loss(temperature * targets[mask].log(), targets[mask], mask, temperature), minimum)


@deterministic
@given(seeds)
def test_a_perfect_output_has_a_loss_of_zero(seed):
    orthogonal = random_rotation(seed, 6)
    assert nt_xent(orthogonal, 2 * orthogonal, 0.01) < 1e-9
    assert clip_loss(orthogonal, 2 * orthogonal, 100.0) < 1e-9
    x = normal(seed, 6, 4, 12)
    assert gram_loss(x, 3 * x @ random_rotation(seed + 1, 12)) < 1e-20
    assert mae_unnormalized(x, x) < 1e-20
    assert mae((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True), x) < 1e-9
    one_hot = F.one_hot(torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(seed)), 5).double()
    assert dino(100 * one_hot.expand(4, 6, 5), 100 * one_hot.expand(4, 6, 5)) < 1e-9
    patches = 100 * one_hot[:, None] * torch.arange(1, 9)[:, None]
    assert ibot(patches, patches) < 1e-9


@deterministic
@given(seeds)
def test_koleo_and_gram_losses_are_bounded(seed):
    """Unit vectors are at most 2 apart, and their cosines differ by at most 2."""
    x, y = normal(seed, 2, 6, 8, 3).unbind()
    assert koleo_loss(x[0]) >= -math.log(2) - 1e-6
    assert close(koleo_loss(torch.stack([x[0, 0], 1e-5 * x[0, 1] - x[0, 0]])), -math.log(2))
    assert koleo_loss(torch.cat([x[0], x[0] + 1e-3])) > koleo_loss(x[0])  # near-duplicates raise the loss
    assert 0 <= gram_loss(x, y) <= 4


@deterministic
@given(seeds)
def test_the_masked_pixel_loss_depends_on_masked_patches_only_and_normalized_on_their_pattern_only(seed):
    a, b = two_sides(seed, (6, 4, 12))
    images, mask = unpatchify(b, 2, (2, 2)), longer_half(b)
    assert torch.equal(patchify(images, 2), b)
    changed_elsewhere = a + normal(seed + 1, 6, 4, 12) * ~mask[..., None]
    assert close(mae(a, b), mae(changed_elsewhere, b))
    brighter = b * (1 + normal(seed + 2, 6, 4, 1).abs()) + normal(seed + 3, 6, 4, 1)  # and of a higher contrast
    brighter = unpatchify(brighter, 2, (2, 2))
    assert close(masked_pixel_loss(a, images, mask, 2), masked_pixel_loss(a, brighter, mask, 2), 1e-4)
    assert not close(*(masked_pixel_loss(a, x, mask, 2, normalize=False) for x in (images, brighter)))


@deterministic
@given(seeds, numbers)
def test_a_constant_added_to_all_logits_does_not_change_a_softmax(seed, constant):
    a, b = two_sides(seed, (4, 6, 5))
    assert close(dino(a, b), dino(a + constant * normal(seed + 1, 4, 6, 1), b))
    assert close(ibot(a, b), ibot(a + constant * normal(seed + 1, 4, 6, 1), b))
    center = normal(seed + 2, 5)
    targets = center_and_sharpen(b, center, 0.3)
    assert close(targets.sum(-1).sub(1).abs().max(), 0)
    torch.testing.assert_close(targets, center_and_sharpen(b + constant, center, 0.3))
    torch.testing.assert_close(targets, center_and_sharpen(b + constant * center, center + constant * center, 0.3))
    changed = center_and_sharpen(b + constant * center, center, 0.3)
    assert not torch.allclose(targets, changed) or abs(constant) < 1e-3


@deterministic
@given(seeds, st.integers(3, 12), st.integers(2, 6), st.floats(0.5, 1))
def test_sinkhorn_knopp_assigns_all_prototypes_equally(seed, n, k, temperature):
    logits = normal(seed, n, k)
    three_iterations, converged = (sinkhorn_knopp(logits, temperature, iterations) for iterations in (3, 300))
    assert (converged > 0).all()
    for q in (converged, three_iterations):
        torch.testing.assert_close(q.sum(1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(converged.sum(0), torch.full((k,), n / k, dtype=torch.float64), rtol=1e-3, atol=0)
    biased = sinkhorn_knopp(logits + normal(seed + 1, k), temperature)  # a constant per prototype has no effect
    torch.testing.assert_close(three_iterations, biased)
    rows, columns = (torch.randperm(x, generator=torch.Generator().manual_seed(seed)) for x in (n, k))
    permuted = sinkhorn_knopp(logits[rows][:, columns], temperature)
    torch.testing.assert_close(three_iterations[rows][:, columns], permuted)
    assert (three_iterations - three_iterations.mean(0)).abs().max() > 1e-4  # assignments differ between images


@deterministic
@given(seeds, unit_interval)
def test_the_center_moves_to_the_mean_of_the_batch_whatever_its_order(seed, momentum):
    center, logits = normal(seed, 1, 5), normal(seed + 1, 2, 6, 5)
    updated, mean = update_center(center, logits, momentum), logits.mean((0, 1))
    assert (updated >= torch.minimum(center, mean) - 1e-12).all()
    assert (updated <= torch.maximum(center, mean) + 1e-12).all()
    torch.testing.assert_close(updated - mean, momentum * (center - mean))
    torch.testing.assert_close(updated, update_center(center, logits.flip(1), momentum))
    torch.testing.assert_close(update_center(mean[None], logits, momentum), mean[None])
