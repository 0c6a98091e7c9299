"""Convolutional networks: image -> Tokens, for where a transformer is not the point.

The vector of the image is the mean of its patches, as in He et al., Deep Residual Learning, 2015 (arXiv:1512.03385).

Shapes: B images of H x W pixels, a map of h x w positions, D channels.
"""

import itertools

from torch import Tensor, nn

from minissl.method import Tokens


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions, each halving the map but the first: it learns in a minute on a CPU.

    Args:
        widths: channels of the layers; the last is D.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        self.dim = widths[-1]
        layers = []
        for i, (before, after) in enumerate(itertools.pairwise((3, *widths))):
            layers += [nn.Conv2d(before, after, 3, 1 if i == 0 else 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tokens:
        """Images (B, 3, H, W), normalised; patches (B, H / 8, W / 8, D) with the default widths."""
        patches = self.layers(images).permute(0, 2, 3, 1)  # (B, h, w, D)
        return Tokens(patches.mean(dim=(1, 2)), patches)

    def attention(self, images: Tensor) -> Tensor:
        """(B, 1, h, w): how much each position adds to the mean, as a share of all."""
        size = self(images).patches.norm(dim=-1)[:, None]
        return size / size.sum(dim=(-2, -1), keepdim=True)
