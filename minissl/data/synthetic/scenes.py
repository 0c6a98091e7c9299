"""Scenes: synthetic images with complete and exact annotations, a function of (split, seed, index).

A scene shows an object of some class and color, which does something at some place: "a red fish jumping over a snowy
field". Light, size, position, angle, the look of the background, clutter, a second object behind it and an occluder in
front of it vary independently of these four factors and have no label. Factors, captions and the part that each pixel
belongs to are known exactly, so every claim of the course can be measured without a network connection.

Shapes: N scenes of a split, B rendered at once; images (N, 3, S, S) uint8, maps (N, S, S) uint8.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minissl.data.images import Captions, Factor
from minissl.data.synthetic.backgrounds import BACKGROUNDS
from minissl.data.synthetic.captions import CAPTIONS, describe, factor_prompts
from minissl.data.synthetic.rendered import RenderedDataset
from minissl.data.synthetic.renderer import (
    ACTIONS,
    COLORS,
    Clutter,
    SceneObject,
    apply_lighting,
    canvas,
    draw_background,
    draw_clutter,
    draw_object,
)
from minissl.data.synthetic.shapes import OBJECT_PARTS
from minissl.errors import InputError, suggestion

OBJECTS = tuple(OBJECT_PARTS)
FACTORS = {"object": OBJECTS, "color": tuple(COLORS), "action": ACTIONS, "place": tuple(BACKGROUNDS)}
SPLITS = ("train", "val", "test", "seen", "unseen")
NUM_DRAWS = 80  # uniform random numbers per scene
BACKGROUND, OBJECT, SECOND_OBJECT, CLUTTER, OCCLUDER = range(5)  # values of the map `regions`
CHUNK_PIXELS = 2**19  # pixels rendered at once: smaller chunks wait for the interpreter, larger ones leave the cache


class Rendering(NamedTuple):
    """Rendered scenes."""

    images: Tensor  # (B, 3, S, S) uint8
    masks: Tensor  # (B, S, S) uint8, 0 or 1 + i where the i-th part of the object is visible
    regions: Tensor  # (B, S, S) uint8, BACKGROUND, OBJECT, SECOND_OBJECT, CLUTTER or OCCLUDER


class RandomNumbers:
    """The random numbers of B scenes. Each call takes the next column of their uniform numbers (B, NUM_DRAWS)."""

    def __init__(self, draws: Tensor):
        self.columns = iter(draws.unbind(1))

    def uniform(self, low: float = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """Return (B,) float64, uniform in [low, high)."""
        return low + (high - low) * next(self.columns)

    def integer(self, n: int) -> Tensor:
        """Return (B,) int64, uniform in 0..n-1."""
        return (next(self.columns) * n).long()

    def vector(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (B, n) float64, uniform in [low, high)."""
        return torch.stack([self.uniform(low, high) for _ in range(n)], dim=1)


def uniforms(split: str, seed: int, indices: Sequence[int]) -> Tensor:
    """Sample (B, NUM_DRAWS) float64 numbers in [0, 1), which determine the scenes of these indices."""
    root = (seed, SPLITS.index(split))
    return torch.from_numpy(np.stack([np.random.default_rng((*root, int(i))).random(NUM_DRAWS) for i in indices]))


def scene_factors(draws: Tensor, split: str = "train") -> dict[str, Tensor]:
    """Return the four factors, each (B,) int64, of the first columns of the random numbers.

    They are independent and uniform, except in two splits. In "seen" every object misses one color and one action. In
    "unseen" each scene has the missing color or the missing action of its object: known words in new combinations.
    """
    rng = RandomNumbers(draws)
    obj, color, action, place = (rng.integer(len(names)) for names in FACTORS.values())
    missing_color, missing_action = (5 * obj) % len(COLORS), (2 * obj) % len(ACTIONS)
    if split == "seen":
        color = (missing_color + 1 + (draws[:, 1] * (len(COLORS) - 1)).long()) % len(COLORS)
        action = (missing_action + 1 + (draws[:, 2] * (len(ACTIONS) - 1)).long()) % len(ACTIONS)
    if split == "unseen":
        by_color = draws[:, 3] * len(BACKGROUNDS) % 1 < 0.5  # the fraction of the number that did not choose the place
        color, action = torch.where(by_color, missing_color, color), torch.where(by_color, action, missing_action)
    return dict(zip(FACTORS, (obj, color, action, place)))


