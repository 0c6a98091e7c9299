"""Render scenes: background, clutter, objects in their poses, occluders and lighting.

Every operation is elementwise in float64 for a batch of scenes, so a scene has the same bytes at any batch size, on any
number of threads, on any machine.

Shapes: B scenes. A canvas is x to the right and y up, both (B, S, S), in [-1, 1] for a camera at rest. Numbers per
scene are (B,). Images are (B, 3, S, S) in [0, 1], maps (B, S, S) uint8.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minissl.data.synthetic.backgrounds import BACKGROUNDS, paint, rgb
from minissl.data.synthetic.shapes import OBJECT_PARTS

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


class SceneObject(NamedTuple):
    """One object in each of B scenes, or of B frames; every field is (B,) float64 unless stated otherwise."""

    object_class: Tensor  # int64 index into OBJECT_PARTS
    color: Tensor  # int64 index into COLORS
    action: Tensor  # int64 index into ACTIONS
    present: Tensor  # bool, False where a scene has no such object
    x: Tensor
    y: Tensor  # position on the ground
    scale: Tensor  # half its height on the canvas
    direction: Tensor  # 1 faces right, -1 left
    angle: Tensor  # radians
    elevation: Tensor  # height above the ground
    width: Tensor  # factor on its width
    tint: Tensor  # (B, 3) added to its color


class Clutter(NamedTuple):
    """M small shapes scattered over each of B scenes; every field is (B, M)."""

    x: Tensor
    y: Tensor
    size: Tensor  # 0 where there is none
    roundness: Tensor  # 0 is a diamond, 1 a ball
    color: Tensor  # (B, M, 3)


def canvas(n: int, size: int, zoom: Tensor | float = 1.0, x: Tensor | float = 0.0, y: Tensor | float = 0.0) -> Canvas:
    """Return the coordinates seen by n cameras of size x size pixels.

    Args:
        n: B.
        size: S.
        zoom: half the width of the visible square, a number or (n,).
        x: horizontal center of the square, a number or (n,).
        y: vertical center of the square, a number or (n,).
    """
    line = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    across, up = (t.expand(n, size, size) for t in torch.meshgrid(line, -line, indexing="xy"))
    zoom, x, y = (torch.as_tensor(t, dtype=torch.float64).expand(n).view(-1, 1, 1) for t in (zoom, x, y))
    return across * zoom + x, up * zoom + y


def resolution(at: Canvas) -> Tensor:
    """Return the pixels per unit of a canvas, (B, 1, 1)."""
    return 1 / (at[0][:, :1, 1:2] - at[0][:, :1, :1])


def per_scene(values: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1), so that it broadcasts over pixels."""
    return values.view(-1, 1, 1)


def draw_background(
    at: Canvas, place: Tensor, horizon: Tensor, variation: Tensor, haze: Tensor, haze_fraction: Tensor
) -> Tensor:
    """Draw backgrounds (B, 3, S, S).

    Args:
        at: the canvas.
        place: (B,) int64 index into BACKGROUNDS.
        horizon: (B,) height of the horizon.
        variation: (3, B) in [0, 1), shifts waves, trunks and towers.
        haze: (B, 3) color of a haze over the background; without it, color alone would identify the place.
        haze_fraction: (B,) opacity of the haze.
    """
    x, y = at
    image = x.new_empty(len(x), 3, *x.shape[1:])
    for i in place.unique().tolist():
        indices = (place == i).nonzero()[:, 0]
        draw = list(BACKGROUNDS.values())[i]
        image[indices] = draw(
            x[indices], y[indices], per_scene(horizon[indices]), variation[:, indices].reshape(3, -1, 1, 1)
        )
    return torch.lerp(image, haze[..., None, None], per_scene(haze_fraction)[:, None])


