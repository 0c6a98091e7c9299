"""Scenes: an endless world drawn from (seed, index), with the truth of everything in it.

A scene is an object of some kind and colour, doing something somewhere: "a red fish jumping over a snowy field". Light,
size, position, tilt, the look of the place, clutter, a second object behind it and something standing before it vary
freely and carry no label. Because we draw it, we know the four factors, the captions and which pixel is what, so every
claim of the course can be measured without a network.

Shapes: B scenes drawn at once, N scenes of a split; images (N, 3, S, S) uint8, maps (N, S, S) uint8.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minissl.data.draw import ACTIONS, COLORS, Bits, Thing, canvas, draw_bits, draw_place, draw_thing, shine
from minissl.data.places import PLACES
from minissl.data.shapes import KINDS
from minissl.data.words import CAPTIONS, describe
from minissl.errors import InputError

OBJECTS = tuple(KINDS)
FACTORS = {"object": OBJECTS, "color": tuple(COLORS), "action": ACTIONS, "place": tuple(PLACES)}
SPLITS = ("train", "val", "test", "seen", "unseen")
DRAWS = 80  # uniform numbers a scene is made of
PLACE, OBJECT, SECOND, CLUTTER, BEFORE = range(5)  # what the map `things` tells apart
PIXELS = 2**19  # drawn at once: fewer chunks wait for the interpreter, larger ones leave the cache


class Drawn(NamedTuple):
    """What a renderer gives."""

    images: Tensor  # (B, 3, S, S) uint8
    masks: Tensor  # (B, S, S) uint8, 0 or 1 + i where the i-th part of the object's kind is seen
    things: Tensor  # (B, S, S) uint8, PLACE, OBJECT, SECOND, CLUTTER or BEFORE


class Dice:
    """The chance of B scenes: each call takes the next column of their draws (B, DRAWS)."""

    def __init__(self, draws: Tensor):
        self.columns = iter(draws.unbind(1))

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B,) float64 in [low, high)."""
        return low + (high - low) * next(self.columns)

    def pick(self, n: int) -> Tensor:
        """(B,) int64, each of 0 .. n-1 as likely."""
        return (next(self.columns) * n).long()

    def many(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, n) float64."""
        return torch.stack([self(low, high) for _ in range(n)], dim=1)


def uniforms(split: str, seed: int, indices: Sequence[int]) -> Tensor:
    """(B, DRAWS) float64 numbers in [0, 1): all the chance there is in those scenes."""
    root = (seed, SPLITS.index(split))
    return torch.from_numpy(np.stack([np.random.default_rng((*root, int(i))).random(DRAWS) for i in indices]))


def factors(draws: Tensor, split: str = "train") -> dict[str, Tensor]:
    """The four factors, each (B,) int64, from the first columns of the draws; independent and uniform, but for

    "seen", in which every kind misses one colour and one action, and "unseen", where each scene has the missing colour
    or the missing action of its kind: words in combinations nobody has shown.
    """
    dice = Dice(draws)
    kind, color, action, place = (dice.pick(len(names)) for names in FACTORS.values())
    missing_color, missing_action = (5 * kind) % len(COLORS), (2 * kind) % len(ACTIONS)
    if split == "seen":
        color = (missing_color + 1 + (draws[:, 1] * (len(COLORS) - 1)).long()) % len(COLORS)
        action = (missing_action + 1 + (draws[:, 2] * (len(ACTIONS) - 1)).long()) % len(ACTIONS)
    if split == "unseen":
        by_color = draws[:, 3] * len(PLACES) % 1 < 0.5  # the part of the draw that did not choose the place
        color, action = torch.where(by_color, missing_color, color), torch.where(by_color, action, missing_action)
    return dict(zip(FACTORS, (kind, color, action, place)))


def thing(dice: Dice, truth: dict[str, Tensor], size: Tensor, x: Tensor, y: Tensor) -> Thing:
    """An object of known kind, colour and action, as its action poses it."""
    jumping, tumbling, sleeping = (
        (truth["action"] == ACTIONS.index(a)).double() for a in ("jumping", "tumbling", "sleeping")
    )
    size = size * (1 - 0.12 * jumping)
    return Thing(
        truth["object"], truth["color"], truth["action"], torch.ones_like(truth["object"], dtype=torch.bool),
        x=x, y=y - 0.1 * sleeping * size, scale=size,
        side=torch.where(dice() < 0.5, -1.0, 1.0).double(),
        turn=dice(-0.4, 0.4) + 0.35 * jumping + tumbling * dice(0.6, 1.3),
        lift=(0.38 * jumping + 0.14 * tumbling) * size, width=dice(0.75, 1.25), tint=dice.many(3, -0.06, 0.06),
    )  # fmt: skip


def bits(dice: Dice, n: int, share: float, size: tuple, y: tuple) -> Bits:
    """Up to n small shapes a scene, each there with probability `share`."""
    there = (dice.many(n) < share).double()
    return Bits(dice.many(n, -0.95, 0.95), dice.many(n, *y), there * dice.many(n, *size), dice.many(n),
                torch.stack([dice.many(n, 0.15, 0.85) for _ in range(3)], dim=-1))  # fmt: skip


def render(draws: Tensor, truth: dict[str, Tensor], size: int) -> Drawn:
    """Draw scenes of `size` pixels a side from their draws (B, DRAWS) and factors."""
    dice = Dice(draws[:, len(FACTORS) :])
    at = canvas(len(draws), size)
    image = draw_place(
        at, truth["place"], horizon=dice(-0.35, 0.15), look=dice.many(3).T, haze=dice.many(3, 0.35, 0.85),
        thick=dice(0.15, 0.55),
    )  # fmt: skip
    masks = torch.zeros(len(draws), size, size, dtype=torch.uint8)
    things = torch.zeros_like(masks)
    image, things = draw_bits(image, things, at, bits(dice, 3, 0.4, (0.05, 0.12), (-0.95, 0.1)), CLUTTER)
    tall = dice(0.58, 0.9)  # half its height; the smaller, the more room it has to be anywhere
    main = thing(dice, truth, tall, x=(0.85 - 0.5 * tall) * dice(-1, 1), y=dice(-0.33, 0.66 - 0.6 * tall))
    others = {"object": (truth["object"] + 1 + dice.pick(len(OBJECTS) - 1)) % len(OBJECTS)}  # of another kind
    others |= {"color": dice.pick(len(COLORS)), "action": torch.zeros_like(truth["object"])}
    second = thing(dice, others, dice(0.26, 0.38), x=-dice(0.5, 0.85) * main.x.sign(), y=dice(-0.1, 0.6))
    second = second._replace(there=dice() < 0.25)
    image, seen = draw_thing(image, torch.zeros_like(masks), at, second)
    things = torch.where(seen > 0, SECOND, things)
    image, masks = draw_thing(image, masks, at, main)
    things = torch.where(masks > 0, OBJECT, things)
    before = bits(dice, 2, 0.25, (0.16, 0.3), (-1.1, -0.55))
    image, things = draw_bits(image, things, at, before, BEFORE)
    masks = torch.where(things == OBJECT, masks, 0)
    light = shine(image, angle=dice(0, 2 * np.pi), tilt=dice(0, 0.5), warmth=dice(-0.09, 0.09), gain=dice(0.45, 1.15))
    return Drawn(light, masks, things)


def render_all(draws: Tensor, truth: dict[str, Tensor], size: int) -> Drawn:
    """`render` for many scenes: those alike are drawn together, on every core."""
    order = torch.argsort(truth["object"] * len(PLACES) + truth["place"], stable=True)
    out = Drawn(*(torch.empty(len(draws), *shape, size, size, dtype=torch.uint8) for shape in ((3,), (), ())))

    def draw(rows: Tensor) -> None:
        drawn = render(draws[rows], {name: t[rows] for name, t in truth.items()}, size)
        for whole, part in zip(out, drawn):
            whole[rows] = part

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, order.split(max(1, PIXELS // size**2))))
    return out


class Scenes:
    """The scenes 0 .. n-1 of a split, drawn when first asked for and kept.

    Args:
        split: "train", "val" or "test"; "seen", which misses a colour and an action of every kind, and "unseen", which
            has only those. No scene is in two of them.
        size: pixels a side, 32 to 512 look well.
        n: how many; 10,000 for train and seen, 2,000 otherwise.
        seed: another world of the same kind.

    Attributes:
        images: (n, 3, size, size) uint8.
        labels: (n,) int64, the object's kind, an index into `classes`.
        factors: "object", "color", "action", "place" -> (n,) int64, indices into `FACTORS`.
        masks: (n, size, size) uint8, 0 or 1 + i where the i-th part of the object (`part_names`) is seen.
        things: (n, size, size) uint8, PLACE, OBJECT, SECOND, CLUTTER or BEFORE.
        boxes: (n, 4) int64, left, top, right, bottom of what is seen of the object, the last two not inside.
        captions: for each scene all the ways `words.CAPTIONS` says it.
    """

    classes = OBJECTS

    def __init__(self, split: str, size: int = 64, n: int | None = None, seed: int = 0):
        if split not in SPLITS:
            raise InputError(f"Scenes has no split {split!r}; choose one of {', '.join(SPLITS)}.")
        if size < 16:
            raise InputError(f"Scenes of {size} pixels show nothing; ask for 16 or more.")
        self.split, self.size, self.seed = split, size, seed
        self.n = n if n is not None else 10_000 if split in ("train", "seen") else 2_000
        self.draws = uniforms(split, seed, range(self.n))
        self.factors = factors(self.draws, split)
        self.labels = self.factors["object"]

    def __len__(self) -> int:
        return self.n

    @cached_property
    def _drawn(self) -> Drawn:
        return render_all(self.draws, self.factors, self.size)

    @property
    def images(self) -> Tensor:
        return self._drawn.images

    @property
    def masks(self) -> Tensor:
        return self._drawn.masks

    @property
    def things(self) -> Tensor:
        return self._drawn.things

    @property
    def boxes(self) -> Tensor:
        return boxes(self.masks > 0)

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        known: dict[tuple[int, ...], tuple[str, ...]] = {}  # there are fewer things to say than scenes
        truths = list(zip(*(self.factors[name].tolist() for name in FACTORS)))
        for truth in truths:
            if truth not in known:
                words = {name: FACTORS[name][i] for name, i in zip(FACTORS, truth)}
                known[truth] = tuple(describe(i, **words) for i in range(len(CAPTIONS)))
        return tuple(known[truth] for truth in truths)


def part_names(kind: str) -> tuple[str, ...]:
    """The names of a kind's parts, in the order of their numbers in `masks`: part i has number 1 + i."""
    return tuple(part.name for part in KINDS[kind])


def boxes(masks: Tensor) -> Tensor:
    """Left, top, right and bottom (N, 4) of bool masks (N, H, W); right and bottom are not inside, none is all 0."""
    found = []
    for axis in (1, 2):
        line = masks.any(dim=axis)  # (N, W), then (N, H)
        first, last = line.int().argmax(-1), line.shape[-1] - line.flip(-1).int().argmax(-1)
        found.append((first * line.any(-1), last * line.any(-1)))
    (left, right), (top, bottom) = found
    return torch.stack([left, top, right, bottom], dim=-1)
