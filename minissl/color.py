"""Lightness and colour apart: CIE Lab, and the colours that exist as a set of bins.

Zhang, Isola and Efros, Colorful Image Colorization, 2016 (arXiv:1603.08511), section 2. Lab as scikit-image has it:
sRGB, D65, 2 degrees. Distances in Lab are about as large as they look.

Shapes: B images of H x W pixels; Q bins of 10 x 10 in the plane (a, b), N points in that plane.
"""

import torch
from torch import Tensor

TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
TO_RGB = (
    (3.24048134, -1.53715152, -0.49853633),
    (-0.96925495, 1.87599, 0.04155593),
    (0.05564664, -0.20404134, 1.05731107),
)  # the inverse
WHITE = (0.95047, 1.0, 1.08883)


def mix(images: Tensor, weights: tuple[tuple[float, ...], ...]) -> Tensor:
    """Each channel of the result is a weighted sum of the three channels of (B, 3, H, W)."""
    # With numbers: a small tensor made here would make a GPU wait for its copy.
    return torch.stack([sum(w * images[:, c] for c, w in enumerate(row)) for row in weights], dim=1)


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [0, 1] to L in [0, 100] and a, b of about -110 to 110, (B, 3, H, W)."""
    linear = torch.where(images > 0.04045, ((images.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92)
    xyz = mix(linear, tuple(tuple(w / white for w in row) for row, white in zip(TO_XYZ, WHITE)))
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Back to sRGB (B, 3, H, W), cut to [0, 1] where no screen shows the colour."""
    y = (lab[:, 0] + 16) / 116
    f = torch.stack([y + lab[:, 1] / 500, y, (y - lab[:, 2] / 200).clamp_min(0)], dim=1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = mix(xyz, tuple(tuple(w * white for w, white in zip(row, WHITE)) for row in TO_RGB))
    curved = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, linear * 12.92).clamp(0, 1)


def gamut(step: int = 10, fineness: int = 86) -> Tensor:
    """(Q, 2) the bins of the plane (a, b) that some screen colour falls into; at a step of 10 about 260.

    The paper's list has 313: it also holds bins that a colour only comes near to.
    """
    levels = torch.linspace(0, 1, fineness)
    colors = torch.cartesian_prod(levels, levels, levels)
    colors = colors[((colors == 0) | (colors == 1)).any(1)]  # inside the cube are the same a and b, L apart
    bins = (rgb_to_lab(colors.mT[None, :, None])[0, 1:, 0].mT / step).round()
    return bins.unique(dim=0) * step


def nearest_bins(ab: Tensor, bins: Tensor, n: int = 5, sigma: float = 5.0) -> tuple[Tensor, Tensor]:
    """Points as mixtures of the bins around them: the n nearest (N, n) and their weights, which sum to 1.

    Args:
        ab: (N, 2).
        bins: (Q, 2).
        n: how many; 5 in the paper, 10 in its code.
        sigma: of the Gaussian the weights fall off with.
    """
    # Without a matrix product: autocast would multiply as bfloat16, and take the wrong bin for one point in seven.
    squared = (ab[:, :1] - bins[:, 0]).square() + (ab[:, 1:] - bins[:, 1]).square()  # (N, Q)
    near, index = squared.topk(n, dim=1, largest=False)
    return index, (-near / (2 * sigma**2)).softmax(dim=1)


def rarity(share: Tensor, mixture: float = 0.5) -> Tensor:
    """How much a bin's pixels count, (Q,): more the rarer they are, 1 on average over the pixels (eq. 4).

    Args:
        share: (Q,), of the bins among the pixels of the training images; sums to 1.
        mixture: how much of a uniform share is mixed in, so that nothing counts without bound.
    """
    seen = share > 0
    weights = 1 / ((1 - mixture) * share + mixture * seen / seen.sum()).clamp_min(1e-12) * seen
    return weights / (share * weights).sum()


def annealed_mean(logits: Tensor, bins: Tensor, temperature: float = 0.38) -> Tensor:
    """One colour of a distribution over bins, (..., Q) to (..., 2), between mean (T = 1) and mode (T = 0); eq. 5."""
    return (logits / temperature).softmax(dim=-1) @ bins
