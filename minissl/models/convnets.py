"""Convolutional encoders: a small network that trains on a CPU, and torchvision's ResNets.

He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385). A convolutional network has no class
token: the representation of the image is the mean of its feature map (global average pooling).

Shapes: B images of H x W pixels, a feature map of h x w positions, D channels.
"""

import itertools

import torch
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.models.outputs import Encoder, Tokens


class SmallCNN(Encoder):
    """Five 3 x 3 convolutions, each but the first with stride 2; trains in a minute on a CPU.

    The receptive field of the last layer is 33 pixels, all of a small image. With four convolutions it would be 17, and
    the linear probe of poses is less accurate.

    Args:
        widths: channels of the layers; the last is D.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 256)):
        super().__init__()
        self.embed_dim = widths[-1]
        self.patch_size = 2 ** (len(widths) - 1)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise((3, *widths))):
            layers += [nn.Conv2d(before, after, 3, 1 if i == 0 else 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tokens:
        """Encode normalized images (B, 3, H, W); patches are (B, H / 16, W / 16, D) with the default widths."""
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions are faster
        patches = self.layers(images).permute(0, 2, 3, 1)  # (B, h, w, D)
        return Tokens(patches.mean(dim=(1, 2)), patches)


class ResNet(Encoder):
    """torchvision's ResNet without its classifier.

    Args:
        name: "resnet18" or "resnet50".
        small: use SimCLR's variant for images of CIFAR's size: the first convolution is 3 x 3 with stride 1, and no
            pooling follows it. The total stride is 8 instead of 32.
        weights: "none", or "imagenet" for those of torchvision, downloaded once into torch's cache.

    Raises:
        InputError: if the weights cannot be downloaded.
    """

    def __init__(self, name: str, small: bool = False, weights: str = "none"):
        super().__init__()
        import torchvision  # here, because it loads torch's compiler, which takes seconds

        try:
            network = getattr(torchvision.models, name)(weights="DEFAULT" if weights == "imagenet" else None)
        except OSError as error:
            raise InputError(
                f"The ImageNet weights of {name} could not be downloaded ({error}); use --encoder.weights none."
            ) from None
        self.embed_dim = network.fc.in_features
        self.patch_size = 8 if small else 32
        if small:
            network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            network.maxpool = nn.Identity()
        network.fc = network.avgpool = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tokens:
        """Encode normalized images (B, 3, H, W); patches are (B, H / p, W / p, D), with p = 32, or 8 if small."""
        net = self.network
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions are faster
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x)))).permute(0, 2, 3, 1)  # (B, h, w, D)
        return Tokens(x.mean(dim=(1, 2)), x)
