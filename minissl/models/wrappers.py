"""Encoders around other people's networks: any module, and the models of timm.

timm: Wightman, PyTorch Image Models, 2019 (github.com/huggingface/pytorch-image-models). It is optional.

Shapes: B images of H x W pixels, D the encoder's width, (h, w) its grid of patches, N = hw.
"""

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from minissl.errors import InputError, suggestion
from minissl.models.outputs import Encoder, Tokens


class WrappedEncoder(Encoder):
    """Encoder around a network that returns vectors (B, D), feature maps (B, D, h, w) or `Tokens`.

    The representation of an image is the vector itself, or the mean of the feature map. A network that returns vectors
    has one patch, the whole image.

    Args:
        network: maps normalized images (B, 3, H, W) to one of these. It is not copied.
        image_size: side in pixels of the images of a trial pass, from which width and patch size are read.
        embed_dim: D, if it is to be checked.

    Raises:
        InputError: if the output is something else, or its width is not `embed_dim`.
    """

    def __init__(self, network: nn.Module, image_size: int = 224, embed_dim: int | None = None):
        super().__init__()
        self.network = network
        self.embed_dim, self.patch_size = _trial_pass(self, image_size)
        if embed_dim not in (None, self.embed_dim):
            raise InputError(
                f"The network returns features of width {self.embed_dim}, not {embed_dim}; a map must be (B, D, h, w)."
            )

    def forward(self, images: Tensor) -> Tokens:
        """Encode normalized images (B, 3, H, W); patches are (B, h, w, D), with h = w = 1 for vectors."""
        output = self.network(images)
        if isinstance(output, Tokens):
            return output
        if isinstance(output, Tensor) and output.ndim == 2:
            return Tokens(output, output[:, None, None])
        if isinstance(output, Tensor) and output.ndim == 4:
            return _pool(output.permute(0, 2, 3, 1))
        shape = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise InputError(
            f"The network returns an output of {shape}; an encoder needs vectors (B, D), feature maps (B, D, h, w) or "
            "minissl.models.outputs.Tokens. Remove the head, or wrap the network in a module that returns one of these."
        )


class TimmEncoder(Encoder):
    """Encoder around a model of timm, without its classifier.

    The representation of an image is the class token; for a model without one, it is the mean of the feature map.
    Images that are normalized with the ImageNet mean and standard deviation are converted to those of the model.

    Args:
        name: name of a timm model, such as "resnet18" or "vit_small_patch16_224.dino".
        image_size: side in pixels of the training images; models that accept other sizes are built so.
        pretrained: load timm's weights of this name, downloaded once into the cache of Hugging Face.

    Raises:
        InputError: if timm is not installed or has no such model, if weights cannot be downloaded, or if the model
            returns no class token, patch tokens or feature map.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, name: str, image_size: int = 224, pretrained: bool = False):
        super().__init__()
        timm = _import_timm()
        _check_timm_name(timm, name)
        self.network = _create_timm_model(timm, name, image_size, pretrained)
        self._set_normalization(timm)
        self.embed_dim, self.patch_size = _trial_pass(self, image_size)

    def _set_normalization(self, timm: ModuleType) -> None:
        """Store the affine map from the ImageNet mean and standard deviation to the model's, if they differ."""
        mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
        config = self.network.pretrained_cfg
        own_mean, own_std = config.get("mean", mean), config.get("std", std)
        scale = shift = None
        if (tuple(own_mean), tuple(own_std)) != (mean, std):
            scale = torch.tensor([s / own for s, own in zip(std, own_std)]).view(3, 1, 1)
            shift = torch.tensor([(m - own) / s for m, own, s in zip(mean, own_mean, own_std)]).view(3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Tensor) -> Tokens:
        """Encode normalized images (B, 3, H, W); patches are (B, h, w, D)."""
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        try:
            features = self.network.forward_features(images)
        except AssertionError as error:  # timm's answer to an unsupported image size
            raise InputError(f"timm's {type(self.network).__name__} rejects these images: {error}") from None
        if isinstance(features, Tensor) and features.ndim == 4:
            return _pool(features if self._is_channels_last(features) else features.permute(0, 2, 3, 1))
        if not isinstance(features, Tensor) or features.ndim != 3:
            raise InputError(f"timm's {type(self.network).__name__} returns no feature map or tokens; choose another.")
        prefix = getattr(self.network, "num_prefix_tokens", None)
        if prefix is None:
            prefix = 0 if math.isqrt(features.shape[1]) ** 2 == features.shape[1] else 1
        grid = self._grid(images, features.shape[1] - prefix)
        patches = features[:, prefix:].unflatten(1, grid)  # (B, h, w, D)
        has_cls_token = prefix and getattr(self.network, "cls_token", None) is not None
        return Tokens(features[:, 0], patches) if has_cls_token else _pool(patches)

    def _is_channels_last(self, features: Tensor) -> bool:
        """Return whether a feature map is (B, h, w, D), as that of Swin, rather than (B, D, h, w)."""
        width = self.network.num_features
        declared = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
        return declared or (features.shape[1] != width and features.shape[-1] == width)

    def _grid(self, images: Tensor, num_patches: int) -> tuple[int, int]:
        """Return (h, w) of a sequence of patches, which has the aspect ratio of the images."""
        height, width = images.shape[-2:]
        h = round(math.sqrt(num_patches * height / width))
        if h == 0 or num_patches % h:
            raise InputError(
                f"timm's {type(self.network).__name__} returns {num_patches} patches for images of {height} x {width} "
                "pixels, which are no grid; use another size, or another model."
            )
        return h, num_patches // h


