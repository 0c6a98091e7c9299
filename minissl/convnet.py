"""Convolutional networks: image -> Tokens, for where a transformer is not the point.

The vector of the image is the mean of its patches, as in He et al., Deep Residual Learning, 2015 (arXiv:1512.03385).

Shapes: B images of H x W pixels, a map of h x w positions, D channels.
"""

import itertools

import torch
import torchvision
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.method import Tokens


class SmallCNN(nn.Module):
    """Five 3 x 3 convolutions, each halving the map but the first: it learns in a minute on a CPU.

    A last position sees 33 pixels, all of a small image; with four convolutions it would be 17, and poses read worse.

    Args:
        widths: channels of the layers; the last is D.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 256)):
        super().__init__()
        self.dim = widths[-1]
        layers = []
        for i, (before, after) in enumerate(itertools.pairwise((3, *widths))):
            layers += [nn.Conv2d(before, after, 3, 1 if i == 0 else 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tokens:
        """Images (B, 3, H, W), normalised; patches (B, H / 16, W / 16, D) with the default widths."""
        patches = self.layers(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)  # (B, h, w, D)
        return Tokens(patches.mean(dim=(1, 2)), patches)

    def attention(self, images: Tensor) -> Tensor:
        return weight_in_the_mean(self(images).patches)


def weight_in_the_mean(patches: Tensor) -> Tensor:
    """What stands for attention where vectors are averaged: the length of each, as a share of all, (B, 1, h, w)."""
    size = patches.norm(dim=-1)[:, None]
    return size / size.sum(dim=(-2, -1), keepdim=True)


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier.

    Args:
        name: "resnet18" or "resnet50".
        small: for images of CIFAR's size: a first convolution of 3 x 3 that does not halve, and no pooling after it.
        weights: "none", or "imagenet" for torchvision's, downloaded once into torch's cache.

    Raises:
        InputError: if the weights cannot be downloaded.
    """

    def __init__(self, name: str, small: bool = False, weights: str = "none"):
        super().__init__()
        try:
            network = getattr(torchvision.models, name)(weights="DEFAULT" if weights == "imagenet" else None)
        except OSError as error:
            raise InputError(
                f"The ImageNet weights of {name} could not be downloaded ({error}); go on with --encoder.weights none."
            ) from None
        self.dim = network.fc.in_features
        if small:
            network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            network.maxpool = nn.Identity()
        network.fc = network.avgpool = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tokens:
        net = self.network
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions are faster
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x)))).permute(0, 2, 3, 1)  # (B, h, w, D)
        return Tokens(x.mean(dim=(1, 2)), x)

    def attention(self, images: Tensor) -> Tensor:
        return weight_in_the_mean(self(images).patches)
