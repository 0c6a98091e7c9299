"""Clips: short videos of the objects of Scenes, which move by their action in front of a moving camera.

A clip has one to three objects. They pass in front of each other and behind occluders. Each keeps its number in the
masks from the first frame to the last, so that tracking and dense features over time can be measured.

Shapes: T frames of S x S pixels; quantities that change over time are (T,).
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from minissl.data.synthetic.backgrounds import BACKGROUNDS
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
from minissl.data.synthetic.scenes import OBJECTS, RandomNumbers, sample_clutter
from minissl.errors import InputError, suggestion

SPLITS = ("train", "val", "test")
MAX_OBJECTS = 3  # objects per clip
NUM_DRAWS = 120  # uniform random numbers per clip
CHUNK = 6  # frames rendered at once: what fits into a core's cache


class Clip(NamedTuple):
    """Frames of a video and the object that each pixel belongs to."""

    frames: Tensor  # (T, 3, H, W) uint8
    masks: Tensor  # (T, H, W) uint8, 0 or the number of an object, the same in all frames


class Clips(Dataset[Clip]):
    """The clips 0..n-1 of a split; an index renders one.

    Args:
        split: "train", "val" or "test"; no clip is in two of them.
        size: S.
        frames: T.
        n: number of clips.
        seed: clips of another seed differ, and have the same distribution.

    Raises:
        InputError: for an unknown split, or less than one frame.
    """

    def __init__(self, split: str, size: int = 64, frames: int = 24, n: int = 100, seed: int = 0):
        if split not in SPLITS:
            hint = suggestion(split, SPLITS)
            raise InputError(f"Clips has no split {split!r}{hint}; choose one of {', '.join(SPLITS)}.")
        if frames < 1:
            raise InputError(f"A clip cannot have {frames} frames; give at least one.")
        self.split, self.image_size, self.num_frames, self.n, self.seed = split, size, frames, n, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.n:
            raise IndexError(f"Index {index} is out of range for {self.n} clips.")
        root = (self.seed, 103 + SPLITS.index(self.split), index)  # disjoint from the seed sequences of Scenes
        draws = torch.from_numpy(np.random.default_rng(root).random(NUM_DRAWS))
        return render_clip(draws, self.image_size, self.num_frames)


def render_clip(draws: Tensor, size: int, frames: int) -> Clip:
    """Render a clip from its random numbers (NUM_DRAWS,), on all cores."""
    time = torch.arange(frames, dtype=torch.float64) / max(frames - 1, 1)  # 0 to 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(partial(_render, draws, size), time.split(CHUNK)))
    return Clip(*(torch.cat(part) for part in zip(*parts)))


def _render(draws: Tensor, size: int, time: Tensor) -> Clip:
    """Render the frames of a clip at some times (T,) in [0, 1]."""
    frames, rng = len(time), RandomNumbers(draws.expand(len(time), -1))
    zoom, x, y = (_camera_path(rng, time, *ends) for ends in ((0.8, 1.25), (-0.3, 0.3), (-0.1, 0.15)))
    at = canvas(frames, size, zoom, x, y)
    image = draw_background(
        at, rng.integer(len(BACKGROUNDS)), horizon=rng.uniform(-0.35, 0.15), variation=rng.vector(3).T,
        haze=rng.vector(3, 0.35, 0.85), haze_fraction=rng.uniform(0.35, 0.65),
    )  # fmt: skip
    masks = torch.zeros(frames, size, size, dtype=torch.uint8)
    clutter = _spread(sample_clutter(rng, 3, 0.5, (0.05, 0.12), (-0.95, 0.1)))
    image, _ = draw_clutter(image, masks, at, clutter, 0)
    count = 1 + int(rng.integer(MAX_OBJECTS)[0])
    for number in range(1, MAX_OBJECTS + 1):  # from back to front
        obj = _sample_moving_object(rng, time, (0.35 + 0.05 * number, 0.48 + 0.06 * number))
        if number <= count:
            image, parts = draw_object(image, torch.zeros_like(masks), at, obj)
            masks = torch.where(parts > 0, number, masks)
    occluders = _spread(sample_clutter(rng, 2, 0.5, (0.16, 0.3), (-1.0, -0.5)))
    image, masks = draw_clutter(image, masks, at, occluders, 0)
    lit = apply_lighting(
        image, angle=rng.uniform(0, 2 * math.pi), tilt=rng.uniform(0, 0.18), warmth=rng.uniform(-0.09, 0.09),
        gain=rng.uniform(0.75, 1.08),
    )  # fmt: skip
    return Clip(lit, masks)


def _camera_path(rng: RandomNumbers, time: Tensor, low: float, high: float) -> Tensor:
    """Interpolate between two random numbers in [low, high) along half a cosine, (T,)."""
    start, end = rng.uniform(low, high), rng.uniform(low, high)
    return end + 0.5 * (start - end) * (1 + torch.cos(math.pi * time))


def _spread(clutter: Clutter) -> Clutter:
    """Spread clutter over the wider field that a moving camera sees."""
    return clutter._replace(x=1.4 * clutter.x)


def _sample_moving_object(rng: RandomNumbers, time: Tensor, scale: tuple[float, float]) -> SceneObject:
    """Sample an object that does one action for the length of a clip."""
    object_class, color, action = rng.integer(len(OBJECTS)), rng.integer(len(COLORS)), rng.integer(len(ACTIONS))
    size, start = rng.uniform(*scale), rng.uniform(-0.7, 0.7)
    direction = torch.where(rng.uniform() < 0.5, -1.0, 1.0).double()
    pace, phase = rng.uniform(0.8, 1.2), 2 * math.pi * (rng.uniform() + time * 2.0)  # two periods per clip
    is_ = {name: (action == i).double() for i, name in enumerate(ACTIONS)}
    speed = pace * (1.5 * is_["racing"] + 0.5 * is_["jumping"] + 0.4 * is_["tumbling"] + 0.15 * is_["resting"])
    x = (start + direction * speed * (time - 0.5) + 2.2).remainder(4.4) - 2.2  # re-enters on the other side
    return SceneObject(
        object_class, color, action, torch.ones_like(object_class, dtype=torch.bool),
        x=x, y=rng.uniform(-0.35, 0.0) - 0.1 * is_["sleeping"] * size, scale=size, direction=direction,
        angle=0.05 * torch.sin(phase) * is_["resting"] + 0.3 * torch.cos(phase) * is_["jumping"]
        - 2 * math.pi * pace * time * is_["tumbling"],
        elevation=size * (0.9 * torch.sin(phase / 2).abs() * is_["jumping"] + 0.2 * is_["tumbling"]),
        width=1 + 0.04 * torch.sin(phase) * (is_["sleeping"] + is_["resting"]), tint=rng.vector(3, -0.06, 0.06),
    )  # fmt: skip
