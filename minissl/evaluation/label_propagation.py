"""Propagate the mask of a clip's first frame to its other frames by the similarity of patch features.

Nothing is trained. Each patch takes the similarity-weighted labels of its top-k neighbors in earlier frames.
Jabri et al., Space-Time Correspondence as a Contrastive Random Walk, 2020 (arXiv:2006.14613), in the forms of DINO
(Caron et al., 2021, arXiv:2104.14294) and DINOv3 (Siméoni et al., 2025, arXiv:2508.10104).

Shapes: T frames of H x W pixels, a grid (h, w) of patch features of D dimensions, K context frames, M labels. Queries
are processed in tiles of n patches, which share a window of S positions in each context frame.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.errors import InputError
from minissl.evaluation.segmentation import labels_at_patch_centers

WINDOWS, UPSAMPLINGS = ("circle", "square"), ("nearest", "bilinear")
TILE = 4, 8  # patches; in larger tiles, most of the shared window is too far from each of its patches

Window = Literal["circle", "square"]
Upsampling = Literal["nearest", "bilinear"]


@torch.no_grad()
def propagate_frame(
    current: Tensor,
    context: Tensor,
    labels: Tensor,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    window: Window = "circle",
) -> Tensor:
    """Compute the label probabilities of a frame's patches from those of earlier frames.

        for each patch: of the patches of all context frames within the radius, take the topk most similar, and those
        that tie with the last of them; average their labels with the weights exp(cosine / temperature)

    Args:
        current: (h, w, D), each feature L2-normalized.
        context: (K, h, w, D), likewise.
        labels: (K, h, w, M) probabilities of the context's patches.
        radius: maximal distance in patches.
        topk: number of neighbors, over all context frames together.
        temperature: a lower one gives more weight to the most similar neighbors.
        window: shape of the neighborhood: "circle" limits the Euclidean distance, "square" that along each axis.

    Returns:
        (h, w, M) probabilities, which sum to 1 over M.
    """
    h, w, _ = current.shape
    tile_h, tile_w = min(TILE[0], h), min(TILE[1], w)
    reach_y, reach_x = min(radius, h - 1), min(radius, w - 1)  # no patch is farther away
    fill = -h % tile_h  # rows that complete the last tile
    excluded = _window_mask(h, (tile_h, tile_w), (reach_y, reach_x), radius, window).to(context)
    out = labels.new_zeros(h, w, labels.shape[-1])
    for left in [*range(0, w - tile_w, tile_w), w - tile_w]:  # strips of tiles; the last may overlap the one before
        start, stop = max(left - reach_x, 0), min(left + tile_w + reach_x, w)  # the strip's columns and those around
        width = stop - start
        # One window per tile, views of the strip without a copy: (K, tiles, D, S) and (K, tiles, M, S).
        keys, values = (
            F.pad(x[:, :, start:stop], (0, 0, 0, 0, reach_y, reach_y + fill))
            .flatten(1, 2)
            .unfold(1, (tile_h + 2 * reach_y) * width, tile_h * width)
            for x in (context, labels)
        )
        columns = slice(left, left + tile_w)
        queries = F.pad(current[:, columns], (0, 0, 0, 0, 0, fill)).unflatten(0, (-1, tile_h))
        queries = queries.flatten(1, 2)  # (tiles, n, D)
        mask = excluded[..., start - left + reach_x : stop - left + reach_x].flatten(2)  # (tiles, n, S)
        average = _topk_average(queries, keys, values, mask, topk, temperature)  # (tiles, n, M)
        out[:, columns] = average.unflatten(1, (tile_h, tile_w)).flatten(0, 1)[:h]
    return F.normalize(out, p=1, dim=-1)


def _window_mask(h: int, tile: tuple[int, int], reach: tuple[int, int], radius: int, window: Window) -> Tensor:
    """Return -inf where a position around a tile is outside a patch's neighborhood or the frame, else 0.

    Returns:
        (tiles, n, tile_h + 2 reach_y, tile_w + 2 reach_x), of a strip of tiles over h rows.
    """
    (tile_h, tile_w), (reach_y, reach_x) = tile, reach
    query_row = torch.arange(-(-h // tile_h))[:, None] * tile_h + torch.arange(tile_h)  # (tiles, tile_h)
    key_row = query_row[:, :1] - reach_y + torch.arange(tile_h + 2 * reach_y)  # (tiles, tile_h + 2 reach_y)
    dy = (query_row[:, :, None] - key_row[:, None])[:, :, None, :, None]
    dx = (torch.arange(tile_w)[:, None] + reach_x - torch.arange(tile_w + 2 * reach_x))[:, None]
    inside = (dy.abs() <= radius) & (dx.abs() <= radius) if window == "square" else dy**2 + dx**2 <= radius**2
    key_exists = ((key_row >= 0) & (key_row < h))[:, None, None, :, None]
    inside = inside & key_exists & (query_row < h)[:, :, None, None, None]
    return torch.zeros(inside.shape).masked_fill(~inside, -torch.inf).flatten(1, 2)


def _topk_average(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, topk: int, temperature: float) -> Tensor:
    """Average the values of each query's most similar keys.

    Args:
        queries: (tiles, n, D).
        keys: (K, tiles, D, S).
        values: (K, tiles, M, S).
        mask: (tiles, n, S), added to the cosines.
        topk, temperature: as for `propagate_frame`.

    Returns:
        (tiles, n, M).
    """
    num_frames, num_kept = len(keys), min(topk + 1, mask.shape[2])
    cosines = mask.new_empty(num_frames, *mask.shape)  # (K, tiles, n, S)
    for out, frame_keys in zip(cosines, keys):
        torch.bmm(queries, frame_keys, out=out)
    # The topk + 1 best keys are among the topk + 1 positions with the best maximum over frames: less to sort.
    positions = (cosines.amax(dim=0) + mask).topk(num_kept).indices  # (tiles, n, num_kept)
    kept = cosines.gather(3, positions.expand(num_frames, -1, -1, -1)) + mask.gather(2, positions)
    best, indices = kept.movedim(0, 2).flatten(2).topk(min(topk + 1, num_frames * num_kept))  # (tiles, n, topk + 1)
    last = best[..., :topk][..., -1:]  # (tiles, n, 1)
    if ((best[..., topk:] == last) & (last > -torch.inf)).any():  # ties, as in a uniform sky of raw pixels
        cosines += mask
        weights = ((cosines - best[..., :1]) / temperature).exp().masked_fill(cosines < last, 0)
        sums = reduce(torch.add, (a @ b.mT for a, b in zip(weights, values)))  # (tiles, n, M)
        return sums / weights.sum(dim=(0, 3))[..., None]
    tile = torch.arange(len(queries), device=queries.device)[:, None, None]
    labels = values[indices // num_kept, tile, :, positions.gather(2, indices % num_kept)]  # (tiles, n, topk + 1, M)
    weights = (best[..., :topk] / temperature).softmax(dim=-1)[..., None]
    return (weights * labels[:, :, :topk]).sum(dim=2)


@torch.no_grad()
def propagate_stream(
    features: Iterable[Tensor],
    first_mask: Tensor,
    context: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    window: Window = "circle",
    upsampling: Upsampling = "nearest",
) -> Iterator[Tensor]:
    """Propagate labels frame by frame, holding the features of at most `context` + 2 frames.

    Args:
        features: (h, w, D) of each frame, in order, not necessarily L2-normalized.
        first_mask: on the features' device; it and the other arguments are as for `propagate_labels`.
        context, radius, topk, temperature, window, upsampling: as for `propagate_labels`.

    Yields:
        (H, W) int64 object ids of each frame; the first is the first mask.
    """
    object_ids = first_mask.unique()
    first: tuple[Tensor, Tensor] | None = None
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
    for patches in features:
        # Half precision would make ties of patches that differ.
        current = F.normalize(patches.to(torch.promote_types(patches.dtype, torch.float32)), dim=-1)
        if first is None:
            one_hot = labels_at_patch_centers(first_mask[None], current.shape[:2])[0][..., None] == object_ids
            first = (current, one_hot.to(current))  # (h, w, D), (h, w, M)
            yield first_mask.long()
            continue
        frames, probs = (torch.stack(part) for part in zip(first, *past))  # (K, h, w, D), (K, h, w, M)
        labels = propagate_frame(current, frames, probs, radius, topk, temperature, window)
        past.append((current, labels))
        yield object_ids[_upsample_labels(labels, first_mask.shape, upsampling)].long()


def _upsample_labels(labels: Tensor, size: torch.Size, upsampling: Upsampling) -> Tensor:
    """Return the index of the strongest label of each pixel, (H, W), after scaling each label's map to [0, 1]."""
    maps = labels.permute(2, 0, 1)[None]  # (1, M, h, w)
    if upsampling == "bilinear":
        maps = F.interpolate(maps, size=size, mode="bilinear")
    maps = maps - maps.amin((-2, -1), keepdim=True)
    maps = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12)
    strongest = maps.argmax(dim=1, keepdim=True)  # (1, 1, ...)
    return strongest[0, 0] if upsampling == "bilinear" else F.interpolate(strongest.float(), size=size)[0, 0].long()


