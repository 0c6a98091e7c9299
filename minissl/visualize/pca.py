"""Patches in colour: the three directions in which they differ most become red, green and blue.

Oquab et al., DINOv2, 2023 (arXiv:2304.07193), figure 1; without its threshold on the first component.
Shapes: B images, a grid (h, w) of patches, D the encoder's width.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from minissl.augment import normalize
from minissl.method import Tokens
from minissl.visualize.grid import enlarge, picture_grid


def pca_rgb(patches: Tensor) -> Tensor:
    """One PCA over the patches of all images, (B, h, w, D) to colours (B, 3, h, w) in [0, 1].

    The components are whitened and squashed, sigmoid(2 x), as in DINOv3's notebook; each points to where it has its
    larger tail, so that the colours do not depend on the sign the decomposition happens to return.
    """
    flat = patches.flatten(0, 2).float()
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    parts = flat @ directions[:3].mT  # (B h w, 3)
    parts = parts / parts.std(dim=0).clamp_min(1e-9)
    parts = parts * (parts**3).sum(dim=0).sign()
    return torch.sigmoid(2 * parts).unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)


@torch.no_grad()
def pca_figure(encoder: nn.Module, images: Tensor, size: int) -> Figure:
    """Images, and their patches' first three principal components as colours.

    Args:
        encoder: images -> Tokens.
        images: (B, 3, H, W) uint8.
        size: pixels a side the encoder sees them at; a multiple of its patch.
    """
    pictures = enlarge(images, size)
    tokens: Tokens = encoder(normalize(pictures))
    colors = pca_rgb(tokens.patches)
    half = (len(images) + 1) // 2
    columns = [("image", pictures[:half]), ("patches", colors[:half])]
    if half < len(images):
        columns += [("image", pictures[half : 2 * half]), ("patches", colors[half : 2 * half])]
    return picture_grid(columns, "Patches by their first three principal components")
