"""Sinkhorn-Knopp and KoLeo equal the authors' code, other libraries and plain loops."""

import pytest
import torch

from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from tests.golden import wave


def test_koleo_loss_equals_the_golden_numbers():
    assert koleo_loss(wave(5, 8)).item() == pytest.approx(0.42841986, abs=1e-7)
    assert koleo_loss(wave(1, 8)).item() == pytest.approx(17.0782267, abs=1e-4)
    assert koleo_loss(wave(1, 8).expand(2, 8)).item() == pytest.approx(17.0782267, abs=1e-4)


def test_koleo_loss_and_its_gradient_equal_loops_and_lightly():
    from lightly.loss import KoLeoLoss

    torch.manual_seed(0)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    unit = [row / row.norm() for row in x]
    slow = 0.0
    for i, row in enumerate(unit):
        distances = [(row - other + 1e-8).norm() for j, other in enumerate(unit) if j != i]
        slow = slow - min(distances, key=lambda d: d.item()).log() / len(unit)
    fast = koleo_loss(x)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-7)
    (gradient,) = torch.autograd.grad(fast, x)
    for expected in (slow, KoLeoLoss()(x)):
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-5, atol=1e-7)


def test_koleo_loss_is_the_same_under_autocast():
    x = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(x)
    assert torch.equal(loss, koleo_loss(x))


def test_sinkhorn_knopp_equals_the_golden_numbers():
    q = sinkhorn_knopp(wave(6, 8, c=0.9, phase=0.2), 0.07)
    row = [1.7152e-5, 0.33337560, 0.66656083, 2.4700e-5, 7.7856e-11, 2.96e-13, 8.41e-11, 2.1704e-5]
    torch.testing.assert_close(q[0], torch.tensor(row, dtype=torch.float64), rtol=1e-3, atol=1e-8)
    columns = [0.67647, 0.66177, 0.66677, 0.81802, 0.87459, 0.85606, 0.77187, 0.67445]
    torch.testing.assert_close(q.sum(0), torch.tensor(columns, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(q.sum(1), torch.ones(6, dtype=torch.float64))


def test_sinkhorn_knopp_equals_alternating_normalization():
    torch.manual_seed(0)
    logits = torch.randn(12, 5, dtype=torch.float64)
    q = (logits / 0.3).exp().T
    q = q / q.sum()
    for _ in range(4):
        q = q / q.sum(1, keepdim=True) / 5
        q = q / q.sum(0, keepdim=True) / 12
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.3, 4), (q * 12).T, rtol=1e-10, atol=1e-12)


def test_sinkhorn_knopp_does_not_overflow_where_exponentials_would():
    logits = torch.tensor([[1000.0, 0.0, -7.0], [0.0, 1000.0, -7.0], [0.0, 0.0, -7.0]])
    q = sinkhorn_knopp(logits, 0.07)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(3))
