"""The objects of scenes, drawn with signed distance functions.

Every part of an object is a signed distance: negative inside, positive outside, in units of the object's size. It can
be drawn at any resolution with soft edges and an outline, for a whole batch at once. `OBJECT_PARTS` lists each object's
parts from back to front. Method: Quilez, 2D distance functions (https://iquilezles.org/articles/distfunctions2d).

Shapes: x, y are float64 of one common shape, in the object's frame: x to its front, y up, the object within [-1, 1].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # x, y -> the same shape


def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> Distance:
    """Return an ellipse; its distance is exact on the outline, and to first order near it."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - cx, y - cy
        u, v = (c * x + s * y) / rx, (c * y - s * x) / ry
        size = torch.sqrt(u * u + v * v)
        slope = torch.sqrt((u / rx) ** 2 + (v / ry) ** 2)
        return size * (size - 1) / slope.clamp_min(1e-9)

    return distance


def box(cx: float, cy: float, half_x: float, half_y: float, corner: float = 0.05) -> Distance:
    """Return an upright rectangle with rounded corners."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        dx, dy = (x - cx).abs() - (half_x - corner), (y - cy).abs() - (half_y - corner)
        outside = torch.sqrt(dx.clamp_min(0) ** 2 + dy.clamp_min(0) ** 2)
        return outside + torch.maximum(dx, dy).clamp_max(0) - corner

    return distance


def line(x0: float, y0: float, x1: float, y1: float, radius: float) -> Distance:
    """Return a line segment with round ends."""
    dx, dy = x1 - x0, y1 - y0

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - x0, y - y0
        along = ((x * dx + y * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        return torch.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2) - radius

    return distance


def polygon(*corners: tuple[float, float]) -> Distance:
    """Return a convex polygon with counterclockwise corners: its inside is left of every edge."""
    edges = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        length = math.hypot(x1 - x0, y1 - y0)
        nx, ny = (y1 - y0) / length, (x0 - x1) / length  # points outwards
        edges.append((nx, ny, nx * x0 + ny * y0))

    def distance(x: Tensor, y: Tensor) -> Tensor:
        nx, ny, offset = edges[0]
        largest = x * nx + y * ny - offset
        for nx, ny, offset in edges[1:]:
            largest = torch.maximum(largest, x * nx + y * ny - offset)
        return largest

    return distance


def above(shape: Distance, floor: float) -> Distance:
    """Return the part of a shape that is higher than `floor`."""
    return lambda x, y: torch.maximum(shape(x, y), floor - y)


# Textures return a factor on the color, between 0.1 and 1.4.


def stripes(x: Tensor, y: Tensor) -> Tensor:
    return 0.7 + 0.56 * torch.sin(13 * x).clamp(-0.6, 0.6) / 0.6


def bands(x: Tensor, y: Tensor) -> Tensor:
    return 0.7 + 0.56 * torch.sin(13 * y).clamp(-0.5, 0.5) / 0.5


def scales(x: Tensor, y: Tensor) -> Tensor:
    return 0.8 + 0.6 * torch.sin(9 * x + 6 * y) * torch.sin(9 * x - 6 * y + 2)


def spots(x: Tensor, y: Tensor) -> Tensor:
    return 0.2 + 1.6 * (torch.sin(8 * x + 1) * torch.sin(8 * y + 0.5)).clamp(0.25, 0.75)


def bricks(x: Tensor, y: Tensor) -> Tensor:
    odd = torch.floor(y * 3.5) * 0.5
    joints = torch.maximum(torch.cos(7 * math.pi * y), torch.cos(2 * math.pi * (1.8 * x + odd)))
    return 1.1 - 1.0 * (joints > 0.75)


def spiral(x: Tensor, y: Tensor) -> Tensor:
    x, y = x + 0.1, y - 0.15
    radius = torch.sqrt(x * x + y * y)
    return 0.7 + 0.6 * torch.sin(15 * radius - torch.atan2(y, x)).clamp(-0.6, 0.6) / 0.6


def checks(x: Tensor, y: Tensor) -> Tensor:
    return 0.76 + 0.48 * (torch.sin(9 * x) * torch.sin(9 * y)).clamp(-0.2, 0.2) / 0.2


def feathers(x: Tensor, y: Tensor) -> Tensor:
    return 0.76 + 0.52 * torch.sin(12 * y + 7 * torch.sin(6 * x).abs()).clamp(-0.6, 0.6) / 0.6


def plain(x: Tensor, y: Tensor) -> Tensor:
    return torch.ones_like(x)


class Part(NamedTuple):
    """One part of an object: its name, its signed distance, its color and its texture."""

    name: str
    distance: Distance
    paint: str | tuple[float, float, float] = "main"  # "main", "dark" and "light" are shades of the object's color
    texture: Callable[[Tensor, Tensor], Tensor] = plain


WHITE, BLACK, GLASS, WOOD = (0.97, 0.97, 0.95), (0.08, 0.08, 0.1), (0.7, 0.88, 0.97), (0.5, 0.34, 0.2)
CREAM, FLAME, STEEL = (0.96, 0.9, 0.76), (1.0, 0.62, 0.12), (0.62, 0.65, 0.7)


def eye(cx: float, cy: float, radius: float = 0.11) -> list[Part]:
    """Return the white and the pupil of an eye."""
    return [
        Part("eye", ellipse(cx, cy, radius, radius), WHITE),
        Part("eye", ellipse(cx + 0.25 * radius, cy, 0.55 * radius, 0.55 * radius), BLACK),
    ]


OBJECT_PARTS: dict[str, list[Part]] = {
    "fish": [
        Part("tail", polygon((-0.4, 0), (-0.98, 0.5), (-0.85, 0), (-0.98, -0.5)), "dark"),
        Part("fin", polygon((0.2, 0.3), (-0.3, 0.72), (-0.35, 0.2)), "dark"),
        Part("body", ellipse(0.12, 0, 0.78, 0.45), "main", scales),
        *eye(0.6, 0.12),
    ],
    "bird": [
        Part("leg", line(-0.12, -0.5, -0.12, -0.95, 0.05), FLAME),
        Part("leg", line(0.12, -0.5, 0.12, -0.95, 0.05), FLAME),
        Part("tail", polygon((-0.95, 0.3), (-0.9, 0.0), (-0.3, -0.3), (-0.3, 0.05)), "dark"),
        Part("body", ellipse(-0.05, -0.15, 0.6, 0.45, 20), "main", feathers),
        Part("beak", polygon((0.6, 0.55), (0.65, 0.35), (1.0, 0.4)), FLAME),
        Part("head", ellipse(0.45, 0.45, 0.32, 0.32)),
        Part("wing", ellipse(-0.2, -0.1, 0.42, 0.22, -15), "dark", feathers),
        *eye(0.52, 0.52, 0.1),
    ],
    "cat": [
        Part("tail", line(-0.6, -0.3, -0.9, 0.5, 0.1), "dark"),
        Part("leg", box(-0.4, -0.7, 0.12, 0.28), "dark"),
        Part("leg", box(0.3, -0.7, 0.12, 0.28), "dark"),
        Part("body", ellipse(-0.1, -0.25, 0.65, 0.38), "main", stripes),
        Part("ear", polygon((0.2, 0.55), (0.5, 0.6), (0.22, 0.98)), "dark"),
        Part("ear", polygon((0.62, 0.6), (0.9, 0.5), (0.92, 0.98)), "dark"),
        Part("head", ellipse(0.55, 0.35, 0.4, 0.36), "main", stripes),
        Part("eye", ellipse(0.42, 0.42, 0.08, 0.1), BLACK),
        Part("eye", ellipse(0.72, 0.42, 0.08, 0.1), BLACK),
        Part("nose", ellipse(0.58, 0.24, 0.07, 0.05), (0.95, 0.5, 0.55)),
    ],
    "car": [
        Part("cabin", polygon((-0.55, 0.0), (0.5, 0.0), (0.25, 0.55), (-0.4, 0.55)), "dark"),
        Part("window", polygon((-0.42, 0.08), (-0.08, 0.08), (-0.08, 0.45), (-0.32, 0.45)), GLASS),
        Part("window", polygon((0.04, 0.08), (0.36, 0.08), (0.2, 0.45), (0.04, 0.45)), GLASS),
        Part("body", box(0, -0.2, 0.98, 0.28, 0.16)),
        Part("lamp", ellipse(0.86, -0.14, 0.1, 0.08), FLAME),
        Part("wheel", ellipse(-0.52, -0.5, 0.27, 0.27), BLACK),
        Part("wheel", ellipse(0.52, -0.5, 0.27, 0.27), BLACK),
        Part("hub", ellipse(-0.52, -0.5, 0.12, 0.12), STEEL),
        Part("hub", ellipse(0.52, -0.5, 0.12, 0.12), STEEL),
    ],
    "boat": [
        Part("mast", line(0, -0.4, 0, 0.95, 0.05), WOOD),
        Part("sail", polygon((0.08, -0.2), (0.8, -0.2), (0.08, 0.9)), CREAM, bands),
        Part("sail", polygon((-0.08, -0.2), (-0.08, 0.7), (-0.6, -0.2)), CREAM, bands),
        Part("hull", polygon((-0.6, -0.85), (0.6, -0.85), (0.98, -0.3), (-0.98, -0.3)), "main", bands),
    ],
    "rocket": [
        Part("flame", ellipse(0, -0.78, 0.16, 0.26), FLAME),
        Part("fin", polygon((-0.2, -0.2), (-0.62, -0.72), (-0.2, -0.6)), "dark"),
        Part("fin", polygon((0.2, -0.2), (0.2, -0.6), (0.62, -0.72)), "dark"),
        Part("body", ellipse(0, 0.15, 0.42, 0.82), "light", checks),
        Part("nose", above(ellipse(0, 0.15, 0.42, 0.82), 0.5)),
        Part("belt", lambda x, y: torch.maximum(ellipse(0, 0.15, 0.42, 0.82)(x, y), (y + 0.32).abs() - 0.12)),
        Part("window", ellipse(0, 0.18, 0.2, 0.2), "dark"),
        Part("window", ellipse(0, 0.18, 0.14, 0.14), GLASS),
    ],
    "mushroom": [
        Part("stem", box(0, -0.5, 0.26, 0.45, 0.2), CREAM),
        Part("cap", above(ellipse(0, -0.1, 0.95, 0.95), -0.08)),
        Part("spot", ellipse(-0.42, 0.25, 0.18, 0.18), WHITE),
        Part("spot", ellipse(0.1, 0.55, 0.2, 0.16), WHITE),
        Part("spot", ellipse(0.5, 0.18, 0.16, 0.16), WHITE),
    ],
    "snail": [
        Part("feeler", line(0.7, -0.2, 0.6, 0.3, 0.05), CREAM),
        Part("feeler", line(0.75, -0.2, 0.92, 0.25, 0.05), CREAM),
        Part("foot", line(-0.75, -0.7, 0.72, -0.62, 0.16), CREAM),
        Part("head", ellipse(0.74, -0.38, 0.2, 0.3), CREAM),
        Part("shell", ellipse(-0.1, 0.02, 0.68, 0.64), "main", spiral),
        Part("eye", ellipse(0.8, -0.3, 0.06, 0.06), BLACK),
    ],
    "butterfly": [
        Part("feeler", line(0, 0.4, 0.25, 0.9, 0.035), BLACK),
        Part("feeler", line(0, 0.4, -0.25, 0.9, 0.035), BLACK),
        Part("wing", ellipse(-0.5, 0.3, 0.48, 0.38, -30), "main", spots),
        Part("wing", ellipse(0.5, 0.3, 0.48, 0.38, 30), "main", spots),
        Part("wing", ellipse(-0.38, -0.42, 0.36, 0.28, 40), "dark", spots),
        Part("wing", ellipse(0.38, -0.42, 0.36, 0.28, -40), "dark", spots),
        Part("body", line(0, -0.6, 0, 0.4, 0.1), BLACK),
    ],
    "house": [
        Part("chimney", box(0.45, 0.6, 0.12, 0.28, 0.02), STEEL),
        Part("wall", box(0, -0.4, 0.68, 0.55, 0.03), "main", bricks),
        Part("roof", polygon((-0.95, 0.1), (0.95, 0.1), (0.0, 0.9)), "dark"),
        Part("door", box(-0.25, -0.62, 0.17, 0.32, 0.02), WOOD),
        Part("window", box(0.32, -0.35, 0.2, 0.2, 0.02), GLASS),
    ],
}
