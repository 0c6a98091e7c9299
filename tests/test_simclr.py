"""NT-Xent equals the paper and lightly, the projection head equals Google's, and the method feeds it two views."""

import math
import warnings

import pytest
import torch
from torch import nn

from minissl.data.batch import Batch
from minissl.methods.simclr import ProjectionHead, SimCLR, nt_xent
from tests.golden import tiny_vit, wave


def nt_xent_by_loops(z1, z2, temperature):
    """Equation 1, view by view: the positive against all views but the view itself."""
    views = [z / z.norm() for z in [*z1, *z2]]
    total = 0.0
    for i, view in enumerate(views):
        logits = [view.dot(other) / temperature for other in views]
        positive = logits[(i + len(z1)) % len(views)]
        total = total - positive + sum(logit.exp() for j, logit in enumerate(logits) if j != i).log()
    return total / len(views)


def random_projections(b=5, p=7):
    """Return projections of two views that require a gradient, (b, p) each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, p, generator=generator, dtype=torch.float64).mul_(3).requires_grad_() for _ in range(2)]


def assert_same_value_and_gradient(loss, expected, inputs):
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients, expected_gradients = (torch.autograd.grad(x, inputs) for x in (loss, expected))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 1.36053224), (0.1, 1.24435718), (0.07, 1.45774209)])
def test_loss_equals_the_golden_numbers(temperature, expected):
    loss = nt_xent(wave(4, 8), wave(4, 8, phase=0.5), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("b", "temperature"), [(1, 0.5), (2, 1.0), (5, 0.5), (9, 0.07)])
def test_loss_and_gradient_equal_loops(b, temperature):
    z = random_projections(b)
    assert_same_value_and_gradient(nt_xent(*z, temperature), nt_xent_by_loops(*z, temperature), z)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_loss_and_gradient_equal_lightly(temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.loss import NTXentLoss
    z = random_projections(16, 12)
    assert_same_value_and_gradient(nt_xent(*z, temperature), NTXentLoss(temperature=temperature)(*z), z)


def test_equal_projections_have_a_loss_of_ln_of_the_candidates():
    assert nt_xent(torch.ones(6, 4), torch.ones(6, 4), 0.1).item() == pytest.approx(math.log(11), rel=1e-6)


def test_equal_positives_orthogonal_to_all_negatives_have_a_loss_of_0():
    assert nt_xent(torch.eye(6), torch.eye(6), 0.05).item() == pytest.approx(0, abs=1e-6)
    assert nt_xent(torch.eye(6), torch.eye(6).roll(1, 0), 0.05).item() > 10


def test_loss_is_invariant_to_the_lengths_of_projections():
    z1, z2 = random_projections()
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(nt_xent(z1 * lengths, 9 * z2), nt_xent(z1, z2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("num_layers", "widths"), [(2, [12, 24, 6]), (3, [12, 24, 24, 6])])
def test_head_has_the_given_number_of_layers(num_layers, widths):
    head = ProjectionHead(12, 24, 6, num_layers)
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] + [linear[-1].out_features] == widths
    assert head(torch.randn(5, 12)).shape == (5, 6)


def test_head_with_two_layers_equals_googles():
    """Linear without bias, batch norm, ReLU, linear without bias, batch norm; the hidden width is the encoder's."""
    layers = SimCLR(tiny_vit()).projector.layers
    assert [type(m) for m in layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert layers[0].bias is None
    assert layers[3].bias is None
    assert layers[0].weight.shape == (32, 32)
    assert layers[3].weight.shape == (128, 32)
    assert SimCLR(tiny_vit(), hidden_dim=48).projector.layers[0].weight.shape == (48, 32)


def test_projections_are_centered_and_not_rectified():
    torch.manual_seed(0)
    projections = ProjectionHead(12, 24, 6)(torch.randn(50, 12) + 3)
    torch.testing.assert_close(projections.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    assert (projections < 0).any(0).all()


@pytest.mark.parametrize("num_layers", [2, 3])
def test_the_last_norms_bias_is_not_trained(num_layers):
    torch.manual_seed(0)
    head = ProjectionHead(12, 24, 6, num_layers)
    head(torch.randn(5, 12)).square().sin().sum().backward()
    without_gradient = [name for name, p in head.named_parameters() if p.grad is None]
    assert without_gradient == [f"layers.{len(head.layers) - 1}.bias"]
    assert not head.layers[-1].bias.any()


def test_loss_is_nt_xent_of_two_views(monkeypatch):
    torch.manual_seed(0)
    options = {"crop_size": 16, "crop_scale": (0.3, 0.9), "jitter_strength": 0.7, "blur_prob": 0.2}
    method = SimCLR(tiny_vit(), **options, temperature=0.3, projection_dim=8)
    images, views, calls = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8), torch.randn(8, 3, 16, 16), []
    monkeypatch.setattr("minissl.methods.simclr.simclr_views", lambda *args: calls.append(args) or views)
    terms = method.loss(Batch(images), 0.0)
    assert calls == [(images, 16, (0.3, 0.9), 0.7, 0.2)]
    z = method.projector(method.encoder(views).cls)
    z1, z2 = z[:4], z[4:]
    assert set(terms) == {"loss", "positive_similarity"}
    torch.testing.assert_close(terms["loss"], nt_xent(z1, z2, 0.3))
    similarities = torch.stack([torch.cosine_similarity(*pair, 0) for pair in zip(z1, z2)])
    torch.testing.assert_close(terms["positive_similarity"], similarities.mean())
    assert not terms["positive_similarity"].requires_grad


def test_equal_views_have_a_positive_similarity_of_1(monkeypatch):
    torch.manual_seed(0)
    views = torch.randn(4, 3, 16, 16).repeat(2, 1, 1, 1)
    monkeypatch.setattr("minissl.methods.simclr.simclr_views", lambda *args: views)
    terms = SimCLR(tiny_vit(), crop_size=16).loss(Batch(torch.zeros(4, 3, 16, 16, dtype=torch.uint8)), 0.0)
    assert terms["positive_similarity"].item() == pytest.approx(1, abs=1e-5)
