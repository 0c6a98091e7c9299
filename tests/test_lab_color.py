"""Lab equals scikit-image's; the color bins cover sRGB; mixtures of bins equal the paper's formulas."""

import itertools
import warnings

import pytest
import torch

from minissl.data.transforms.lab_color import (
    annealed_mean,
    gamut_bins,
    lab_to_rgb,
    rebalancing_weights,
    rgb_to_lab,
    soft_encode,
)

CORNERS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).mT.view(1, 3, 2, 4)  # black, white, the primaries


def sample_images(dtype):
    """Return noise, dark noise, and the corners of the RGB cube, (3, 3, 2, 4)."""
    noise = torch.rand(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, noise / 20, CORNERS]).to(dtype)


def sample_ab(n):
    """Return points in the (a, b) plane, (n, 2)."""
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 160 - 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rgb_to_lab_equals_scikit_image(dtype):
    from skimage.color import rgb2lab

    expected = torch.from_numpy(rgb2lab(sample_images(torch.float64).numpy(), channel_axis=1))
    torch.testing.assert_close(rgb_to_lab(sample_images(dtype)).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lab_to_rgb_equals_scikit_image(dtype):
    """Includes a dark blue with a negative Z, and colors outside of sRGB, which are clipped."""
    from skimage.color import lab2rgb

    noise = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lab = noise * torch.tensor([100.0, 200, 200]).view(3, 1, 1) - torch.tensor([0.0, 100, 100]).view(3, 1, 1)
    lab[1] = lab[1] * torch.tensor([0.3, 0.1, 0.1]).view(3, 1, 1)
    lab[0, :, 0, 0] = torch.tensor([5.0, 0, 100])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.from_numpy(lab2rgb(lab.numpy(), channel_axis=1))
    rgb = lab_to_rgb(lab.to(dtype)).double()
    torch.testing.assert_close(rgb, expected, rtol=0, atol=1e-3)
    assert rgb.min() == 0
    assert rgb.max() == 1


def test_lab_to_rgb_inverts_rgb_to_lab():
    images = sample_images(torch.float32)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(images)), images, rtol=0, atol=1e-3)


def test_gray_has_no_chroma_and_lightness_from_0_to_100():
    gray = torch.linspace(0, 1, 11).view(1, 1, 1, 11).expand(-1, 3, -1, -1)
    lab = rgb_to_lab(gray)
    assert lab[:, 1:].abs().max() < 0.02
    assert lab[0, 0, 0, 0].item() == pytest.approx(0, abs=1e-4)
    assert lab[0, 0, 0, -1].item() == pytest.approx(100, abs=1e-3)
    assert (lab[0, 0, 0].diff() > 0).all()


def test_gradients_are_finite_at_black():
    black = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (to_lab,) = torch.autograd.grad(rgb_to_lab(black).sum(), black)
    (to_rgb,) = torch.autograd.grad(lab_to_rgb(black).sum(), black)
    assert to_lab.isfinite().all()
    assert to_rgb.isfinite().all()
    assert to_lab.all()  # so that optimization can leave black


def test_every_8_bit_color_has_a_bin():
    """Tries random colors, and as many on the surface of the RGB cube, which are the most saturated."""
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(256, (3, 400_000), generator=generator)
    colors[0, ::2] = torch.randint(2, (200_000,), generator=generator) * 255
    bins = set(map(tuple, gamut_bins().tolist()))
    ab = rgb_to_lab(colors.float()[None, :, None] / 255)[0, 1:, 0].mT
    occupied = set(map(tuple, ((ab / 10).round() * 10).unique(dim=0).tolist()))
    assert occupied <= bins
    assert len(occupied) > 0.97 * len(bins)


def test_bins_are_unique_and_on_a_grid_of_10():
    bins = gamut_bins()
    assert 250 <= len(bins) <= 270
    assert len(bins.unique(dim=0)) == len(bins)
    assert torch.equal(bins, (bins / 10).round() * 10)
    assert (bins == 0).all(1).any()


@pytest.mark.parametrize(("n", "sigma"), [(5, 5.0), (3, 9.0), (1, 5.0)])
def test_soft_encode_equals_loops(n, sigma):
    bins = gamut_bins().double()
    index, weights = soft_encode(sample_ab(40), bins, n, sigma)
    assert index.shape == weights.shape == (40, n)
    for point, chosen, mixture in zip(sample_ab(40), index, weights):
        squared = [((point - b) ** 2).sum() for b in bins]
        nearest = sorted(range(len(bins)), key=lambda q: squared[q].item())[:n]
        expected = torch.stack([(-squared[q] / (2 * sigma**2)).exp() for q in nearest])
        assert chosen.tolist() == nearest
        torch.testing.assert_close(mixture, expected / expected.sum(), rtol=1e-9, atol=1e-12)


def test_soft_encode_is_the_same_under_autocast():
    bins, ab = gamut_bins(), sample_ab(500).float()
    with torch.autocast("cpu", torch.bfloat16):
        index, weights = soft_encode(ab, bins)
    expected_index, expected_weights = soft_encode(ab, bins)
    assert torch.equal(index, expected_index)
    assert torch.equal(weights, expected_weights)


def test_rare_bins_have_larger_weights_with_mean_1_over_pixels():
    fractions = torch.tensor([0.6, 0.3, 0.09, 0.01, 0.0])
    weights = rebalancing_weights(fractions)
    assert (fractions * weights).sum().item() == pytest.approx(1)
    assert (weights[:4].diff() > 0).all()
    assert weights[4] == 0


def test_rebalancing_weights_equal_equation_4():
    """1 / ((1 - m) p + m / Q), scaled; Q counts the bins with pixels."""
    fractions = torch.tensor([0.5, 0.0, 0.4, 0.1], dtype=torch.float64)
    plain = [1 / (0.75 * p + 0.25 / 3) if p else 0.0 for p in fractions.tolist()]
    mean = sum(p * w for p, w in zip(fractions.tolist(), plain))
    assert rebalancing_weights(fractions, 0.25).tolist() == pytest.approx([w / mean for w in plain])


def test_equally_frequent_bins_have_equal_weights():
    torch.testing.assert_close(rebalancing_weights(torch.full((8,), 1 / 8)), torch.ones(8))


def test_annealed_mean_goes_from_the_mean_to_the_mode():
    bins = gamut_bins()
    logits = torch.randn(2, 3, len(bins), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(annealed_mean(logits, bins, 1e6), bins.mean(0).expand(2, 3, 2), rtol=0, atol=1e-2)
    torch.testing.assert_close(annealed_mean(logits, bins, 1e-4), bins[logits.argmax(-1)], rtol=0, atol=1e-3)
    expectation = sum(p[..., None] * b for p, b in zip(logits.softmax(-1).unbind(-1), bins))
    torch.testing.assert_close(annealed_mean(logits, bins, 1.0), expectation, rtol=1e-4, atol=1e-4)


def test_annealed_mean_equals_equation_5():
    """exp(log(z) / T), normalized, for a distribution z."""
    bins = torch.tensor([[0.0, 0.0], [10.0, -20.0], [30.0, 40.0]])
    z = torch.tensor([0.2, 0.5, 0.3])
    sharp = z ** (1 / 0.38)
    torch.testing.assert_close(annealed_mean(z.log(), bins), sharp @ bins / sharp.sum())
