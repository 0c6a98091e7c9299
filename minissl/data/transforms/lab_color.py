"""The CIE Lab color space, and colors as mixtures of quantized (a, b) bins.

Zhang, Isola and Efros, Colorful Image Colorization, 2016 (arXiv:1603.08511), section 2. Lab equals scikit-image's:
sRGB, illuminant D65, 2 degree observer. Distances in Lab approximate perceived color differences.

Shapes: B images of H x W pixels, Q bins of 10 x 10 in the (a, b) plane, N points in that plane.
"""

import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]

TO_XYZ: Matrix = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
TO_RGB: Matrix = (
    (3.24048134, -1.53715152, -0.49853633),
    (-0.96925495, 1.87599, 0.04155593),
    (0.05564664, -0.20404134, 1.05731107),
)  # the inverse of TO_XYZ
WHITE = (0.95047, 1.0, 1.08883)  # XYZ of the illuminant D65


def _mix_channels(images: Tensor, weights: Matrix) -> Tensor:
    """Multiply the channels of (B, 3, H, W) by a 3 x 3 matrix."""
    # By scalars: a tensor of nine numbers would be copied from the CPU, and a GPU would wait for it.
    rows = [[w * images[:, c] for c, w in enumerate(row)] for row in weights]
    return torch.stack([x + y + z for x, y, z in rows], dim=1)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB images (B, 3, H, W) in [0, 1] to L in [0, 100] and a, b in about [-110, 110], (B, 3, H, W)."""
    linear = torch.where(images > 0.04045, ((images.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92)
    xyz = _mix_channels(linear, tuple(tuple(w / white for w in row) for row, white in zip(TO_XYZ, WHITE)))
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Convert Lab images (B, 3, H, W) to sRGB; colors outside of sRGB are clipped to [0, 1]."""
    y = (lab[:, 0] + 16) / 116
    f = torch.stack([y + lab[:, 1] / 500, y, (y - lab[:, 2] / 200).clamp_min(0)], dim=1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = _mix_channels(xyz, tuple(tuple(w * white for w, white in zip(row, WHITE)) for row in TO_RGB))
    curved = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, linear * 12.92).clamp(0, 1)


def gamut_bins(step: int = 10, fineness: int = 86) -> Tensor:
    """Compute the centers (Q, 2) of the (a, b) bins that contain a color of sRGB; Q is about 260 for a step of 10.

    The paper's list has 313 bins, because it includes bins that are only near to a color of sRGB.

    Args:
        step: side of a bin.
        fineness: levels of each RGB channel that are tried.
    """
    levels = torch.linspace(0, 1, fineness)
    colors = torch.cartesian_prod(levels, levels, levels)
    colors = colors[((colors == 0) | (colors == 1)).any(1)]  # colors inside the cube add no further (a, b)
    bins = (rgb_to_lab(colors.mT[None, :, None])[0, 1:, 0].mT / step).round()
    return bins.unique(dim=0) * step


def soft_encode(ab: Tensor, bins: Tensor, n: int = 5, sigma: float = 5.0) -> tuple[Tensor, Tensor]:
    """Encode colors as mixtures of their n nearest bins, weighted by a Gaussian of the distance.

    Args:
        ab: (N, 2).
        bins: (Q, 2).
        n: number of bins; 5 in the paper, 10 in its code.
        sigma: standard deviation of the Gaussian.

    Returns:
        Indices (N, n) int64 of the bins, nearest first, and their weights (N, n), which sum to 1.
    """
    # Not by a matrix product: autocast would compute it in bfloat16 and select the wrong bin for one point in seven.
    squared = (ab[:, :1] - bins[:, 0]).square() + (ab[:, 1:] - bins[:, 1]).square()  # (N, Q)
    near, index = squared.topk(n, dim=1, largest=False)
    return index, (-near / (2 * sigma**2)).softmax(dim=1)


def rebalancing_weights(bin_fractions: Tensor, mixture: float = 0.5) -> Tensor:
    """Compute the loss weight of each bin (Q,): larger for rarer colors, 1 on average over the pixels (equation 4).

    Args:
        bin_fractions: (Q,), fraction of the training pixels in each bin; sums to 1.
        mixture: weight of a uniform distribution that is mixed in, which bounds the weights.
    """
    seen = bin_fractions > 0
    weights = 1 / ((1 - mixture) * bin_fractions + mixture * seen / seen.sum()).clamp_min(1e-12) * seen
    return weights / (bin_fractions * weights).sum()


def annealed_mean(logits: Tensor, bins: Tensor, temperature: float = 0.38) -> Tensor:
    """Reduce a distribution over bins to one color, between its mean (T = 1) and its mode (T = 0); equation 5.

    Args:
        logits: (..., Q).
        bins: (Q, 2).
        temperature: T.

    Returns:
        (..., 2).
    """
    return (logits / temperature).softmax(dim=-1) @ bins