def draw_clutter(image: Tensor, regions: Tensor, at: Canvas, clutter: Clutter, code: int) -> tuple[Tensor, Tensor]:
    """Draw small shapes over images, and set `regions` (B, S, S) to `code` where they are; both change in place."""
    for m in range(clutter.x.shape[1]):
        indices = (clutter.size[:, m] > 0).nonzero()[:, 0]
        if not len(indices):
            continue
        fields = (clutter.x, clutter.y, clutter.size, clutter.roundness)
        x, y, size, roundness = (per_scene(t[indices, m]) for t in fields)
        dx, dy = ((at[0][indices] - x) / size).abs(), ((at[1][indices] - y) / size).abs()
        distance = torch.lerp(dx + dy, torch.sqrt(dx * dx + dy * dy), roundness) - 1
        cover = (0.5 - distance * size * resolution((at[0][indices], at[1][indices]))).clamp(0, 1)
        shade = (1 + 0.15 * (at[1][indices] - y) / size).clamp(0.7, 1.15) * (1 - 0.4 * (distance > -0.2))
        image[indices] = paint(image[indices], cover, clutter.color[indices, m][..., None, None] * shade[:, None])
        regions[indices] = torch.where(cover > 0.5, code, regions[indices])
    return image, regions


def draw_object(image: Tensor, parts: Tensor, at: Canvas, obj: SceneObject) -> tuple[Tensor, Tensor]:
    """Draw an object over images: its shadow, cues of its action, its parts from back to front.

    Args:
        image: (B, 3, S, S), changed in place.
        parts: (B, S, S) uint8, changed in place: 1 + i where the i-th part of the object is visible.
        at: the canvas.
        obj: the object.
    """
    for object_class in obj.object_class[obj.present].unique().tolist():
        indices = (obj.present & (obj.object_class == object_class)).nonzero()[:, 0]
        selected, local = SceneObject(*(t[indices] for t in obj)), (at[0][indices], at[1][indices])
        pixels = per_scene(selected.scale) * resolution(local)
        new_image, new_parts = _draw_action_cues(image[indices], local, selected), parts[indices]
        _draw_parts(new_image, new_parts, _to_object_frame(local, selected), pixels, selected, object_class)
        image[indices], parts[indices] = new_image, new_parts
    return image, parts


def _has_action(obj: SceneObject, action: str) -> Tensor:
    """Return 1 where the object does `action`, else 0, (B, 1, 1) float64."""
    return per_scene((obj.action == ACTIONS.index(action)).double())


def _to_object_frame(at: Canvas, obj: SceneObject) -> Canvas:
    """Transform a canvas to the object's frame: x to its front, y up, the object within [-1, 1]."""
    jumping, racing, sleeping = (_has_action(obj, action) for action in ("jumping", "racing", "sleeping"))
    x = (at[0] - per_scene(obj.x)) / per_scene(obj.scale) * per_scene(obj.direction)
    y = (at[1] - per_scene(obj.y + obj.elevation)) / per_scene(obj.scale)
    c, s = torch.cos(per_scene(obj.angle)), torch.sin(per_scene(obj.angle))
    x, y = c * x + s * y, c * y - s * x
    x = (x - 0.45 * racing * y) / per_scene(obj.width) / (1 + 0.12 * sleeping)
    return x, (y + 0.32 * sleeping) / (1 - 0.4 * sleeping) / (1 + 0.12 * jumping)


def _draw_parts(image: Tensor, parts: Tensor, at: Canvas, pixels: Tensor, obj: SceneObject, object_class: int) -> None:
    """Draw the parts into `image` and `parts`, in place, at the P pixels near the object only."""
    main = (torch.tensor(list(COLORS.values()), dtype=torch.float64)[obj.color] + obj.tint).clamp(0, 1)  # (B, 3)
    paints = {"main": main, "dark": 0.68 * main, "light": 0.5 + 0.5 * main}
    near = (at[0].abs() < 1.15) & (at[1].abs() < 1.15)  # an object lies within [-1, 1], its soft edge slightly outside
    where = near.flatten().nonzero()[:, 0]  # (P,)
    scene = where // near[0].numel()
    x, y, pixels = at[0].flatten()[where], at[1].flatten()[where], pixels.flatten()[scene]
    flat_image = image.movedim(1, -1).flatten(0, 2)  # (B * S * S, 3)
    colors, visible_part = flat_image[where], parts.view(-1)[where]  # (P, 3), (P,)
    for i, part in enumerate(list(OBJECT_PARTS.values())[object_class]):
        distance = part.distance(x, y) * pixels
        on = (distance < 0.5).nonzero()[:, 0]
        distance, u, v = distance[on], x[on], y[on]
        cover = (0.5 - distance).clamp(0, 1)
        shade = (0.95 + 0.16 * v).clamp(0.75, 1.1)  # light from above
        outline = 1 - 0.55 * (1 + (distance + 0.02 * pixels[on]) / 1.2).clamp(0, 1)  # a dark line along the edge
        color = paints[part.paint][scene[on]] if isinstance(part.paint, str) else rgb(*part.paint).view(1, 3)
        color = color * (shade * outline * part.texture(u, v))[:, None]
        colors[on] = torch.lerp(colors[on], color, cover[:, None])
        visible_part[on] = torch.where(cover > 0.5, i + 1, visible_part[on])
    image.copy_(flat_image.index_copy(0, where, colors).view(*near.shape, 3).movedim(-1, 1))
    parts.view(-1).index_copy_(0, where, visible_part)


