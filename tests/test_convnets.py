"""Convolutional encoders: the ResNet is torchvision's, and the small network sees a small image as a whole."""

import torch
import torchvision
from torch import nn

from minissl.models.convnets import ResNet, SmallCNN


def test_a_resnet_equals_torchvision():
    torch.manual_seed(0)
    encoder, reference = ResNet("resnet18").eval(), torchvision.models.resnet18().eval()
    missing, unexpected = reference.load_state_dict(encoder.network.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images).cls, reference(images))


def test_the_small_resnet_has_stride_8():
    assert ResNet("resnet18", small=True).eval()(torch.randn(1, 3, 32, 32)).patches.shape == (1, 4, 4, 512)


def test_the_receptive_field_of_the_small_cnn_is_33_pixels():
    torch.manual_seed(0)
    encoder, images = SmallCNN().eval(), torch.randn(1, 3, 96, 96, requires_grad=True)
    encoder(images).patches[0, 3, 3].sum().backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 33
