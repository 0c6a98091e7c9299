"""Compute schedules as functions of `progress` in [0, 1], the fraction of the run that is done."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Return end + (start - end) (1 + cos(pi progress)) / 2: `start` at progress 0, `end` at 1."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def linear(start: float, end: float, progress: float, until: float = 1.0) -> float:
    """Return a value on the line from `start` to `end`, which is reached at progress `until` and kept from then on."""
    return end if progress >= until else start + (end - start) * max(progress, 0.0) / until


def warmup_cosine(start: float, peak: float, end: float, progress: float, warmup: float) -> float:
    """Return a value on a line from `start` to `peak` up to progress `warmup`, then on a cosine to `end` at 1."""
    if progress < warmup:
        return linear(start, peak, progress, until=warmup)
    return cosine(peak, end, (progress - warmup) / max(1 - warmup, 1e-12))