def sample_object(rng: RandomNumbers, factors: dict[str, Tensor], size: Tensor, x: Tensor, y: Tensor) -> SceneObject:
    """Sample an object of given class, color and action in a pose of that action; `size`, `x` and `y` are (B,)."""
    jumping, tumbling, sleeping = (
        (factors["action"] == ACTIONS.index(a)).double() for a in ("jumping", "tumbling", "sleeping")
    )
    size = size * (1 - 0.12 * jumping)
    return SceneObject(
        factors["object"], factors["color"], factors["action"], torch.ones_like(factors["object"], dtype=torch.bool),
        x=x, y=y - 0.1 * sleeping * size, scale=size,
        direction=torch.where(rng.uniform() < 0.5, -1.0, 1.0).double(),
        angle=rng.uniform(-0.4, 0.4) + 0.35 * jumping + tumbling * rng.uniform(0.6, 1.3),
        elevation=(0.38 * jumping + 0.14 * tumbling) * size, width=rng.uniform(0.75, 1.25),
        tint=rng.vector(3, -0.06, 0.06),
    )  # fmt: skip


def sample_clutter(
    rng: RandomNumbers, n: int, prob: float, size: tuple[float, float], y: tuple[float, float]
) -> Clutter:
    """Sample up to n small shapes per scene, each present with probability `prob`; `size` and `y` are ranges."""
    present = (rng.vector(n) < prob).double()
    return Clutter(
        x=rng.vector(n, -0.95, 0.95), y=rng.vector(n, *y), size=present * rng.vector(n, *size),
        roundness=rng.vector(n), color=torch.stack([rng.vector(n, 0.15, 0.85) for _ in range(3)], dim=-1),
    )  # fmt: skip


def render(draws: Tensor, factors: dict[str, Tensor], size: int) -> Rendering:
    """Render scenes of `size` x `size` pixels from their random numbers (B, NUM_DRAWS) and factors."""
    rng = RandomNumbers(draws[:, len(FACTORS) :])
    at = canvas(len(draws), size)
    image = draw_background(
        at, factors["place"], horizon=rng.uniform(-0.35, 0.15), variation=rng.vector(3).T,
        haze=rng.vector(3, 0.35, 0.85), haze_fraction=rng.uniform(0.15, 0.55),
    )  # fmt: skip
    masks = torch.zeros(len(draws), size, size, dtype=torch.uint8)
    regions = torch.zeros_like(masks)
    image, regions = draw_clutter(image, regions, at, sample_clutter(rng, 3, 0.4, (0.05, 0.12), (-0.95, 0.1)), CLUTTER)
    main, second = _sample_objects(rng, factors)
    image, second_parts = draw_object(image, torch.zeros_like(masks), at, second)
    regions = torch.where(second_parts > 0, SECOND_OBJECT, regions)
    image, masks = draw_object(image, masks, at, main)
    regions = torch.where(masks > 0, OBJECT, regions)
    occluders = sample_clutter(rng, 2, 0.25, (0.16, 0.3), (-1.1, -0.55))
    image, regions = draw_clutter(image, regions, at, occluders, OCCLUDER)
    masks = torch.where(regions == OBJECT, masks, 0)
    lit = apply_lighting(
        image, angle=rng.uniform(0, 2 * np.pi), tilt=rng.uniform(0, 0.5), warmth=rng.uniform(-0.09, 0.09),
        gain=rng.uniform(0.45, 1.15),
    )  # fmt: skip
    return Rendering(lit, masks, regions)


def _sample_objects(rng: RandomNumbers, factors: dict[str, Tensor]) -> tuple[SceneObject, SceneObject]:
    """Sample the object of a scene, and a second one of another class, which a quarter of the scenes have."""
    size = rng.uniform(0.58, 0.9)  # half its height; smaller objects vary more in position
    main = sample_object(
        rng, factors, size, x=(0.85 - 0.5 * size) * rng.uniform(-1, 1), y=rng.uniform(-0.33, 0.66 - 0.6 * size)
    )
    others = {"object": (factors["object"] + 1 + rng.integer(len(OBJECTS) - 1)) % len(OBJECTS)}
    others |= {"color": rng.integer(len(COLORS)), "action": torch.zeros_like(factors["object"])}
    second = sample_object(
        rng, others, rng.uniform(0.26, 0.38), x=-rng.uniform(0.5, 0.85) * main.x.sign(), y=rng.uniform(-0.1, 0.6)
    )
    return main, second._replace(present=rng.uniform() < 0.25)