@torch.no_grad()
def propagate_labels(
    features: Tensor,
    first_mask: Tensor,
    context: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    window: Window = "circle",
    upsampling: Upsampling = "nearest",
) -> Tensor:
    """Propagate the labels of a clip's first frame to all its other frames.

    The defaults are DINOv3's recipe. DINO's is temperature=0.1, window="square", upsampling="bilinear".

    Args:
        features: (T, h, w, D) patch tokens of the frames, not necessarily L2-normalized.
        first_mask: (H, W) integers, the object id of each pixel of the first frame.
        context: number of preceding frames that are used besides the first, with their predicted labels.
        radius: maximal distance of a neighbor in patches.
        topk: number of neighbors over all context frames.
        temperature: of the softmax over their cosines.
        window: shape of the neighborhood, "circle" or "square", as for `propagate_frame`.
        upsampling: from patches to pixels, "nearest" or "bilinear".

    Returns:
        (T, H, W) int64 object ids; the first frame is the first mask.

    Raises:
        InputError: for shapes that do not fit, a mask that is not of integers, or an option out of its range.
    """
    check_propagation_options(context, radius, topk, temperature, window, upsampling)
    if features.ndim != 4 or len(features) == 0 or first_mask.ndim != 2:
        raise InputError(
            f"Features are {tuple(features.shape)} and the first mask is {tuple(first_mask.shape)}; give (T, h, w, D) "
            "with T of 1 or more, and (H, W)."
        )
    if first_mask.is_floating_point():
        raise InputError(f"The first mask is {first_mask.dtype}; give integers, the object id of each pixel.")
    return torch.stack(
        list(
            propagate_stream(
                features, first_mask.to(features.device), context, radius, topk, temperature, window, upsampling
            )
        )
    )


def check_propagation_options(
    context: int, radius: int, topk: int, temperature: float, window: str, upsampling: str
) -> None:
    """Raise InputError for an option of `propagate_labels` that is out of its range."""
    for name, value, minimum in (("context", context, 0), ("radius", radius, 0), ("topk", topk, 1)):
        if value < minimum:
            raise InputError(f"--{name} is {value}; give {minimum} or more.")
    if not temperature > 0:
        raise InputError(f"--temperature is {temperature}; give a number above 0.")
    for name, choice, choices in (("window", window, WINDOWS), ("upsampling", upsampling, UPSAMPLINGS)):
        if choice not in choices:
            raise InputError(f"--{name} is {choice!r}; choose {' or '.join(choices)}.")
