"""Backgrounds of scenes: eight places, each a function of the plane.

Shapes: B scenes; x to the right and y up, both (B, S, S) float64 in [-1, 1]; images (B, 3, S, S) in [0, 1]; u holds
three random numbers per scene, (3, B, 1, 1) in [0, 1), that shift waves, trunks and towers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Texture = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, y, u -> factor on the color (B, S, S)
Background = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, y, horizon (B, 1, 1), u -> image (B, 3, S, S)
Color = tuple[float, float, float]


def paint(image: Tensor, cover: Tensor, color: Tensor) -> Tensor:
    """Blend a color (B, 3, S, S or 1, S or 1) over images (B, 3, S, S) with opacity `cover` (B, S, S)."""
    return torch.lerp(image, color.expand_as(image), cover[:, None])


def rgb(*color: float) -> Tensor:
    """Return a color as (1, 3, 1, 1) float64."""
    return torch.tensor(color, dtype=torch.float64).view(1, 3, 1, 1)


def landscape(sky: Color, horizon_sky: Color, ground: Color, texture: Texture) -> Background:
    """Return a background with a sky that fades towards the horizon, and textured ground below it."""

    def draw(x: Tensor, y: Tensor, horizon: Tensor, u: Tensor) -> Tensor:
        height = ((y - horizon) / (1 - horizon)).clamp(0, 1)
        image = torch.lerp(rgb(*horizon_sky), rgb(*sky), height[:, None])
        edge = horizon + 0.05 * torch.sin(2.5 * x + 6.3 * u[0])
        soil = rgb(*ground) * texture(x, y - edge, u)[:, None]
        return paint(image, ((edge - y) * 40).clamp(0, 1), soil)

    return draw


def specks(x: Tensor, y: Tensor, density: float, u: Tensor) -> Tensor:
    """Return scattered soft dots (B, S, S) in [0, 1], from a product of waves whose beat hides any grid."""
    a = torch.sin(density * (x + 0.3 * y) + 6.3 * u[1]) + torch.sin(density * 1.3 * (0.4 * x - y) + 6.3 * u[2])
    b = torch.sin(density * 0.7 * (x - 1.7 * y) + 6.3 * u[0])
    return ((a * b).abs() - 1.1).clamp(0, 0.5) * 2


def snow(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return 0.94 + 0.06 * torch.sin(5 * x + 9 * y + 6.3 * u[1])


def sand(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return 0.95 + 0.07 * torch.sin(26 * y + 3 * torch.sin(3 * x + 6.3 * u[1]))


def grass(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return 0.9 + 0.14 * torch.sin(40 * x + 6.3 * u[1]) * torch.sin(14 * y + 5 * x)


def paving(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return 0.95 - 0.12 * (torch.cos(22 * y) > 0.85) - 0.08 * (torch.cos(14 * x / (0.6 - y) + 6.3 * u[1]) > 0.9)


def craters(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return 0.85 + 0.25 * specks(x, 2 * y, 6.0, u) - 0.1 * torch.sin(9 * y)


def forest(x: Tensor, y: Tensor, horizon: Tensor, u: Tensor) -> Tensor:
    """Draw trunks in front of a green haze."""
    image = landscape((0.42, 0.6, 0.45), (0.62, 0.76, 0.6), (0.34, 0.45, 0.24), grass)(x, y, horizon, u)
    trunks = ((torch.sin(7 * x + 6.3 * u[1]) + 0.5 * torch.sin(17 * x + 6.3 * u[2]) - 0.75) * 8).clamp(0, 1)
    return paint(image, trunks * (y > horizon), rgb(0.36, 0.3, 0.24) * (1 + 0.12 * torch.sin(60 * x))[:, None])


def city(x: Tensor, y: Tensor, horizon: Tensor, u: Tensor) -> Tensor:
    """Draw towers with lit windows."""
    image = landscape((0.55, 0.66, 0.82), (0.86, 0.82, 0.78), (0.52, 0.52, 0.54), paving)(x, y, horizon, u)
    block = torch.floor(4 * x + 4 * u[1])
    roof = horizon + 0.35 + 0.25 * torch.sin(2.4 * block + 6.3 * u[2])
    lit = (torch.sin(24 * x) > 0.2) & (torch.sin(26 * y) > 0.2)
    walls = (0.42 + 0.06 * torch.sin(1.7 * block) + 0.28 * lit)[:, None] * rgb(0.95, 1.0, 1.12)
    return paint(image, ((roof - y) * 40).clamp(0, 1) * (y > horizon), walls)


def sea(x: Tensor, y: Tensor, horizon: Tensor, u: Tensor) -> Tensor:
    """Draw an underwater view: light from above, waves and bubbles."""
    image = torch.lerp(rgb(0.1, 0.3, 0.5), rgb(0.45, 0.78, 0.86), ((y + 1) / 2)[:, None])
    ripple = 0.06 * torch.sin(9 * x + 5 * y + 2 * torch.sin(3 * y + 6.3 * u[1]))
    return paint(image + ripple[:, None], 0.7 * specks(x, y, 9.0, u), rgb(0.85, 0.96, 1.0))


def moon(x: Tensor, y: Tensor, horizon: Tensor, u: Tensor) -> Tensor:
    """Draw a black sky with stars over gray craters."""
    image = landscape((0.05, 0.05, 0.14), (0.12, 0.1, 0.24), (0.6, 0.6, 0.63), craters)(x, y, horizon, u)
    return paint(image, specks(x, y, 21.0, u) * (y > horizon + 0.05), rgb(1.0, 1.0, 0.9))


def meadow(x: Tensor, y: Tensor, horizon: Tensor, u: Tensor) -> Tensor:
    """Draw grass with flowers."""
    image = landscape((0.45, 0.7, 0.95), (0.82, 0.92, 0.98), (0.46, 0.68, 0.3), grass)(x, y, horizon, u)
    return paint(image, specks(x, 1.5 * y, 12.0, u) * (y < horizon), rgb(0.98, 0.9, 0.95))


BACKGROUNDS: dict[str, Background] = {
    "snowy field": landscape((0.62, 0.74, 0.86), (0.86, 0.9, 0.94), (0.95, 0.97, 1.0), snow),
    "beach": landscape((0.4, 0.72, 0.92), (0.32, 0.6, 0.78), (0.93, 0.84, 0.63), sand),
    "desert": landscape((0.98, 0.8, 0.55), (0.99, 0.9, 0.7), (0.85, 0.56, 0.32), sand),
    "forest": forest,
    "city": city,
    "sea": sea,
    "moon": moon,
    "meadow": meadow,
}
