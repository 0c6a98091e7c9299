"""Lab is scikit-image's, the bins are those of the colours that exist, and mixtures of them are the paper's."""

import itertools
import warnings

import pytest
import torch

from minissl.color import annealed_mean, gamut, lab_to_rgb, nearest_bins, rarity, rgb_to_lab

CORNERS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).mT.view(1, 3, 2, 4)  # black, white, the primaries


def pictures(dtype):
    """Noise, dark noise, and the corners of the cube of colours, (3, 3, 2, 4)."""
    noise = torch.rand(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, noise / 20, CORNERS]).to(dtype)


def points(n):
    """Somewhere in the plane of a and b, (n, 2)."""
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 160 - 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lab_equals_scikit_images(dtype):
    from skimage.color import rgb2lab

    expected = torch.from_numpy(rgb2lab(pictures(torch.float64).numpy(), channel_axis=1))
    torch.testing.assert_close(rgb_to_lab(pictures(dtype)).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_way_back_equals_scikit_images(dtype):
    """Also for a dark blue with a negative z, and for what no screen shows, which is cut."""
    from skimage.color import lab2rgb

    noise = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lab = noise * torch.tensor([100.0, 200, 200]).view(3, 1, 1) - torch.tensor([0.0, 100, 100]).view(3, 1, 1)
    lab[1] = lab[1] * torch.tensor([0.3, 0.1, 0.1]).view(3, 1, 1)
    lab[0, :, 0, 0] = torch.tensor([5.0, 0, 100])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.from_numpy(lab2rgb(lab.numpy(), channel_axis=1))
    found = lab_to_rgb(lab.to(dtype)).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert found.min() == 0
    assert found.max() == 1


def test_there_and_back_again():
    images = pictures(torch.float32)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(images)), images, rtol=0, atol=1e-3)


def test_grey_has_no_colour_and_white_all_lightness():
    grey = torch.linspace(0, 1, 11).view(1, 1, 1, 11).expand(-1, 3, -1, -1)
    lab = rgb_to_lab(grey)
    assert lab[:, 1:].abs().max() < 0.02
    assert lab[0, 0, 0, 0].item() == pytest.approx(0, abs=1e-4)
    assert lab[0, 0, 0, -1].item() == pytest.approx(100, abs=1e-3)
    assert (lab[0, 0, 0].diff() > 0).all()


def test_gradients_are_finite_at_black():
    black = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (there,) = torch.autograd.grad(rgb_to_lab(black).sum(), black)
    (back,) = torch.autograd.grad(lab_to_rgb(black).sum(), black)
    assert there.isfinite().all()
    assert back.isfinite().all()
    assert there.all()  # and black is left


def test_every_colour_of_a_screen_has_its_bin():
    """Random colours of 8 bits, and as many on the surface of their cube: the most colourful."""
    dice = torch.Generator().manual_seed(0)
    colors = torch.randint(256, (3, 400_000), generator=dice)
    colors[0, ::2] = torch.randint(2, (200_000,), generator=dice) * 255
    bins = set(map(tuple, gamut().tolist()))
    ab = rgb_to_lab(colors.float()[None, :, None] / 255)[0, 1:, 0].mT
    found = set(map(tuple, ((ab / 10).round() * 10).unique(dim=0).tolist()))
    assert found <= bins
    assert len(found) > 0.97 * len(bins)


def test_bins_are_on_a_grid_of_ten_and_none_comes_twice():
    bins = gamut()
    assert 250 <= len(bins) <= 270
    assert len(bins.unique(dim=0)) == len(bins)
    assert torch.equal(bins, (bins / 10).round() * 10)
    assert (bins == 0).all(1).any()


@pytest.mark.parametrize(("n", "sigma"), [(5, 5.0), (3, 9.0), (1, 5.0)])
def test_mixtures_of_the_nearest_bins_equal_the_loops(n, sigma):
    bins = gamut().double()
    index, weights = nearest_bins(points(40), bins, n, sigma)
    assert index.shape == weights.shape == (40, n)
    for point, chosen, shares in zip(points(40), index, weights):
        squared = [((point - b) ** 2).sum() for b in bins]
        nearest = sorted(range(len(bins)), key=lambda q: squared[q].item())[:n]
        expected = torch.stack([(-squared[q] / (2 * sigma**2)).exp() for q in nearest])
        assert chosen.tolist() == nearest
        torch.testing.assert_close(shares, expected / expected.sum(), rtol=1e-9, atol=1e-12)
        assert shares.sum().item() == pytest.approx(1)


def test_the_nearest_bins_are_the_same_under_autocast():
    bins, ab = gamut(), points(500).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_bins(ab, bins)
    for ours, expected in zip(found, nearest_bins(ab, bins)):
        assert torch.equal(ours, expected)


def test_rare_bins_count_more_and_pixels_count_one_on_average():
    share = torch.tensor([0.6, 0.3, 0.09, 0.01, 0.0])
    weights = rarity(share)
    assert (share * weights).sum().item() == pytest.approx(1)
    assert (weights[:4].diff() > 0).all()
    assert weights[4] == 0


def test_rarity_is_equation_four():
    """1 / ((1 - m) p + m / Q), scaled; Q counts the bins that were seen."""
    share = torch.tensor([0.5, 0.0, 0.4, 0.1], dtype=torch.float64)
    plain = [1 / (0.75 * p + 0.25 / 3) if p else 0.0 for p in share.tolist()]
    mean = sum(p * w for p, w in zip(share.tolist(), plain))
    assert rarity(share, 0.25).tolist() == pytest.approx([w / mean for w in plain])


def test_without_rare_bins_all_count_alike():
    torch.testing.assert_close(rarity(torch.full((8,), 1 / 8)), torch.ones(8))


def test_the_annealed_mean_goes_from_the_mean_to_the_mode():
    bins = gamut()
    logits = torch.randn(2, 3, len(bins), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(annealed_mean(logits, bins, 1e6), bins.mean(0).expand(2, 3, 2), rtol=0, atol=1e-2)
    torch.testing.assert_close(annealed_mean(logits, bins, 1e-4), bins[logits.argmax(-1)], rtol=0, atol=1e-3)
    expectation = sum(p[..., None] * b for p, b in zip(logits.softmax(-1).unbind(-1), bins))
    torch.testing.assert_close(annealed_mean(logits, bins, 1.0), expectation, rtol=1e-4, atol=1e-4)


def test_the_annealed_mean_sharpens_as_the_paper_says():
    """Equation 5: exp(log(z) / T), normalised, of the distribution z."""
    bins = torch.tensor([[0.0, 0.0], [10.0, -20.0], [30.0, 40.0]])
    z = torch.tensor([0.2, 0.5, 0.3])
    sharp = z ** (1 / 0.38)
    torch.testing.assert_close(annealed_mean(z.log(), bins), sharp @ bins / sharp.sum())
