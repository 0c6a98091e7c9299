"""The DINO head: cosines with normalized prototypes, or a linear last layer as in DINOv3."""

import pytest
import torch

from minissl.models.heads import DINOHead


def test_logits_are_cosines_with_the_prototypes():
    torch.manual_seed(0)
    head, x = DINOHead(32, 64, 16, 8), torch.randn(5, 3, 32)
    logits = head(x)
    assert logits.shape == (5, 3, 64)
    assert logits.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.last_layer.weight.mul_(100)
    torch.testing.assert_close(head(x), logits)


def test_unnormalized_prototypes_start_small_and_logits_are_unbounded():
    torch.manual_seed(0)
    head, x = DINOHead(32, 64, 16, 8, normalize_prototypes=False), torch.randn(500, 32)
    assert head(x).std().item() == pytest.approx(0.02, rel=0.2)
    with torch.no_grad():
        before = head(x)
        head.last_layer.weight.mul_(100)
    torch.testing.assert_close(head(x), 100 * before)


def test_a_frozen_last_layer_gets_no_gradient():
    head = DINOHead(32, 64, 16, 8)
    head(torch.randn(5, 32), freeze_last_layer=True).sum().backward()
    assert head.last_layer.weight.grad is None
    assert head.mlp[0].weight.grad.abs().sum() > 0