def _pool(patches: Tensor) -> Tokens:
    """Return tokens of a feature map (B, h, w, D), whose mean represents the image."""
    return Tokens(patches.mean(dim=(1, 2)), patches)


@torch.no_grad()
def _trial_pass(encoder: Encoder, image_size: int) -> tuple[int, int]:
    """Return the width and patch size that an encoder has for images of a size, in pixels."""
    parameter = next(encoder.parameters(), None)
    images = torch.zeros(1, 3, image_size, image_size)
    images = images if parameter is None else images.to(parameter)
    training = {module: module.training for module in encoder.modules()}
    try:
        tokens = encoder.eval()(images)
    finally:
        for module, mode in training.items():
            module.training = mode
    return tokens.cls.shape[-1], image_size // tokens.patches.shape[1]


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise InputError("Encoders named timm:NAME need timm, which is not installed; run: pip install timm") from None


def _check_timm_name(timm: ModuleType, name: str) -> None:
    """Raise InputError for an unknown name, also for those of the form "hf-hub:...", which timm would download."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        hint = suggestion(architecture, timm.list_models())
        raise InputError(f"timm has no model {name!r}{hint}; timm.list_models() lists the names.")


def _create_timm_model(timm: ModuleType, name: str, image_size: int, pretrained: bool) -> Any:
    """Build a model for images of a size, one that takes other sizes as well if the architecture can."""
    size: dict[str, Any] = {"img_size": image_size}
    errors = Exception if pretrained else (RuntimeError, ValueError, AssertionError)  # a failed download can be any
    try:
        for options in (size | {"dynamic_img_size": True}, size, {}):
            try:
                return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
            except TypeError as error:  # this architecture has no such option
                if "unexpected keyword argument" not in str(error):
                    raise
    except errors as error:
        reason = " ".join(str(error).split())
        raise InputError(f"timm could not build {name} for images of {image_size} pixels ({reason}).") from None
    raise AssertionError("unreachable: the last options are empty")


def timm_image_size(name: str) -> int:
    """Return the side in pixels of the images that timm trained a model on. Raises InputError for an unknown name."""
    timm = _import_timm()
    _check_timm_name(timm, name)
    return int(timm.get_pretrained_cfg(name).input_size[-1])
