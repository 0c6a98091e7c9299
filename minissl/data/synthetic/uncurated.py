"""An uncurated pool: images as they are found, with the ground truth that curation has to recover.

A few object classes dominate and some are rare, by Zipf's law. Many images are near-duplicates of another, and some
show no object at all. Chapter 3.4 curates this pool.

Shapes: N images (N, 3, S, S) uint8; annotations (N,) int64.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minissl.data.images import Factor
from minissl.data.synthetic.rendered import RenderedDataset
from minissl.data.synthetic.scenes import FACTORS, NUM_DRAWS, OBJECTS, render_all, scene_factors

TOPICS = ("scene", "noise", "text", "plain")
COPIES, OFF_TOPIC = 0.25, 0.2  # fractions of the pool
_ROOT = 50  # seed sequence entry that no split of Scenes or Clips has
_OWN = NUM_DRAWS  # first column of an image's own random numbers, after those of its scene


class UncuratedPool(RenderedDataset):
    """The images 0..n-1 of a pool. They are rendered on first use and kept.

    Args:
        n: N.
        size: S.
        seed: pools of another seed differ, and have the same distribution.

    Attributes:
        images: (n, 3, S, S) uint8.
        labels: (n,) the object, or -1 where there is none.
        factors: as those of Scenes, -1 where no scene is shown.
        topic: (n,) index into TOPICS.
        origin: (n,) index of the image that this one nearly duplicates, always an earlier one; its own index if none.
        draws: (n, NUM_DRAWS + 8) float64, the random numbers that determine the images.
    """

    labels: Tensor

    def __init__(self, n: int = 20_000, size: int = 64, seed: int = 0):
        draws = np.stack([np.random.default_rng((seed, _ROOT, i)).random(NUM_DRAWS + 8) for i in range(n)])
        self.seed, self.draws = seed, torch.from_numpy(draws)
        category, earlier = self.draws[:, _OWN], self.draws[:, _OWN + 1]
        topic = torch.where(category < OFF_TOPIC, 1 + (category / OFF_TOPIC * 3).long(), 0)
        is_copy = (category > 1 - COPIES) & (torch.arange(n) > 0)
        self.origin = torch.arange(n)
        for i in is_copy.nonzero()[:, 0].tolist():
            self.origin[i] = self.origin[int(earlier[i] * i)]  # a copy of a copy has the original as its origin
        self.topic = topic[self.origin]
        scene = self.draws[self.origin, :NUM_DRAWS]
        labels = scene_factors(scene)
        frequency = 1 / torch.arange(1, len(OBJECTS) + 1, dtype=torch.float64)  # Zipf's law
        zipf = torch.searchsorted((frequency / frequency.sum()).cumsum(0), scene[:, 0].contiguous())
        labels["object"] = zipf.clamp_max(len(OBJECTS) - 1)
        labels = {name: torch.where(self.topic == 0, values, -1) for name, values in labels.items()}
        factors = {name: Factor(labels[name], FACTORS[name], ()) for name in FACTORS}
        super().__init__(n, size, labels["object"], OBJECTS, factors)

    def _render(self, indices: Tensor) -> list[Tensor]:
        images = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        origin, topic = self.origin[indices], self.topic[indices]
        is_scene = topic == 0
        factors = {name: factor.labels[indices[is_scene]] for name, factor in self.factors.items()}
        images[is_scene] = render_all(self.draws[origin[is_scene], :NUM_DRAWS], factors, self.image_size).images
        for row in (~is_scene).nonzero()[:, 0].tolist():
            rng = np.random.default_rng((self.seed, _ROOT + 1, int(origin[row])))
            images[row] = _off_topic_image(TOPICS[int(topic[row])], self.image_size, rng)
        for row in (origin != indices).nonzero()[:, 0].tolist():
            images[row] = _near_duplicate(images[row], self.draws[indices[row], _OWN + 2 :])
        return [images]


def _off_topic_image(topic: str, size: int, rng: np.random.Generator) -> Tensor:
    """Return (3, size, size) uint8: noise, a page of text, or a plain color."""
    color = torch.from_numpy(rng.random((2, 3, 1, 1)))
    if topic == "noise":
        image = torch.from_numpy(rng.random((3, size, size)))
    elif topic == "text":
        cells = -(-size // 2)
        ink = torch.from_numpy(rng.random((cells, cells))) < 0.55
        line, column = torch.arange(cells)[:, None], torch.arange(cells)
        ink = ink & (line % 6 < 4) & (column % 4 < 3)  # letters of 3 x 4 cells, in lines
        ink = ink & torch.from_numpy(rng.random(cells // 4 + 1) < 0.8).repeat_interleave(4)[:cells]  # words
        ink = ink.repeat_interleave(2, 0).repeat_interleave(2, 1)[:size, :size]
        image = torch.where(ink, 0.3 * color[0], 0.7 + 0.3 * color[1])
    else:
        slope = torch.linspace(0, 0.15, size, dtype=torch.float64)
        image = (color[0] + slope).expand(3, size, size)
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def _near_duplicate(image: Tensor, draws: Tensor) -> Tensor:
    """Shift an image (3, S, S), change its brightness, and flip it with probability 0.3."""
    size = image.shape[-1]
    max_shift = max(size // 16, 1)
    down, right = ((draws[:2] * (2 * max_shift + 1)).long() - max_shift).tolist()
    padded = F.pad(image[None].double(), (max_shift,) * 4, mode="replicate")[0]
    shifted = padded[:, max_shift + down : max_shift + down + size, max_shift + right : max_shift + right + size]
    shifted = shifted.flip(-1) if draws[2] < 0.3 else shifted
    return (shifted * (0.85 + 0.3 * draws[3])).round().clamp(0, 255).to(torch.uint8)
