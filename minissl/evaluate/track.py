"""Do patches keep saying what they show while it moves? The mask of the first frame is handed on from patch to patch.

Nothing is trained: a patch asks the patches near it in earlier frames, and believes those that look most like it.
Jabri et al., Space-Time Correspondence as a Contrastive Random Walk, 2020 (arXiv:2006.14613), in the forms of DINO
(Caron et al., 2021, arXiv:2104.14294) and DINOv3 (Siméoni et al., 2025, arXiv:2508.10104).

Shapes: T frames of H x W pixels, a grid (h, w) of vectors of D numbers, K earlier frames, M numbers of objects. Patches
ask by tiles of n, which look at the same S places of each earlier frame; most of the frame is never looked at.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.errors import InputError
from minissl.evaluate.segment import at_patches

WINDOWS, UPSAMPLINGS = ("circle", "square"), ("nearest", "bilinear")
TILE = 4, 8  # patches; of larger tiles, most that the tile looks at is too far from each of its patches


@torch.no_grad()
def propagate(
    current: Tensor,
    context: Tensor,
    labels: Tensor,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    window: str = "circle",
) -> Tensor:
    """What the patches of a frame show, by what those that look like them showed in earlier frames.

        for each patch: of the patches of all earlier frames within the radius, take the topk most similar, and those
        that are as similar as the last of them; average their labels with the weights exp(cosine / temperature)

    Args:
        current: (h, w, D), each vector of length 1.
        context: (K, h, w, D), likewise.
        labels: (K, h, w, M), how much of each object every patch of the context shows.
        radius: how far a patch looks, in patches.
        topk: how many it believes.
        temperature: lower listens more to the most similar.
        window: what is within the radius, a "circle" or a "square".

    Returns:
        (h, w, M), which sum to 1 over M.
    """
    h, w, _ = current.shape
    high, wide = min(TILE[0], h), min(TILE[1], w)
    down, across = min(radius, h - 1), min(radius, w - 1)  # no patch is farther away
    below = -h % high  # rows that fill the last tile
    closed = _closed(h, (high, wide), (down, across), radius, window).to(context)
    out = labels.new_zeros(h, w, labels.shape[-1])
    for left in [*range(0, w - wide, wide), w - wide]:  # strips of tiles; the last may lie over the one before
        near = range(max(left - across, 0), min(left + wide + across, w))  # its columns and those around it
        columns = slice(near.start, near.stop)
        sources, shown = (  # of each tile a window onto the strip, which is not copied: (K, tiles, D, S) and M for D
            F.pad(x[:, :, columns], (0, 0, 0, 0, down, down + below))
            .flatten(1, 2)
            .unfold(1, (high + 2 * down) * len(near), high * len(near))
            for x in (context, labels)
        )
        own = slice(left, left + wide)
        asking = F.pad(current[:, own], (0, 0, 0, 0, 0, below)).unflatten(0, (-1, high)).flatten(1, 2)  # (tiles, n, D)
        shut = closed[..., near.start - left + across : near.stop - left + across].flatten(2)  # (tiles, n, S)
        found = _believe(asking, sources, shown, shut, topk, temperature)
        out[:, own] = found.unflatten(1, (high, wide)).flatten(0, 1)[:h]
    return F.normalize(out, p=1, dim=-1)


def _closed(h: int, tile: tuple[int, int], reach: tuple[int, int], radius: int, window: str) -> Tensor:
    """-inf where a patch of a tile may not look at a place around the tile, else 0.

    Returns:
        (tiles, n, high + 2 down, wide + 2 across), of a strip of tiles over h rows.
    """
    (high, wide), (down, across) = tile, reach
    row = torch.arange(-(-h // high))[:, None] * high + torch.arange(high)  # (tiles, high), of a patch
    to = row[:, :1] - down + torch.arange(high + 2 * down)  # (tiles, high + 2 down), of a place
    rows = (row[:, :, None] - to[:, None])[:, :, None, :, None]
    columns = (torch.arange(wide)[:, None] + across - torch.arange(wide + 2 * across))[:, None]
    near = (
        (rows.abs() <= radius) & (columns.abs() <= radius)
        if window == "square"
        else (rows**2 + columns**2 <= radius**2)
    )
    near = near & ((to >= 0) & (to < h))[:, None, None, :, None] & (row < h)[:, :, None, None, None]
    return torch.zeros(near.shape).masked_fill(~near, -torch.inf).flatten(1, 2)


def _believe(asking: Tensor, sources: Tensor, shown: Tensor, closed: Tensor, topk: int, temperature: float) -> Tensor:
    """The labels (tiles, n, M) of patches (tiles, n, D); `closed` (tiles, n, S) is added to the cosines."""
    frames, most = len(sources), min(topk + 1, closed.shape[2])
    cosines = closed.new_empty(frames, *closed.shape)  # (K, tiles, n, S)
    for into, vectors in zip(cosines, sources):
        torch.bmm(asking, vectors, out=into)
    # The best topk + 1 are in the topk + 1 places where the best of all frames is best: few numbers to sort.
    places = (cosines.amax(dim=0) + closed).topk(most).indices  # (tiles, n, most)
    few = cosines.gather(3, places.expand(frames, -1, -1, -1)) + closed.gather(2, places)  # (K, tiles, n, most)
    best, which = few.movedim(0, 2).flatten(2).topk(min(topk + 1, frames * most))  # (tiles, n, topk + 1)
    last = best[..., :topk][..., -1:]  # (tiles, n, 1)
    if ((best[..., topk:] == last) & (last > -torch.inf)).any():  # ties, as in a flat sky of raw pixels
        cosines += closed
        weights = ((cosines - best[..., :1]) / temperature).exp().masked_fill(cosines < last, 0)
        return sum(a @ b.mT for a, b in zip(weights, shown)) / weights.sum(dim=(0, 3))[..., None]
    tile = torch.arange(len(asking), device=asking.device)[:, None, None]
    labels = shown[which // most, tile, :, places.gather(2, which % most)]  # (tiles, n, topk + 1, M)
    weights = (best[..., :topk] / temperature).softmax(dim=-1)[..., None]
    return (weights * labels[:, :, :topk]).sum(dim=2)


@torch.no_grad()
def follow(
    features: Iterable[Tensor],
    first_mask: Tensor,
    context: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    window: str = "circle",
    upsampling: str = "nearest",
) -> Iterator[Tensor]:
    """`track`, frame by frame: of a long clip no more than `context` + 2 frames' features are held at once.

    Args:
        features: (h, w, D) of each frame, the first one's first.
        first_mask and what follows: as for `track`.

    Yields:
        (H, W) int64 of each frame.
    """
    numbers = first_mask.unique()
    first, past = None, deque(maxlen=context)
    for patches in features:
        # Half precision would make ties of patches that differ.
        now = F.normalize(patches.to(torch.promote_types(patches.dtype, torch.float32)), dim=-1)
        if first is None:
            shown = at_patches(first_mask[None], now.shape[:2])[0][..., None] == numbers  # (h, w, M)
            first = (now, shown.to(now))
            yield first_mask.long()
            continue
        known = [first, *past]
        vectors, labels = (torch.stack(part) for part in zip(*known))  # (K, h, w, D), (K, h, w, M)
        labels = propagate(now, vectors, labels, radius, topk, temperature, window)
        past.append((now, labels))
        yield numbers[_decide(labels, first_mask.shape, upsampling)].long()


def _decide(labels: Tensor, size: torch.Size, upsampling: str) -> Tensor:
    """The strongest of the M for each pixel, (H, W), after each is stretched to [0, 1] over the frame."""
    maps = labels.permute(2, 0, 1)[None]  # (1, M, h, w)
    if upsampling == "bilinear":
        maps = F.interpolate(maps, size=size, mode="bilinear")
    maps = maps - maps.amin((-2, -1), keepdim=True)
    maps = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12)
    found = maps.argmax(dim=1, keepdim=True)  # (1, 1, ...)
    return found[0, 0] if upsampling == "bilinear" else F.interpolate(found.float(), size=size)[0, 0].long()


@torch.no_grad()
def track(
    features: Tensor,
    first_mask: Tensor,
    context: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.2,
    window: str = "circle",
    upsampling: str = "nearest",
) -> Tensor:
    """Where the objects of the first frame are in the others.

    The defaults are DINOv3's recipe. DINO's is temperature=0.1, window="square", upsampling="bilinear".

    Args:
        features: (T, h, w, D) patches of the frames, of any length.
        first_mask: (H, W) integers, the number of the object each pixel of the first frame shows.
        context: frames asked besides the first one, the last so many; they say what they were found to show.
        radius: how far a patch may have come, in patches.
        topk: how many patches a patch believes, over all frames asked.
        temperature: of the softmax over their cosines.
        window: what is within the radius, a "circle" or a "square".
        upsampling: from patches to pixels, "nearest" or "bilinear".

    Returns:
        (T, H, W) int64, the numbers of the first mask; its first frame is that mask.

    Raises:
        InputError: for shapes that do not fit, a mask that is not of integers, or an option out of its range.
    """
    check_options(context, radius, topk, temperature, window, upsampling)
    if features.ndim != 4 or len(features) == 0 or first_mask.ndim != 2:
        raise InputError(
            f"Features are (T, h, w, D) and the first mask is (H, W); these are {tuple(features.shape)} and "
            f"{tuple(first_mask.shape)}."
        )
    if first_mask.is_floating_point():
        raise InputError("The first mask holds fractions; it is to hold the numbers of objects.")
    options = (context, radius, topk, temperature, window, upsampling)
    return torch.stack(list(follow(features, first_mask.to(features.device), *options)))


def check_options(context: int, radius: int, topk: int, temperature: float, window: str, upsampling: str) -> None:
    """Raises InputError for an option of `track` that is out of its range."""
    for name, value, least in (("context", context, 0), ("radius", radius, 0), ("topk", topk, 1)):
        if value < least:
            raise InputError(f"Tracking cannot do with {name} {value}; give {least} or more.")
    if not temperature > 0:
        raise InputError(f"A softmax cannot have temperature {temperature}; give one above 0.")
    for value, known in ((window, WINDOWS), (upsampling, UPSAMPLINGS)):
        if value not in known:
            raise InputError(f"Tracking knows no {value!r}; choose {' or '.join(known)}.")
