"""Scenes: an endless world drawn from (seed, index), with the truth of everything in it.

A scene is an object of some kind and colour, doing something somewhere: "a red fish jumping over a snowy field". Light,
size, position, tilt and the look of the place vary freely and carry no label. Because we draw it, we know the four
factors, the captions and which pixel is what, so every claim of the course can be measured without a network.

Shapes: B scenes drawn at once; images (B, 3, S, S) uint8; masks (B, S, S) uint8.
The same (split, seed, index) gives the same bytes everywhere: all arithmetic is elementwise in float64.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minissl.data.places import PLACES, paint, rgb
from minissl.data.shapes import KINDS, Part
from minissl.errors import InputError

OBJECTS = tuple(KINDS)
COLORS = {
    "red": (0.88, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.12),
    "yellow": (0.96, 0.84, 0.2),
    "green": (0.25, 0.66, 0.28),
    "blue": (0.2, 0.4, 0.88),
    "purple": (0.55, 0.28, 0.75),
    "pink": (0.97, 0.58, 0.74),
    "brown": (0.5, 0.32, 0.2),
}
ACTIONS = ("resting", "jumping", "tumbling", "racing", "sleeping")
FACTORS = ("object", "color", "action", "place")
SPLITS = ("train", "val", "test")
DRAWS = 32  # uniform numbers a scene is made of; the columns are named in `World`

Canvas = tuple[Tensor, Tensor]  # x to the right and y up, both (B, S, S) in [-1, 1]

CAPTIONS = (
    "a {color} {object} {doing} {where}",
    "{where}, a {color} {object} is {doing}",
    "a picture of a {color} {object} that is {doing} {where}",
    "the {object} {doing} {where} is {color}",
    "one {object}, {color}, {doing} {where}",
    "{doing} {where}: a {color} {object}",
)
_WHERE = dict(zip(PLACES, ("in a snowy field", "on a beach", "in a desert", "in a forest", "in a city",
                           "in the sea", "on the moon", "in a meadow")))  # fmt: skip


def uniforms(split: str, seed: int, indices: Sequence[int]) -> Tensor:
    """(B, DRAWS) float64 numbers in [0, 1): all the chance there is in those scenes."""
    if split not in SPLITS:
        raise InputError(f"Scenes has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    root = (seed, SPLITS.index(split))
    return torch.from_numpy(np.stack([np.random.default_rng((*root, int(i))).random(DRAWS) for i in indices]))


def factors(u: Tensor) -> dict[str, Tensor]:
    """The four factors of scenes with draws `u` (B, DRAWS), each (B,) int64, independent and uniform."""
    sizes = (len(OBJECTS), len(COLORS), len(ACTIONS), len(PLACES))
    return {name: (u[:, i] * n).long() for i, (name, n) in enumerate(zip(FACTORS, sizes))}


def render(u: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    Args:
        u: draws (B, DRAWS) from `uniforms`.
        size: pixels a side.

    Returns:
        images (B, 3, size, size) uint8 and masks (B, size, size) uint8: 0 is the place, 1 + i the i-th part of the
        kind in `KINDS`, so that `mask > 0` is the object.
    """
    truth = factors(u)
    line = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    x, y = (t.expand(len(u), size, size) for t in torch.meshgrid(line, -line, indexing="xy"))
    horizon = _column(u, 4) * 0.5 - 0.35
    image = torch.empty(len(u), 3, size, size, dtype=torch.float64)
    mask = torch.zeros(len(u), size, size, dtype=torch.uint8)
    for i, place in enumerate(PLACES.values()):
        rows = (truth["place"] == i).nonzero()[:, 0]
        if len(rows):
            own = torch.stack([_column(u[rows], c) for c in (5, 6, 7)])
            image[rows] = place(x[rows], y[rows], horizon[rows], own)
    haze = torch.stack([_spread(u, c, 0.35, 0.85) for c in (23, 24, 25)], 1)  # a veil of any colour over the place,
    image = torch.lerp(image, haze, _spread(u, 26, 0.35, 0.65)[:, None])  # so that it is not known by its colour alone
    for i, parts in enumerate(KINDS.values()):
        rows = (truth["object"] == i).nonzero()[:, 0]
        if len(rows):
            draws = {name: value[rows] for name, value in truth.items()}
            image[rows], mask[rows] = _draw_object(image[rows], (x[rows], y[rows]), u[rows], draws, parts)
    return _light(image, x, y, u), mask


