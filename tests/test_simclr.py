"""SimCLR's loss is the paper's and lightly's, its head is Google's, and the method feeds it two views."""

import math
import warnings

import pytest
import torch
from torch import nn

from minissl.method import Batch
from minissl.methods.simclr import ProjectionHead, SimCLR, nt_xent
from tests.golden import tiny_vit, wave


def by_loops(z1, z2, temperature):
    """Equation 1, view by view: a view's partner against all views but itself."""
    views = [z / z.norm() for z in [*z1, *z2]]
    total = 0.0
    for i, view in enumerate(views):
        scores = [view.dot(other) / temperature for other in views]
        partner = scores[(i + len(z1)) % len(views)]
        total = total - partner + sum(score.exp() for j, score in enumerate(scores) if j != i).log()
    return total / len(views)


def two_views(b=5, p=7):
    """Vectors of two views that want a gradient."""
    dice = torch.Generator().manual_seed(0)
    return [torch.randn(b, p, generator=dice, dtype=torch.float64).mul_(3).requires_grad_() for _ in range(2)]


def assert_same_value_and_gradient(found, expected, views):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(loss, views) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 1.36053224), (0.1, 1.24435718), (0.07, 1.45774209)])
def test_loss_equals_the_golden_numbers(temperature, expected):
    found = nt_xent(wave(4, 8), wave(4, 8, phase=0.5), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("b", "temperature"), [(1, 0.5), (2, 1.0), (5, 0.5), (9, 0.07)])
def test_loss_and_gradient_equal_the_loops(b, temperature):
    views = two_views(b)
    assert_same_value_and_gradient(nt_xent(*views, temperature), by_loops(*views, temperature), views)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_loss_and_gradient_equal_lightlys(temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.loss import NTXentLoss
    views = two_views(16, 12)
    expected = NTXentLoss(temperature=temperature)(*views)
    assert_same_value_and_gradient(nt_xent(*views, temperature), expected, views)


def test_knowing_nothing_costs_the_logarithm_of_the_candidates():
    assert nt_xent(torch.ones(6, 4), torch.ones(6, 4), 0.1).item() == pytest.approx(math.log(11), rel=1e-6)


def test_partners_that_agree_far_from_the_others_cost_nothing():
    assert nt_xent(torch.eye(6), torch.eye(6), 0.05).item() == pytest.approx(0, abs=1e-6)
    assert nt_xent(torch.eye(6), torch.eye(6).roll(1, 0), 0.05).item() > 10


def test_only_directions_count():
    z1, z2 = two_views()
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(nt_xent(z1 * lengths, 9 * z2), nt_xent(z1, z2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("layers", "widths"), [(2, [12, 24, 6]), (3, [12, 24, 24, 6])])
def test_the_head_has_as_many_layers_as_asked_for(layers, widths):
    head = ProjectionHead(12, 24, 6, layers)
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] + [linear[-1].out_features] == widths
    assert head(torch.randn(5, 12)).shape == (5, 6)


def test_with_two_layers_the_head_is_googles():
    """Linear without bias, batch norm, ReLU, linear without bias, batch norm; as wide as the encoder inside."""
    layers = SimCLR(tiny_vit()).projector.layers
    assert [type(m) for m in layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert layers[0].bias is None
    assert layers[3].bias is None
    assert layers[0].weight.shape == (32, 32)
    assert layers[3].weight.shape == (128, 32)
    assert SimCLR(tiny_vit(), hidden=48).projector.layers[0].weight.shape == (48, 32)


def test_nothing_is_cut_or_shifted_at_the_end_of_the_head():
    torch.manual_seed(0)
    found = ProjectionHead(12, 24, 6)(torch.randn(50, 12) + 3)
    torch.testing.assert_close(found.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    assert (found < 0).any(0).all()


@pytest.mark.parametrize("layers", [2, 3])
def test_the_last_norms_bias_stays_zero(layers):
    torch.manual_seed(0)
    head = ProjectionHead(12, 24, 6, layers)
    head(torch.randn(5, 12)).square().sin().sum().backward()
    without = [name for name, p in head.named_parameters() if p.grad is None]
    assert without == [f"layers.{len(head.layers) - 1}.bias"]
    assert not head.layers[-1].bias.any()


def test_the_loss_is_that_of_the_two_views(monkeypatch):
    torch.manual_seed(0)
    method = SimCLR(tiny_vit(), size=16, scale=(0.3, 0.9), strength=0.7, blur=0.2, temperature=0.3, projection=8)
    images, views, asked = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8), torch.randn(8, 3, 16, 16), []
    monkeypatch.setattr("minissl.methods.simclr.simclr", lambda x, **how: asked.append((x, how)) or views)
    terms = method.loss(Batch(images), 0.0)
    assert asked == [(images, {"size": 16, "scale": (0.3, 0.9), "strength": 0.7, "blur": 0.2})]
    z = method.projector(method.encoder(views).cls)
    z1, z2 = z[:4], z[4:]
    assert set(terms) == {"loss", "partners"}
    torch.testing.assert_close(terms["loss"], nt_xent(z1, z2, 0.3))
    torch.testing.assert_close(
        terms["partners"], torch.stack([torch.cosine_similarity(*p, 0) for p in zip(z1, z2)]).mean()
    )
    assert not terms["partners"].requires_grad


def test_two_equal_views_are_partners(monkeypatch):
    torch.manual_seed(0)
    views = torch.randn(4, 3, 16, 16).repeat(2, 1, 1, 1)
    monkeypatch.setattr("minissl.methods.simclr.simclr", lambda x, **how: views)
    terms = SimCLR(tiny_vit(), size=16).loss(Batch(torch.zeros(4, 3, 16, 16, dtype=torch.uint8)), 0.0)
    assert terms["partners"].item() == pytest.approx(1, abs=1e-5)
