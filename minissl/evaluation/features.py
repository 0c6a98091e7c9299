"""Extract features of whole data sets and dense patch features, and compute the effective rank of features.

Shapes: N images, D the encoder's width, a grid (h, w) of patches.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.data.images import ImageDataset
from minissl.data.transforms.functional import normalize, to_float
from minissl.errors import InputError
from minissl.models.outputs import Encoder, Tokens

Pooling = Literal["cls", "both"]
POOLING_MODES: tuple[Pooling, ...] = ("cls", "both")


def pool_tokens(tokens: Tokens, pooling: Pooling) -> Tensor:
    """Return one feature per image: the class token (B, D), or with "both" it and the mean patch token, (B, 2D).

    "both" is the input of DINOv2's linear classifier (arXiv:2304.07193, appendix B.3).
    """
    return tokens.cls if pooling == "cls" else torch.cat([tokens.cls, tokens.patches.mean(dim=(1, 2))], dim=-1)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, 3, H, W), uint8 or float in [0, 1], by antialiased bicubic. Returns float in [0, 1]."""
    return F.interpolate(to_float(images), size=size, mode="bicubic", antialias=True).clamp(0, 1)


def encoder_device(encoder: Encoder, default: torch.device) -> torch.device:
    """Return the device of an encoder's parameters, or `default` if it has none."""
    return next((parameter.device for parameter in encoder.parameters()), default)


def shifted_copies(
    images: Tensor, size: int, patch_size: int, offsets: Iterable[int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield copies of images that are shifted by fractions of a patch, as inputs of an encoder.

    Args:
        images: (B, 3, H, W), uint8 or float in [0, 1]; they are resized to size x size first.
        size: side in pixels.
        patch_size: p; the images are padded by p // 2 pixels on each side, with their border repeated.
        offsets: rows, and columns, of the padded image at which a copy starts; p // 2 is the unshifted image.

    Yields:
        Row offset, column offset, and the normalized copy (B, 3, size, size).
    """
    padded = F.pad(resize(images, (size, size)), (patch_size // 2,) * 4, mode="replicate")
    for row, column in itertools.product(offsets, repeat=2):
        yield row, column, normalize(padded[:, :, row : row + size, column : column + size])


@torch.no_grad()
def dense_patches(encoder: Encoder, images: Tensor, image_size: int, stride: int = 2) -> Tensor:
    """Compute patch features at a stride smaller than the patch size, from shifted copies of the images.

    A small encoder has few patches at its training size. At twice that size it has four times as many, each of which
    shows less of the object. Shifted copies fill in the positions between them. Both together give feature maps in
    which similarities follow an object's outline.

    Args:
        encoder: in evaluation mode, on the device of the images.
        images: (B, 3, H, W), uint8 or float in [0, 1].
        image_size: side in pixels of the encoder's input; up to twice that of its training gives good maps.
        stride: pixels between two features; it divides the patch size. 0 takes the largest that gives a grid of at
            least 16 x 16.

    Returns:
        (B, image_size / stride, image_size / stride, D) float, not L2-normalized.

    Raises:
        InputError: if the stride does not divide the patch size.
    """
    ((_, _, unshifted),) = shifted_copies(images[:1], image_size, 0, [0])
    patch_size = image_size // encoder(unshifted).patches.shape[2]
    stride = stride or next(s for s in range(patch_size, 0, -1) if s == 1 or _is_dense(s, patch_size, image_size))
    if patch_size % stride:
        raise InputError(f"A stride of {stride} pixels does not divide a patch of {patch_size}; give one that does.")
    copies = shifted_copies(images, image_size, patch_size, range(stride // 2, patch_size, stride))
    patches = torch.stack([encoder(copy).patches for _, _, copy in copies])  # (k k, B, h, w, D), k = p / stride
    patches = patches.unflatten(0, (patch_size // stride, -1)).permute(2, 3, 0, 4, 1, 5)  # (B, h, k, w, k, D)
    return patches.flatten(3, 4).flatten(1, 2)


def _is_dense(stride: int, patch_size: int, image_size: int) -> bool:
    return patch_size % stride == 0 and image_size // stride >= 16


@torch.no_grad()
def frame_patch_features(encoder: Encoder, frames: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Compute the patch tokens of a clip frame by frame, so that a long clip's features are never held at once.

    Args:
        encoder: in evaluation mode, on the device of the frames.
        frames: (T, 3, H, W), uint8 or float in [0, 1].
        size: height and width in pixels to which frames are resized; multiples of the patch size.

    Yields:
        (h, w, D) of each frame, not L2-normalized.
    """
    for frame in frames:
        image = to_float(frame[None])
        if image.shape[-2:] != tuple(size):
            image = resize(image, size)
        yield encoder(normalize(image)).patches[0]


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    images: Tensor | ImageDataset,
    image_size: int | None = None,
    batch_size: int = 256,
    pooling: Pooling = "cls",
) -> Tensor:
    """Compute one feature per image, in evaluation mode. The encoder's mode is restored afterwards.

    Args:
        encoder: its device may differ from that of the images.
        images: (N, 3, H, W), uint8 or float in [0, 1], or a data set. A streamed data set is read batch by batch.
        image_size: side in pixels to which images are resized; None keeps their size.
        batch_size: images per forward pass.
        pooling: "cls", the class token, or "both", it and the mean patch token.

    Returns:
        (N, D) float32, or (N, 2D) with "both", on the device of the images; not L2-normalized.

    Raises:
        InputError: for an unknown pooling, or no images.
    """
    if pooling not in POOLING_MODES:
        raise InputError(f"Unknown pooling {pooling!r}; choose {' or '.join(POOLING_MODES)}.")
    if len(images) == 0:
        raise InputError("Features of 0 images cannot be extracted; give at least 1.")
    device = encoder_device(encoder, images.device)
    training = encoder.training
    encoder.eval()
    features = []
    for batch in _image_batches(images, batch_size):
        batch = to_float(batch.to(device))
        if image_size and batch.shape[-1] != image_size:
            batch = resize(batch, (image_size, image_size))
        features.append(pool_tokens(encoder(normalize(batch)), pooling).float())
    encoder.train(training)
    return torch.cat(features).to(images.device)


def _image_batches(images: Tensor | ImageDataset, batch_size: int) -> Iterator[Tensor]:
    """Yield all images in order, in batches (B, 3, H, W)."""
    if isinstance(images, Tensor):
        yield from images.split(batch_size)
    else:
        for batch in images.iterate(torch.arange(len(images)).split(batch_size)):
            yield batch.images


def rank_me(features: Tensor) -> float:
    """Compute the effective rank of features (N, D): the exponential of the entropy of normalized singular values.

    Garrido et al., RankMe, 2022 (arXiv:2210.02885), equation 1. It needs no labels. It is 1 if all features lie on one
    line through the origin, and at most min(N, D).
    """
    values = torch.linalg.svdvals(features.float())
    fractions = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(fractions * fractions.log()).sum()))
