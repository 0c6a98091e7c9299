"""Clips of the world of Scenes: things that move as their action says, before a camera that pans and zooms.

A clip has one to three objects. They pass in front of each other and behind what stands before them; each keeps its
number in the masks from the first frame to the last, so that tracking and dense features over time can be measured.

Shapes: T frames of S x S pixels; what changes over time is (T,).
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minissl.data.draw import ACTIONS, COLORS, Bits, Thing, canvas, draw_bits, draw_place, draw_thing, shine
from minissl.data.places import PLACES
from minissl.data.scenes import OBJECTS, Dice, bits
from minissl.errors import InputError

SPLITS = ("train", "val", "test")
MOST = 3  # objects in a clip
DRAWS = 120  # uniform numbers a clip is made of
CHUNK = 6  # frames drawn at once: what fits into a core's cache


class Clip(NamedTuple):
    """Frames and who is where in them."""

    frames: Tensor  # (T, 3, H, W) uint8
    masks: Tensor  # (T, H, W) uint8, 0 or the number of an object, the same in all frames


class Clips:
    """The clips 0 .. n-1 of a split; `clips[i]` draws one.

    Args:
        split: "train", "val" or "test"; no clip is in two of them.
        size: pixels a side.
        frames: T.
        n: how many.
        seed: another world of the same kind.
    """

    def __init__(self, split: str, size: int = 64, frames: int = 24, n: int = 100, seed: int = 0):
        if split not in SPLITS:
            raise InputError(f"Clips has no split {split!r}; choose one of {', '.join(SPLITS)}.")
        if frames < 1:
            raise InputError("A clip has at least one frame.")
        self.split, self.size, self.frames, self.n, self.seed = split, size, frames, n, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.n:
            raise IndexError(f"There are {self.n} clips; {index} is none of them.")
        root = (self.seed, len(SPLITS) + 100 + SPLITS.index(self.split), index)
        return render_clip(torch.from_numpy(np.random.default_rng(root).random(DRAWS)), self.size, self.frames)


def render_clip(draws: Tensor, size: int, frames: int) -> Clip:
    """Draw a clip from its draws (DRAWS,), on every core."""
    time = torch.arange(frames, dtype=torch.float64) / max(frames - 1, 1)  # 0 to 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(partial(_render, draws, size), time.split(CHUNK)))
    return Clip(*(torch.cat(part) for part in zip(*parts)))


def _render(draws: Tensor, size: int, time: Tensor) -> Clip:
    """The frames of a clip at some times (T,)."""
    frames, dice = len(time), Dice(draws.expand(len(time), -1))
    at = canvas(frames, size, _move(dice, time, 0.8, 1.25), _move(dice, time, -0.3, 0.3), _move(dice, time, -0.1, 0.15))
    image = draw_place(
        at, dice.pick(len(PLACES)), horizon=dice(-0.35, 0.15), look=dice.many(3).T, haze=dice.many(3, 0.35, 0.85),
        thick=dice(0.35, 0.65),
    )  # fmt: skip
    masks = torch.zeros(frames, size, size, dtype=torch.uint8)
    image, _ = draw_bits(image, masks, at, _larger(bits(dice, 3, 0.5, (0.05, 0.12), (-0.95, 0.1))), 0)
    count = 1 + int(dice.pick(MOST)[0])
    for number in range(1, MOST + 1):  # the further ones first
        actor = _actor(dice, time, (0.35 + 0.05 * number, 0.48 + 0.06 * number))
        if number <= count:
            image, parts = draw_thing(image, torch.zeros_like(masks), at, actor)
            masks = torch.where(parts > 0, number, masks)
    image, masks = draw_bits(image, masks, at, _larger(bits(dice, 2, 0.5, (0.16, 0.3), (-1.0, -0.5))), 0)
    light = shine(
        image, angle=dice(0, 2 * math.pi), tilt=dice(0, 0.18), warmth=dice(-0.09, 0.09), gain=dice(0.75, 1.08)
    )
    return Clip(light, masks)


def _move(dice: Dice, time: Tensor, low: float, high: float) -> Tensor:
    """(T,) from one number to another, slow at both ends."""
    start, end = dice(low, high), dice(low, high)
    return end + 0.5 * (start - end) * (1 + torch.cos(math.pi * time))


def _larger(strewn: Bits) -> Bits:
    """Over the wider field that a moving camera sees."""
    return strewn._replace(x=1.4 * strewn.x)


def _actor(dice: Dice, time: Tensor, scale: tuple[float, float]) -> Thing:
    """An object that does something for the length of a clip."""
    kind, color, action = dice.pick(len(OBJECTS)), dice.pick(len(COLORS)), dice.pick(len(ACTIONS))
    size, start, way = dice(*scale), dice(-0.7, 0.7), torch.where(dice() < 0.5, -1.0, 1.0).double()
    pace, beat = dice(0.8, 1.2), 2 * math.pi * (dice() + time * 2.0)  # two beats a clip
    is_ = {name: (action == i).double() for i, name in enumerate(ACTIONS)}
    speed = pace * (1.5 * is_["racing"] + 0.5 * is_["jumping"] + 0.4 * is_["tumbling"] + 0.15 * is_["resting"])
    x = (start + way * speed * (time - 0.5) + 2.2).remainder(
        4.4
    ) - 2.2  # who leaves on one side may come back on the other
    return Thing(
        kind, color, action, torch.ones_like(kind, dtype=torch.bool),
        x=x, y=dice(-0.35, 0.0) - 0.1 * is_["sleeping"] * size, scale=size, side=way,
        turn=0.05 * torch.sin(beat) * is_["resting"] + 0.3 * torch.cos(beat) * is_["jumping"]
        - 2 * math.pi * pace * time * is_["tumbling"],
        lift=size * (0.9 * torch.sin(beat / 2).abs() * is_["jumping"] + 0.2 * is_["tumbling"]),
        width=1 + 0.04 * torch.sin(beat) * (is_["sleeping"] + is_["resting"]), tint=dice.many(3, -0.06, 0.06),
    )  # fmt: skip
