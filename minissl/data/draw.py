"""Drawing a scene: its place, its clutter, its things in their poses, what stands before them, and the light.

Everything is a function of the plane, elementwise in float64 and drawn for a batch at once, so the same scene gives the
same bytes at any batch size, on any number of threads, on any machine.

Shapes: B scenes; a canvas is x to the right and y up, both (B, S, S), [-1, 1] at rest; numbers of a scene are (B,) and
become (B, 1, 1) here; images (B, 3, S, S) from 0 to 1; maps (B, S, S) uint8.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minissl.data.places import PLACES, paint, rgb
from minissl.data.shapes import KINDS

ACTIONS = ("resting", "jumping", "tumbling", "racing", "sleeping")
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

Canvas = tuple[Tensor, Tensor]


class Thing(NamedTuple):
    """One object in each of B scenes (or of B frames); every field (B,) float64 unless said otherwise."""

    kind: Tensor  # int64 index into KINDS
    color: Tensor  # int64 index into COLORS
    action: Tensor  # int64 index into ACTIONS
    there: Tensor  # bool, False where a scene has no such object
    x: Tensor
    y: Tensor  # where it stands
    scale: Tensor  # half its height on the canvas
    side: Tensor  # 1 looks right, -1 left
    turn: Tensor  # radians
    lift: Tensor  # how high above the ground it is
    width: Tensor  # how stout it is
    tint: Tensor  # (B, 3) added to its colour


class Bits(NamedTuple):
    """M small shapes strewn over each of B scenes; every field (B, M)."""

    x: Tensor
    y: Tensor
    size: Tensor  # 0 where there is none
    corner: Tensor  # 0 a diamond, 1 a ball
    color: Tensor  # (B, M, 3)


def canvas(n: int, size: int, zoom: Tensor | float = 1.0, x: Tensor | float = 0.0, y: Tensor | float = 0.0) -> Canvas:
    """What n cameras of size x size pixels see: the square around (x, y) of half-width `zoom`, numbers or (n,)."""
    line = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    across, up = (t.expand(n, size, size) for t in torch.meshgrid(line, -line, indexing="xy"))
    zoom, x, y = (torch.as_tensor(t, dtype=torch.float64).expand(n).view(-1, 1, 1) for t in (zoom, x, y))
    return across * zoom + x, up * zoom + y


def resolution(at: Canvas) -> Tensor:
    """Pixels per unit of a canvas, (B, 1, 1)."""
    return 1 / (at[0][:, :1, 1:2] - at[0][:, :1, :1])


def wide(number: Tensor) -> Tensor:
    """(B,) to (B, 1, 1)."""
    return number.view(-1, 1, 1)


def draw_place(at: Canvas, place: Tensor, horizon: Tensor, look: Tensor, haze: Tensor, thick: Tensor) -> Tensor:
    """Backgrounds (B, 3, S, S).

    Args:
        at: the canvas.
        place: (B,) int64 index into PLACES.
        horizon: (B,) its height.
        look: (3, B) in [0, 1], what moves waves, trunks and towers about.
        haze, thick: a veil's colour (B, 3) and its share (B,); the place is not known by its colour alone.
    """
    x, y = at
    image = x.new_empty(len(x), 3, *x.shape[1:])
    for i in place.unique().tolist():
        rows = (place == i).nonzero()[:, 0]
        draw = list(PLACES.values())[i]
        image[rows] = draw(x[rows], y[rows], wide(horizon[rows]), look[:, rows].reshape(3, -1, 1, 1))
    return torch.lerp(image, haze[..., None, None], wide(thick)[:, None])


def draw_bits(image: Tensor, things: Tensor, at: Canvas, bits: Bits, code: int) -> tuple[Tensor, Tensor]:
    """Strew small shapes; `things` (B, S, S) becomes `code` where they are."""
    for m in range(bits.x.shape[1]):
        rows = (bits.size[:, m] > 0).nonzero()[:, 0]
        if not len(rows):
            continue
        x, y, size, corner = (wide(t[rows, m]) for t in (bits.x, bits.y, bits.size, bits.corner))
        dx, dy = ((at[0][rows] - x) / size).abs(), ((at[1][rows] - y) / size).abs()
        distance = torch.lerp(dx + dy, torch.sqrt(dx * dx + dy * dy), corner) - 1
        cover = (0.5 - distance * size * resolution((at[0][rows], at[1][rows]))).clamp(0, 1)
        shade = (1 + 0.15 * (at[1][rows] - y) / size).clamp(0.7, 1.15) * (1 - 0.4 * (distance > -0.2))
        image[rows] = paint(image[rows], cover, bits.color[rows, m][..., None, None] * shade[:, None])
        things[rows] = torch.where(cover > 0.5, code, things[rows])
    return image, things


def draw_thing(image: Tensor, parts: Tensor, at: Canvas, thing: Thing) -> tuple[Tensor, Tensor]:
    """Draw an object over images: its shadow, traces of its action, its parts from back to front.

    Args:
        image: (B, 3, S, S), changed in place.
        parts: (B, S, S) uint8, changed in place: 1 + i where the i-th part of the kind is.
    """
    for kind in thing.kind[thing.there].unique().tolist():
        rows = (thing.there & (thing.kind == kind)).nonzero()[:, 0]
        one, here = Thing(*(t[rows] for t in thing)), (at[0][rows], at[1][rows])
        pixels = wide(one.scale) * resolution(here)
        drawn, seen = _traces(image[rows], here, one), parts[rows]
        _draw_parts(drawn, seen, _pose(here, one), pixels, one, kind)
        image[rows], parts[rows] = drawn, seen
    return image, parts


def _doing(thing: Thing, action: str) -> Tensor:
    return wide((thing.action == ACTIONS.index(action)).double())


def _pose(at: Canvas, thing: Thing) -> Canvas:
    """The canvas seen from the object: x to its front, y up, the object within [-1, 1]."""
    jumping, racing, sleeping = (_doing(thing, action) for action in ("jumping", "racing", "sleeping"))
    x = (at[0] - wide(thing.x)) / wide(thing.scale) * wide(thing.side)
    y = (at[1] - wide(thing.y + thing.lift)) / wide(thing.scale)
    c, s = torch.cos(wide(thing.turn)), torch.sin(wide(thing.turn))
    x, y = c * x + s * y, c * y - s * x
    x = (x - 0.45 * racing * y) / wide(thing.width) / (1 + 0.12 * sleeping)
    return x, (y + 0.32 * sleeping) / (1 - 0.4 * sleeping) / (1 + 0.12 * jumping)


def _draw_parts(image: Tensor, parts: Tensor, at: Canvas, pixels: Tensor, thing: Thing, kind: int) -> None:
    """Both in place, and only at the P pixels near the object: most of a picture is not."""
    main = (torch.tensor(list(COLORS.values()), dtype=torch.float64)[thing.color] + thing.tint).clamp(0, 1)  # (B, 3)
    paints = {"main": main, "dark": 0.68 * main, "light": 0.5 + 0.5 * main}
    near = (at[0].abs() < 1.15) & (at[1].abs() < 1.15)  # a kind lies within [-1, 1]; its soft edge a little beyond
    where = near.flatten().nonzero()[:, 0]  # (P,)
    scene = where // near[0].numel()
    x, y, pixels = at[0].flatten()[where], at[1].flatten()[where], pixels.flatten()[scene]
    whole = image.movedim(1, -1).flatten(0, 2)  # (B * S * S, 3)
    colors, seen = whole[where], parts.view(-1)[where]  # (P, 3), (P,)
    for i, part in enumerate(list(KINDS.values())[kind]):
        distance = part.distance(x, y) * pixels
        on = (distance < 0.5).nonzero()[:, 0]
        distance, u, v = distance[on], x[on], y[on]
        cover = (0.5 - distance).clamp(0, 1)
        shade = (0.95 + 0.16 * v).clamp(0.75, 1.1)  # light from above
        ink = 1 - 0.55 * (1 + (distance + 0.02 * pixels[on]) / 1.2).clamp(0, 1)  # a dark line along the edge
        color = paints[part.paint][scene[on]] if isinstance(part.paint, str) else rgb(*part.paint).view(1, 3)
        color = color * (shade * ink * part.texture(u, v))[:, None]
        colors[on] = torch.lerp(colors[on], color, cover[:, None])
        seen[on] = torch.where(cover > 0.5, i + 1, seen[on])
    image.copy_(whole.index_copy(0, where, colors).view(*near.shape, 3).movedim(-1, 1))
    parts.view(-1).index_copy_(0, where, seen)


def _traces(image: Tensor, at: Canvas, thing: Thing) -> Tensor:
    """What shows the action besides the pose: a shadow below; streaks behind, a turning arc, or sleepy bubbles."""
    x, y = (at[0] - wide(thing.x)) / wide(thing.scale), (at[1] - wide(thing.y + thing.lift)) / wide(thing.scale)
    floor = -0.95 - wide(thing.lift / thing.scale) - 0.15 * _doing(thing, "tumbling") + 0.2 * _doing(thing, "sleeping")
    shadow = 1 - (x / 0.9) ** 2 - ((y - floor) / 0.16) ** 2
    image = paint(image, 0.35 * (4 * shadow).clamp(0, 1), rgb(0.05, 0.05, 0.1))
    for action, trace in _TRACES.items():
        rows = (thing.action == ACTIONS.index(action)).nonzero()[:, 0]
        if len(rows):
            cover = trace(x[rows] * wide(thing.side[rows]), x[rows], y[rows])
            image[rows] = paint(image[rows], 0.8 * cover.double(), rgb(0.98, 0.99, 1.0))
    return image


def _streaks(front: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (torch.cos(10 * y) > 0.8) & (front < -0.9) & (front > -1.9) & (y.abs() < 0.8)


def _arcs(front: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A ring round the object, where x and y have the same sign."""
    squared = x * x + y * y
    return (squared > 1.15**2) & (squared < 1.25**2) & (x * y > 0.15 * squared)


def _bubbles(front: Tensor, x: Tensor, y: Tensor) -> Tensor:
    inside = [(front - 0.8 - d) ** 2 + (y - 0.35 - 1.4 * d) ** 2 < (0.06 + 0.25 * d) ** 2 for d in (0.0, 0.2, 0.5)]
    return inside[0] | inside[1] | inside[2]


_TRACES = {"racing": _streaks, "tumbling": _arcs, "sleeping": _bubbles}


def shine(image: Tensor, angle: Tensor, tilt: Tensor, warmth: Tensor, gain: Tensor) -> Tensor:
    """The hour of the day: which side the light comes from, warmth and brightness, each (B,). Returns uint8."""
    x, y = canvas(len(image), image.shape[-1])
    slope = 1 + wide(tilt) * (torch.cos(wide(angle)) * x + torch.sin(wide(angle)) * y)
    tint = torch.stack([1 + warmth, torch.ones_like(warmth), 1 - warmth], 1)[..., None, None]  # (B, 3, 1, 1)
    return (image * (slope * wide(gain))[:, None] * tint * 255).round().clamp(0, 255).to(torch.uint8)
