"""Patches: an image cut into squares, and each square as a vector.

Dosovitskiy et al., An Image is Worth 16x16 Words, 2020 (arXiv:2010.11929). The convolutional stem follows Xiao et al.,
Early Convolutions Help Transformers See Better, 2021 (arXiv:2106.14881), with a second convolution at every size; it is
what learns in minutes on a CPU.

Shapes: B images of H x W pixels, patches of p x p, a grid (h, w) = (H / p, W / p) of N = hw patches, width D.
"""

import itertools
import math

import torch
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) to (B, N, p p 3): patches row by row, in each rows, columns, and channels fastest."""
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Back: (B, N, p p 3) to (B, 3, H, W)."""
    x = patches.unflatten(2, (patch_size, patch_size, 3)).unflatten(1, grid)  # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to patch vectors (B, h, w, D)."""

    def __init__(self, patch_size: int, dim: int, stem: str):
        super().__init__()
        self.patch_size = patch_size
        if stem == "patch":
            self.stem = nn.Identity()
            self.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        else:
            steps = int(math.log2(patch_size))
            widths = [3] + [max(dim >> (steps - 1 - i), 24) for i in range(steps)]  # doubles as the map halves
            layers = []
            for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
                # Padded on both sides, a patch's vector would be about its upper left corner; so, about its middle.
                layers += [nn.ZeroPad2d((0, 1, 0, 1) if i == steps else 1)]
                layers += [nn.Conv2d(before, after, 3, 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                # A last 3 x 3 would let every patch see 43 pixels, all of a small image; so it is 27.
                near = (1, 1, 0) if i == steps else (3, 1, 1)
                layers += [nn.Conv2d(after, after, *near, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            self.stem = nn.Sequential(*layers)
            self.proj = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions are faster, in bf16 by half
        return self.proj(self.stem(images)).permute(0, 2, 3, 1)
