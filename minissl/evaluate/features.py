"""Features of whole data sets, patch vectors closer together than patches, and how many of their dimensions are in use.

Shapes: N images, D the encoder's width.
"""

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.augment import normalize
from minissl.errors import InputError
from minissl.method import Tokens

POOLS = ("cls", "both")


def pooled(tokens: Tokens, pool: str) -> Tensor:
    """One vector an image: the class token (B, D), or "both", it and the mean of the patches, (B, 2D).

    DINOv2's linear classifier (arXiv:2304.07193, appendix B.3) reads both; some tasks train the patches alone.
    """
    return tokens.cls if pool == "cls" else torch.cat([tokens.cls, tokens.patches.mean(dim=(1, 2))], dim=-1)


def moved(images: Tensor, size: int, patch: int, starts: Iterable[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Copies of images moved by parts of a patch, borders repeated, as an encoder eats them.

    Args:
        images: (B, 3, H, W) uint8, brought to size x size first.
        size: pixels a side.
        patch: pixels a side of a patch; half of it is added on each side.
        starts: rows, and columns, of the padded image at which a copy begins; with patch // 2 it is not moved.

    Yields:
        Its row, its column, and the copy (B, 3, size, size).
    """
    images = F.interpolate(images.float() / 255, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    padded = F.pad(images, (patch // 2,) * 4, mode="replicate")
    for down, right in itertools.product(starts, repeat=2):
        yield down, right, normalize(padded[:, :, down : down + size, right : right + size])


@torch.no_grad()
def fine_patches(encoder: nn.Module, images: Tensor, size: int, stride: int = 2) -> Tensor:
    """Patch vectors closer together than the patches: those of moved copies of the image, each put where it belongs.

    A small encoder at its own size has a grid of a few patches. At twice the size it has four times as many, each of
    which shows half as much, and outlines become sharper; moved copies fill in what is between. With both, a map of
    cosines follows an object's outline; with either alone it is blocks, or blobs with a pattern of the grid.

    Args:
        encoder: images -> Tokens, in evaluation mode.
        images: (B, 3, H, W) uint8.
        size: pixels a side the encoder sees; up to twice that of its training looks true.
        stride: pixels between two vectors; divides the patch; 0 for the largest that gives 16 vectors a side.

    Returns:
        (B, size / stride, size / stride, D).

    Raises:
        InputError: if the stride does not divide the patch.
    """
    ((_, _, still),) = moved(images[:1], size, 0, [0])
    patch = size // encoder(still).patches.shape[2]
    stride = stride or next(s for s in range(patch, 0, -1) if s == 1 or (patch % s == 0 and size // s >= 16))
    if patch % stride:
        raise InputError(f"A stride of {stride} pixels does not divide a patch of {patch}; give one that does.")
    copies = moved(images, size, patch, range(stride // 2, patch, stride))
    found = torch.stack([encoder(copy).patches for _, _, copy in copies])  # (k k, B, h, w, D), k = patch / stride
    found = found.unflatten(0, (patch // stride, -1)).permute(2, 3, 0, 4, 1, 5)  # (B, h, k, w, k, D)
    return found.flatten(3, 4).flatten(1, 2)


@torch.no_grad()
def patch_of(encoder: nn.Module) -> int:
    """Pixels a side of what one of an encoder's patches stands for."""
    known = getattr(encoder, "patch_size", None)
    device = next(iter(encoder.parameters()), torch.empty(0)).device
    return known or 224 // encoder(torch.zeros(1, 3, 224, 224, device=device)).patches.shape[1]


@torch.no_grad()
def frame_patches(encoder: nn.Module, frames: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """The patches of a clip, frame by frame, so that a long one at high resolution need not be held at once.

    Args:
        encoder: images -> Tokens, in evaluation mode, on the device of the frames.
        frames: (T, 3, H, W) uint8.
        size: height and width to bring them to first, in whole patches.

    Yields:
        (h, w, D) of each frame.
    """
    for frame in frames:
        image = frame[None].float() / 255
        if image.shape[-2:] != tuple(size):
            image = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        yield encoder(normalize(image)).patches[0]


@torch.no_grad()
def extract(
    encoder: nn.Module, images: Tensor, size: int | None = None, batch_size: int = 256, pool: str = "cls"
) -> Tensor:
    """The encoder's vectors for images, in evaluation mode.

    Args:
        encoder: images -> Tokens, on the device of the images.
        images: (N, 3, H, W) uint8.
        size: pixels a side to bring them to first; as they are if None.
        batch_size: images at a time.
        pool: what is read of an image's tokens, one of POOLS; see `pooled`.

    Returns:
        (N, D) float32, or (N, 2D), on the device of the images; not normalised.
    """
    training = encoder.training
    encoder.eval()
    out = []
    for batch in images.split(batch_size):
        batch = batch.float() / 255
        if size and batch.shape[-1] != size:
            batch = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        out.append(pooled(encoder(normalize(batch)), pool).float())
    encoder.train(training)
    return torch.cat(out)


def rank_me(features: Tensor) -> float:
    """How many dimensions features (N, D) really use: exp of the entropy of their singular values, 1 to min(N, D).

    Garrido et al., RankMe, 2022 (arXiv:2210.02885), eq. 1. Needs no labels; 1 means collapse.
    """
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))
