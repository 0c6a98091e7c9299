"""Checks for the exercises: what is wrong, and not only that it is.

An exercise is a stub to fill in and a slow specification in loops. `check` runs both on the same inputs.
"""

from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor


def check(yours: Callable, specification: Callable, cases: Sequence[tuple], tolerance: float = 1e-4) -> bool:
    """Compare a solution with its specification, and print what was found.

    Args:
        yours: the solution; while it returns None the exercise counts as not begun.
        specification: gives the right answer.
        cases: arguments of both, one tuple a case.
        tolerance: of numbers, absolute and relative.

    Returns:
        Whether every case is right.
    """
    for i, case in enumerate(cases, 1):
        try:
            found = yours(*case)
        except Exception as error:  # what a student's code raises is the answer to show
            print(f"Case {i}: your code stopped with {type(error).__name__}: {error}")
            return False
        if found is None:
            print("Not begun: the function returns None.")
            return False
        wrong = difference(found, specification(*case), tolerance)
        if wrong:
            print(f"Case {i} of {len(cases)}: {wrong}")
            return False
    print(f"Right, in {len(cases)} cases.")
    return True


def difference(found: Any, right: Any, tolerance: float = 1e-4) -> str:
    """What is wrong with an answer, in a sentence; nothing if it is right."""
    if isinstance(found, Tensor) and found.ndim == 0 and (not isinstance(right, Tensor) or right.ndim == 0):
        found = found.item()
    if isinstance(right, Tensor) and right.ndim == 0:
        right = right.item()
    if not isinstance(right, Tensor):
        if isinstance(found, Tensor):
            return f"one number is asked for, yours is a tensor of shape {tuple(found.shape)}."
        if isinstance(right, (int, float)) and not isinstance(found, Number):
            return f"one number is asked for, yours is a {type(found).__name__}."
        same = abs(found - right) <= tolerance * (1 + abs(right)) if isinstance(right, float) else found == right
        return "" if same else f"the answer is {right!r}, yours is {found!r}."
    if not isinstance(found, Tensor):
        return f"a tensor of shape {tuple(right.shape)} is asked for, yours is a {type(found).__name__}."
    if found.shape != right.shape:
        return f"the shape should be {tuple(right.shape)}, yours is {tuple(found.shape)}."
    close = torch.isclose(found.double(), right.double(), tolerance, tolerance, equal_nan=True)
    if bool(close.all()):
        return ""
    first = tuple((~close).nonzero()[0].tolist())
    share = float((~close).float().mean())
    return (
        f"{100 * share:.0f} % of the numbers differ; the first at {list(first)} should be "
        f"{right[first].item():.4g}, yours is {found[first].item():.4g}."
    )