def _column(u: Tensor, i: int) -> Tensor:
    return u[:, i].view(-1, 1, 1)


def _spread(u: Tensor, i: int, low: float, high: float) -> Tensor:
    return low + (high - low) * _column(u, i)


def _pose(canvas: Canvas, u: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The canvas seen from the object: its own x, y, the size of its unit on the canvas, and where it stands."""
    is_ = {name: (action == i).view(-1, 1, 1).double() for i, name in enumerate(ACTIONS)}
    scale = _spread(u, 8, 0.66, 0.92) * (1 - 0.12 * is_["jumping"])
    center_x = _spread(u, 9, -0.16, 0.16)
    center_y = _spread(u, 10, -0.12, 0.02) + 0.2 * is_["jumping"] + 0.1 * is_["tumbling"] - 0.1 * is_["sleeping"]
    side = torch.where(_column(u, 11) < 0.5, -1.0, 1.0).double()
    turn = _spread(u, 12, -0.12, 0.12) + 0.3 * is_["jumping"] + is_["tumbling"] * (0.6 + 0.7 * _column(u, 13))
    x, y = (canvas[0] - center_x) / scale * side, (canvas[1] - center_y) / scale
    c, s = torch.cos(turn), torch.sin(turn)
    x, y = c * x + s * y, c * y - s * x
    x = (x - 0.35 * is_["racing"] * y) / _spread(u, 14, 0.9, 1.12) / (1 + 0.12 * is_["sleeping"])
    y = (y + 0.3 * is_["sleeping"]) / (1 - 0.35 * is_["sleeping"]) / (1 + 0.12 * is_["jumping"])
    return x, y, scale, {"x": center_x, "y": center_y, "side": side, **is_}


def _draw_object(image: Tensor, canvas: Canvas, u: Tensor, truth: dict, parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Shadow, traces of the action, then the parts from back to front."""
    x, y, scale, at = _pose(canvas, u, truth["action"])
    pixels = scale * image.shape[-1] / 2  # a unit of the object, in pixels
    image = _traces(image, canvas, scale, at)
    main = torch.tensor(list(COLORS.values()), dtype=torch.float64)[truth["color"]].view(-1, 3, 1, 1)
    main = (main + torch.stack([_spread(u, c, -0.06, 0.06) for c in (15, 16, 17)], 1)).clamp(0, 1)
    paints = {"main": main, "dark": 0.68 * main, "light": 0.5 + 0.5 * main}
    mask = torch.zeros_like(x, dtype=torch.uint8)
    shade = (0.95 + 0.16 * y).clamp(0.75, 1.1)  # light from above
    for i, part in enumerate(parts):
        distance = part.distance(x, y) * pixels
        cover = (0.5 - distance).clamp(0, 1)
        ink = 1 - 0.55 * (1 + (distance + 0.02 * pixels) / 1.2).clamp(0, 1)  # a dark line along the edge
        color = paints[part.paint] if isinstance(part.paint, str) else rgb(*part.paint)
        image = paint(image, cover, color * (shade * ink * part.texture(x, y))[:, None])
        mask = torch.where(cover > 0.5, i + 1, mask)
    return image, mask


def _traces(image: Tensor, canvas: Canvas, scale: Tensor, at: dict[str, Tensor]) -> Tensor:
    """What shows the action besides the pose: a shadow left below, streaks behind, a turning arc, sleepy bubbles."""
    x, y = (canvas[0] - at["x"]) / scale, (canvas[1] - at["y"]) / scale
    floor = -0.95 - 0.75 * at["jumping"] - 0.3 * at["tumbling"] + 0.2 * at["sleeping"]
    shadow = 1 - (x / 0.9) ** 2 - ((y - floor) / 0.16) ** 2
    image = paint(image, 0.35 * (4 * shadow).clamp(0, 1), rgb(0.05, 0.05, 0.1))
    behind = -x * at["side"]
    streaks = at["racing"] * (torch.cos(10 * y) > 0.8) * (behind > 0.9) * (behind < 1.9) * (y.abs() < 0.8)
    image = paint(image, 0.75 * streaks, rgb(1.0, 1.0, 1.0))
    radius = torch.sqrt(x * x + y * y)
    arcs = at["tumbling"] * ((radius - 1.2).abs() < 0.05) * (torch.sin(2 * torch.atan2(y, x)) > 0.3)
    image = paint(image, 0.75 * arcs, rgb(1.0, 1.0, 1.0))
    front, over = x * at["side"], y - 0.35
    bubbles = sum((((front - 0.8 - d) ** 2 + (over - 1.4 * d) ** 2) < (0.06 + 0.25 * d) ** 2) for d in (0.0, 0.2, 0.5))
    return paint(image, 0.85 * at["sleeping"] * bubbles.clamp(0, 1), rgb(0.97, 0.98, 1.0))


def _light(image: Tensor, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """The hour of the day, as uint8: brightness, warmth, and which side the light comes from."""
    angle = 2 * np.pi * _column(u, 18)
    slope = 1 + 0.18 * _column(u, 19) * (torch.cos(angle) * x + torch.sin(angle) * y)
    warmth = _spread(u, 20, -0.09, 0.09)
    tint = torch.cat([1 + warmth, torch.ones_like(warmth), 1 - warmth], 1)[..., None]  # (B, 3, 1, 1)
    gain = _spread(u, 21, 0.72, 1.08)
    return (image * (slope * gain)[:, None] * tint * 255).round().clamp(0, 255).to(torch.uint8)


class Scenes:
    """The scenes 0 .. n-1 of a split, drawn when first asked for and kept.

    Args:
        split: "train", "val" or "test"; no scene is in two of them.
        size: pixels a side.
        n: how many; 10,000 for train, 2,000 otherwise.
        seed: another world of the same kind.

    Attributes:
        images: (n, 3, size, size) uint8.
        labels: (n,) int64, the object's kind, an index into `classes`.
        factors: "object", "color", "action", "place" -> (n,) int64.
        masks: (n, size, size) uint8, 0 the place, 1 + i the i-th part of the object.
        captions: n strings, one of the paraphrases in `CAPTIONS` each.
    """

    classes = OBJECTS

    def __init__(self, split: str, size: int = 64, n: int | None = None, seed: int = 0):
        if size < 16:
            raise InputError(f"Scenes of {size} pixels show nothing; ask for 16 or more.")
        self.split, self.size, self.seed = split, size, seed
        self.n = n if n is not None else 10_000 if split == "train" else 2_000
        self.draws = uniforms(split, seed, range(self.n))
        self.factors = factors(self.draws)
        self.labels = self.factors["object"]

    def __len__(self) -> int:
        return self.n

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        images, masks = zip(*(render(u, self.size) for u in self.draws.split(64)))
        return torch.cat(images), torch.cat(masks)

    @property
    def images(self) -> Tensor:
        return self._drawn[0]

    @property
    def masks(self) -> Tensor:
        return self._drawn[1]

    @property
    def captions(self) -> list[str]:
        return [self.describe(i, int(self.draws[i, 22] * len(CAPTIONS))) for i in range(self.n)]

    def describe(self, index: int, paraphrase: int = 0) -> str:
        """One of the ways to say what scene `index` shows."""
        of = {name: int(self.factors[name][index]) for name in FACTORS}
        where = _WHERE[list(PLACES)[of["place"]]]
        words = {"object": OBJECTS[of["object"]], "color": list(COLORS)[of["color"]], "doing": ACTIONS[of["action"]]}
        return CAPTIONS[paraphrase].format(where=where, **words)