def _draw_action_cues(image: Tensor, at: Canvas, obj: SceneObject) -> Tensor:
    """Draw what shows the action besides the pose: a shadow; speed lines, arcs of rotation, or bubbles of sleep."""
    x = (at[0] - per_scene(obj.x)) / per_scene(obj.scale)
    y = (at[1] - per_scene(obj.y + obj.elevation)) / per_scene(obj.scale)
    floor = -0.95 - per_scene(obj.elevation / obj.scale)
    floor = floor - 0.15 * _has_action(obj, "tumbling") + 0.2 * _has_action(obj, "sleeping")
    shadow = 1 - (x / 0.9) ** 2 - ((y - floor) / 0.16) ** 2
    image = paint(image, 0.35 * (4 * shadow).clamp(0, 1), rgb(0.05, 0.05, 0.1))
    for action, cue in _ACTION_CUES.items():
        indices = (obj.action == ACTIONS.index(action)).nonzero()[:, 0]
        if len(indices):
            cover = cue(x[indices] * per_scene(obj.direction[indices]), x[indices], y[indices])
            image[indices] = paint(image[indices], 0.8 * cover.double(), rgb(0.98, 0.99, 1.0))
    return image


def _speed_lines(front: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (torch.cos(10 * y) > 0.8) & (front < -0.9) & (front > -1.9) & (y.abs() < 0.8)


def _rotation_arcs(front: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return a ring around the object where x and y have the same sign."""
    squared = x * x + y * y
    return (squared > 1.15**2) & (squared < 1.25**2) & (x * y > 0.15 * squared)


def _sleep_bubbles(front: Tensor, x: Tensor, y: Tensor) -> Tensor:
    inside = [(front - 0.8 - d) ** 2 + (y - 0.35 - 1.4 * d) ** 2 < (0.06 + 0.25 * d) ** 2 for d in (0.0, 0.2, 0.5)]
    return inside[0] | inside[1] | inside[2]


_ACTION_CUES = {"racing": _speed_lines, "tumbling": _rotation_arcs, "sleeping": _sleep_bubbles}


def apply_lighting(image: Tensor, angle: Tensor, tilt: Tensor, warmth: Tensor, gain: Tensor) -> Tensor:
    """Apply light, and convert images in [0, 1] to uint8.

    Args:
        image: (B, 3, S, S) float64.
        angle: (B,) direction from which the light comes, radians.
        tilt: (B,) strength of the brightness gradient in that direction.
        warmth: (B,) added to the factor on red, and subtracted from that on blue.
        gain: (B,) factor on the brightness.
    """
    x, y = canvas(len(image), image.shape[-1])
    slope = 1 + per_scene(tilt) * (torch.cos(per_scene(angle)) * x + torch.sin(per_scene(angle)) * y)
    tint = torch.stack([1 + warmth, torch.ones_like(warmth), 1 - warmth], 1)[..., None, None]  # (B, 3, 1, 1)
    return (image * (slope * per_scene(gain))[:, None] * tint * 255).round().clamp(0, 255).to(torch.uint8)