def render_all(draws: Tensor, factors: dict[str, Tensor], size: int) -> Rendering:
    """Compute `render` for many scenes on all cores; scenes of one object and place are rendered together."""
    order = torch.argsort(factors["object"] * len(BACKGROUNDS) + factors["place"], stable=True)
    out = Rendering(*(torch.empty(len(draws), *shape, size, size, dtype=torch.uint8) for shape in ((3,), (), ())))

    def render_chunk(indices: Tensor) -> None:
        rendering = render(draws[indices], {name: labels[indices] for name, labels in factors.items()}, size)
        for whole, part in zip(out, rendering):
            whole[indices] = part

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(render_chunk, order.split(max(1, CHUNK_PIXELS // size**2))))
    return out


class Scenes(RenderedDataset):
    """The scenes 0..n-1 of a split. They are rendered on first use and kept.

    Args:
        split: "train", "val" or "test"; "seen", in which every object misses a color and an action, and "unseen", which
            has only those. No scene is in two splits.
        size: S, at least 16; 32 to 512 look good.
        n: number of scenes; by default 10,000 for train and seen, 2,000 otherwise.
        seed: scenes of another seed differ, and have the same distribution.

    Attributes:
        images: (n, 3, S, S) uint8.
        labels: (n,) int64, the object, an index into `classes`.
        factors: "object", "color", "action" and "place".
        masks: (n, S, S) uint8, 0 or 1 + i where the i-th part of the object (`part_names`) is visible.
        regions: (n, S, S) uint8, BACKGROUND, OBJECT, SECOND_OBJECT, CLUTTER or OCCLUDER.
        boxes: (n, 4) int64, left, top, right and bottom of the visible object; right and bottom are exclusive.
        captions: for each scene, all `captions.CAPTIONS`.
        draws: (n, NUM_DRAWS) float64, the random numbers that determine the scenes.

    Raises:
        InputError: for an unknown split, or a size that is too small.
    """

    labels: Tensor

    def __init__(self, split: str, size: int = 64, n: int | None = None, seed: int = 0):
        if split not in SPLITS:
            hint = suggestion(split, SPLITS)
            raise InputError(f"Scenes has no split {split!r}{hint}; choose one of {', '.join(SPLITS)}.")
        if size < 16:
            raise InputError(f"Scenes of {size} pixels are too small to show an object; give a size of 16 or more.")
        self.split, self.seed = split, seed
        n = n if n is not None else 10_000 if split in ("train", "seen") else 2_000
        self.draws = uniforms(split, seed, range(n))
        labels = scene_factors(self.draws, split)
        factors = {name: Factor(labels[name], FACTORS[name], _prompts(name)) for name in FACTORS}
        super().__init__(n, size, labels["object"], OBJECTS, factors)

    def _render(self, indices: Tensor) -> Rendering:
        factors = {name: factor.labels[indices] for name, factor in self.factors.items()}
        return render_all(self.draws[indices], factors, self.image_size)

    @property
    def masks(self) -> Tensor:
        return self._rendered()[1]

    def _load_masks(self, indices: Tensor) -> Tensor:
        return self._rendered(indices)[1][indices]

    @property
    def regions(self) -> Tensor:
        return self._rendered()[2]

    @property
    def boxes(self) -> Tensor:
        return boxes(self.masks > 0)

    @cached_property
    def captions(self) -> Captions:
        captions: dict[tuple[int, ...], tuple[str, ...]] = {}  # fewer combinations than scenes
        combinations = list(zip(*(self.factors[name].labels.tolist() for name in FACTORS)))
        for combination in combinations:
            if combination not in captions:
                words = {name: FACTORS[name][i] for name, i in zip(FACTORS, combination)}
                captions[combination] = tuple(describe(i, **words) for i in range(len(CAPTIONS)))
        return tuple(captions[combination] for combination in combinations)


@cache
def _prompts(factor: str) -> tuple[tuple[str, ...], ...]:
    return factor_prompts(factor, FACTORS)


def part_names(name: str) -> tuple[str, ...]:
    """Return the parts of an object in the order of their values in `masks`: part i has the value 1 + i."""
    return tuple(part.name for part in OBJECT_PARTS[name])


def boxes(masks: Tensor) -> Tensor:
    """Return left, top, right and bottom (N, 4) of bool masks (N, H, W); right and bottom are exclusive, none is 0."""
    edges = []
    for axis in (1, 2):
        line = masks.any(dim=axis)  # (N, W), then (N, H)
        first, last = line.int().argmax(-1), line.shape[-1] - line.flip(-1).int().argmax(-1)
        edges.append((first * line.any(-1), last * line.any(-1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=-1)
