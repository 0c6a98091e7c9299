"""Every encoder by its name: what the command line calls --encoder.NAME."""

from typing import Literal

from torch import Tensor, nn

from minissl.convnet import ResNet, SmallCNN
from minissl.errors import InputError
from minissl.method import Tokens
from minissl.patches import patchify
from minissl.vit import vit


def make_encoder(
    name: Literal["nano", "tiny", "small", "base", "large", "cnn", "resnet18", "resnet50"] = "small",
    patch_size: int = 16,
    img_size: int = 224,
    *,
    depth: int = 0,
    stem: Literal["patch", "conv"] = "patch",
    drop_path: float = 0.0,
    init_std: float = 0.02,
    positions: Literal["learned", "rotary", "none"] = "learned",
    stretch: tuple[float, float, float] = (0.0, 1.0, 1.0),
    registers: int = 0,
    layer_scale: float = 0.0,
    gated: bool = False,
    weights: str = "none",
) -> nn.Module:
    """An encoder, images -> Tokens.

    Args:
        name: the size of a ViT (see `vit.SIZES`), or a convolutional network, for which only `weights` counts.
        patch_size: pixels a side of a patch; a power of two for the conv stem.
        img_size: pixels a side of the images it is trained on; others are possible later.
        depth: blocks; 0: as many as the name says.
        stem: how pixels become patch vectors, one linear map of each patch or a few small convolutions.
        drop_path: rate at which the last block's branches are left out; rises linearly from 0 at the first.
        init_std: deviation of the blocks' first weights, DINO's 0.02; a narrow ViT learns faster from 1 / sqrt(width).
        positions: what says where a patch of a ViT is: learned vectors, or, as in DINOv3, rotary angles, which hold for
            any grid; with none, a patch is only what it shows.
        stretch: of rotary positions while training: shift, jitter and rescale of the coordinates; DINOv3 has 0, 1, 2.
        registers: tokens of a ViT besides, that are thrown away; 4 in DINOv2's models that have them.
        layer_scale: factor on every branch of a ViT at the start, learnt; 1e-5 in DINOv2; 0 leaves it out.
        gated: SwiGLU in place of a ViT's perceptron.
        weights: "none"; "imagenet" starts a ResNet from torchvision's classifier, downloaded once; whatever else
            `pretrained.load` knows, as a run's folder or an official file, is put in afterwards, by `config.Run`.

    Raises:
        InputError: for an unknown name, a size that the patches do not divide, or weights that cannot be had.
    """
    if name == "cnn":
        network = SmallCNN()
    elif name.startswith("resnet"):
        network = ResNet(name, img_size <= 64, weights if weights == "imagenet" else "none")
    else:
        choices = {"stem": stem, "drop_path": drop_path, "init_std": init_std, "positions": positions}
        choices |= {"stretch": stretch, "registers": registers, "layer_scale": layer_scale, "gated": gated}
        network = vit(name, patch_size, img_size, depth=depth, **choices)
    if weights not in ("none", "imagenet"):
        raise InputError(f"An encoder is made here and not loaded; give it {weights!r} by pretrained.put, or load it.")
    if weights == "imagenet" and not name.startswith("resnet"):
        raise InputError("There are ImageNet weights for the ResNets only; choose --encoder.name resnet18.")
    return network


class Pixels(nn.Module):
    """No network at all: a patch is its pixels. What every encoder has to beat.

    Args:
        patch_size: p, pixels a side of a patch.
    """

    def __init__(self, patch_size: int = 8):
        super().__init__()
        self.patch_size, self.dim = patch_size, 3 * patch_size**2

    def forward(self, images: Tensor) -> Tokens:
        """Images (B, 3, H, W), normalised, of whole patches; patches (B, H / p, W / p, 3 p p), and their mean."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patches = patchify(images, self.patch_size).unflatten(1, grid)
        return Tokens(patches.mean(dim=(1, 2)), patches)
