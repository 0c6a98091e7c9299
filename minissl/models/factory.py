"""Build encoders by name."""

from typing import Any, Literal

from torch import Tensor, nn

from minissl.errors import InputError, suggestion
from minissl.models.convnets import ResNet, SmallCNN
from minissl.models.outputs import Encoder, Tokens
from minissl.models.vit import SIZES, patchify, vit
from minissl.models.wrappers import TimmEncoder, WrappedEncoder

CONVNETS = ("cnn", "resnet18", "resnet50")


def list_encoders() -> list[str]:
    """Return the names of all built-in encoders. Any model of timm is one as well, by the name "timm:NAME"."""
    return [*SIZES, *CONVNETS]


def create_encoder(
    name: str = "small",
    patch_size: int = 16,
    image_size: int = 224,
    *,
    depth: int = 0,
    stem: Literal["patch", "conv", "deep_conv"] = "patch",
    drop_path: float = 0.0,
    init_std: float = 0.02,
    pos_embed: Literal["learned", "rope", "none"] = "learned",
    rope_augmentation: tuple[float, float, float] = (0.0, 1.0, 1.0),
    num_registers: int = 0,
    layer_scale_init: float = 0.0,
    swiglu: bool = False,
    isolated_patches: bool = False,
    weights: str = "none",
) -> Encoder:
    """Build an encoder with random initial weights, unless `weights` says otherwise.

    Args:
        name: size of a ViT (nano, tiny, small, base, large, each also as vit_NAME); cnn, resnet18 or resnet50; or
            timm:NAME for any model of timm. All but `name`, `image_size` and `weights` are options of a ViT.
        patch_size: side in pixels of a patch; a power of two for the conv stem.
        image_size: side in pixels of the training images; others are possible later.
        depth: number of blocks; 0 takes that of the name.
        stem: "patch", one linear map per patch; "conv", overlapping convolutions; "deep_conv", twice as many of them.
        drop_path: drop rate of the last block's residual branches; rises linearly from 0 at the first block.
        init_std: standard deviation of the blocks' initial weights; DINO has 0.02, a narrow ViT learns faster from
            1 / sqrt(width).
        pos_embed: "learned" vectors; "rope", rotary embeddings as in DINOv3, which hold for any grid; or "none".
        rope_augmentation: shift, jitter and rescale of RoPE coordinates while training; DINOv3 has 0, 1, 2.
        num_registers: additional tokens that are discarded; 4 in DINOv2's models that have them.
        layer_scale_init: initial value of LayerScale; 1e-5 in DINOv2; 0 leaves LayerScale out.
        swiglu: use SwiGLU in place of the MLP.
        isolated_patches: embed each patch alone, as MAE does while training; a conv stem sees its neighbors otherwise.
        weights: "none"; or "imagenet", for a ResNet torchvision's classifier, for timm:NAME the weights of this name,
            downloaded once. A run loads any other weights afterwards, with `hub.pretrained.load_weights`.

    Returns:
        An encoder in training mode. Its `config` holds all arguments, with weights "none".

    Raises:
        InputError: for an unknown name, an image size that the patches do not divide, or weights that cannot be loaded.
    """
    config = dict(locals())  # all arguments: no other local variable exists yet
    config |= {"weights": "none", "rope_augmentation": tuple(rope_augmentation)}  # a list if it was read from JSON
    if weights not in ("none", "imagenet"):
        raise InputError(f"create_encoder loads only weights none or imagenet, not {weights!r}; use load_encoder.")
    if weights == "imagenet" and not name.startswith(("resnet", "timm:")):
        raise InputError("ImageNet weights exist for ResNets only; use --encoder.name resnet18, or weights none.")
    options: dict[str, Any] = {"stem": stem, "drop_path": drop_path, "init_std": init_std, "pos_embed": pos_embed}
    options |= {"rope_augmentation": rope_augmentation, "num_registers": num_registers}
    options |= {"layer_scale_init": layer_scale_init, "swiglu": swiglu, "isolated_patches": isolated_patches}
    encoder: Encoder
    if name.startswith("timm:"):
        encoder = TimmEncoder(name.removeprefix("timm:"), image_size, weights == "imagenet")
    elif name == "cnn":
        encoder = SmallCNN()
    elif name in CONVNETS:
        encoder = ResNet(name, image_size <= 64, weights)
    elif name.removeprefix("vit_") in SIZES:
        encoder = vit(name, patch_size, image_size, depth=depth, **options)
    else:
        raise _unknown_name_error(name)
    encoder.config = config
    return encoder


def _unknown_name_error(name: str) -> InputError:
    hint = suggestion(name, [*list_encoders(), *(f"vit_{size}" for size in SIZES)])
    return InputError(f"Unknown encoder {name!r}{hint}; choose {', '.join(list_encoders())}, or timm:NAME.")


def wrap_encoder(module: nn.Module, image_size: int = 224, embed_dim: int | None = None) -> Encoder:
    """Make an encoder of any network that returns vectors (B, D), feature maps (B, D, h, w) or `Tokens`.

    Args:
        module: maps normalized images (B, 3, H, W) to one of these, such as a ResNet of torchvision whose `fc` is
            replaced by nn.Identity(). It is trained in place.
        image_size: side in pixels of the images of a trial pass, from which width and patch size are read.
        embed_dim: D, if it is to be checked.

    Raises:
        InputError: if the output is something else, or its width is not `embed_dim`.
    """
    return module if isinstance(module, Encoder) else WrappedEncoder(module, image_size, embed_dim)


class PixelEncoder(Encoder):
    """Baseline without a network: a patch is represented by its pixels.

    Args:
        patch_size: p, side in pixels of a patch.
    """

    def __init__(self, patch_size: int = 8):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, 3 * patch_size**2

    def forward(self, images: Tensor) -> Tokens:
        """Return patches (B, H / p, W / p, 3 p p) of normalized images (B, 3, H, W), and their mean (B, 3 p p)."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patches = patchify(images, self.patch_size).unflatten(1, grid)
        return Tokens(patches.mean(dim=(1, 2)), patches)
