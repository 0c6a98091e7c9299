"""An uncurated pool: images as one finds them, not as one would choose them, with the truth of which is which.

A few kinds of object are in most of the pictures and some in hardly any; many pictures are near-copies of another;
some show no object at all. It is what chapter 3.4 curates.

Shapes: N images (N, 3, S, S) uint8; what is known of each is (N,) int64.
"""

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.data.scenes import DRAWS, FACTORS, OBJECTS, factors, render_all

TOPICS = ("scene", "noise", "text", "plain")
COPIES, OFF_TOPIC = 0.25, 0.2  # shares of the pool
_ROOT = 50  # beside the splits of Scenes and of Clips
_OWN = DRAWS  # columns of a picture's own draws: after those of its scene


class Pool:
    """The images 0 .. n-1 of a pool, drawn when first asked for and kept.

    Args:
        n: how many.
        size: pixels a side.
        seed: another pool of the same world.

    Attributes:
        images: (n, 3, size, size) uint8.
        labels: (n,) the object's kind, or -1 where there is none.
        topic: (n,) index into TOPICS.
        origin: (n,) the picture this one nearly repeats, always an earlier one; its own number if it repeats none.
    """

    classes = OBJECTS

    def __init__(self, n: int = 20_000, size: int = 64, seed: int = 0):
        self.n, self.size, self.seed = n, size, seed
        own = np.stack([np.random.default_rng((seed, _ROOT, i)).random(DRAWS + 8) for i in range(n)])
        self.draws = torch.from_numpy(own)
        what, earlier = self.draws[:, _OWN], self.draws[:, _OWN + 1]
        self.topic = torch.where(what < OFF_TOPIC, 1 + (what / OFF_TOPIC * 3).long(), 0)
        repeats = (what > 1 - COPIES) & (torch.arange(n) > 0)
        self.origin = torch.arange(n)
        for i in repeats.nonzero()[:, 0].tolist():
            self.origin[i] = self.origin[int(earlier[i] * i)]  # of a copy, the original
        self.topic = self.topic[self.origin]
        scene = self.draws[self.origin, :DRAWS]
        self.factors = factors(scene)
        share = 1 / torch.arange(1, len(OBJECTS) + 1, dtype=torch.float64)  # Zipf's law
        most = torch.searchsorted((share / share.sum()).cumsum(0), scene[:, 0].contiguous())
        self.factors["object"] = most.clamp_max(len(OBJECTS) - 1)
        self.labels = torch.where(self.topic == 0, self.factors["object"], -1)

    def __len__(self) -> int:
        return self.n

    @cached_property
    def images(self) -> Tensor:
        out = torch.empty(self.n, 3, self.size, self.size, dtype=torch.uint8)
        shows = self.topic == 0
        truth = {name: self.factors[name][shows] for name in FACTORS}
        out[shows] = render_all(self.draws[self.origin[shows], :DRAWS], truth, self.size).images
        for i in (~shows).nonzero()[:, 0].tolist():
            original = int(self.origin[i])
            chance = np.random.default_rng((self.seed, _ROOT + 1, original))
            out[i] = _off_topic(TOPICS[int(self.topic[i])], self.size, chance)
        for i in (self.origin != torch.arange(self.n)).nonzero()[:, 0].tolist():
            out[i] = _copy(out[i], self.draws[i, _OWN + 2 :])
        return out


def _off_topic(topic: str, size: int, chance: np.random.Generator) -> Tensor:
    """(3, size, size) uint8: noise, a page of text, or a plain colour."""
    color = torch.from_numpy(chance.random((2, 3, 1, 1)))
    if topic == "noise":
        image = torch.from_numpy(chance.random((3, size, size)))
    elif topic == "text":
        cells = -(-size // 2)
        ink = torch.from_numpy(chance.random((cells, cells))) < 0.55
        line, column = torch.arange(cells)[:, None], torch.arange(cells)
        ink = ink & (line % 6 < 4) & (column % 4 < 3)  # letters of 3 x 4 cells, in lines
        ink = ink & torch.from_numpy(chance.random(cells // 4 + 1) < 0.8).repeat_interleave(4)[:cells]  # words
        ink = ink.repeat_interleave(2, 0).repeat_interleave(2, 1)[:size, :size]
        image = torch.where(ink, 0.3 * color[0], 0.7 + 0.3 * color[1])
    else:
        slope = torch.linspace(0, 0.15, size, dtype=torch.float64)
        image = (color[0] + slope).expand(3, size, size)
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _copy(image: Tensor, draws: Tensor) -> Tensor:
    """The same picture again: a little moved, lighter or darker, sometimes mirrored."""
    size = image.shape[-1]
    most = max(size // 16, 1)
    down, right = ((draws[:2] * (2 * most + 1)).long() - most).tolist()
    padded = F.pad(image[None].double(), (most,) * 4, mode="replicate")[0]
    moved = padded[:, most + down : most + down + size, most + right : most + right + size]
    moved = moved.flip(-1) if draws[2] < 0.3 else moved
    return (moved * (0.85 + 0.3 * draws[3])).round().clamp(0, 255).to(torch.uint8)
