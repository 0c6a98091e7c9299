"""Check the solutions of exercises, and explain what is wrong.

An exercise is a stub to fill in and a slow specification in loops. `check` runs both on the same inputs.
"""

from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor


def check(
    solution: Callable[..., Any],
    specification: Callable[..., Any],
    cases: Sequence[tuple[Any, ...]],
    tolerance: float = 1e-4,
) -> bool:
    """Compare a solution with its specification, and print the result.

    Args:
        solution: the student's function; as long as it returns None the exercise counts as not started.
        specification: the correct function.
        cases: arguments of both, one tuple per case.
        tolerance: absolute and relative, of floating-point numbers.

    Returns:
        Whether all cases are correct.
    """
    for i, case in enumerate(cases, 1):
        try:
            value = solution(*case)
        except Exception as error:  # any exception of a student's code is shown
            print(f"Case {i}: your code raised {type(error).__name__}: {error}")
            return False
        if value is None:
            print("Not started: the function returns None.")
            return False
        message = difference(value, specification(*case), tolerance)
        if message:
            print(f"Case {i} of {len(cases)}: {message}")
            return False
    print(f"Correct in {len(cases)} cases.")
    return True


def difference(value: Any, expected: Any, tolerance: float = 1e-4) -> str:
    """Describe in a sentence how a value differs from the expected one. Returns "" if it does not."""
    if isinstance(value, Tensor) and value.ndim == 0 and (not isinstance(expected, Tensor) or expected.ndim == 0):
        value = value.item()
    if isinstance(expected, Tensor) and expected.ndim == 0:
        expected = expected.item()
    return (
        _tensor_difference(value, expected, tolerance)
        if isinstance(expected, Tensor)
        else _scalar_difference(value, expected, tolerance)
    )


def _scalar_difference(value: Any, expected: Any, tolerance: float) -> str:
    if isinstance(value, Tensor):
        return f"one number is expected, yours is a tensor of shape {tuple(value.shape)}."
    if isinstance(expected, (int, float)) and not isinstance(value, Number):
        return f"one number is expected, yours is a {type(value).__name__}."
    close = (
        abs(value - expected) <= tolerance * (1 + abs(expected)) if isinstance(expected, float) else value == expected
    )
    return "" if close else f"{expected!r} is expected, yours is {value!r}."


def _tensor_difference(value: Any, expected: Tensor, tolerance: float) -> str:
    if not isinstance(value, Tensor):
        return f"a tensor of shape {tuple(expected.shape)} is expected, yours is a {type(value).__name__}."
    if value.shape != expected.shape:
        return f"the shape should be {tuple(expected.shape)}, yours is {tuple(value.shape)}."
    close = torch.isclose(value.double(), expected.double(), tolerance, tolerance, equal_nan=True)
    if bool(close.all()):
        return ""
    first = tuple((~close).nonzero()[0].tolist())
    fraction = float((~close).float().mean())
    return (
        f"{100 * fraction:.0f} % of the numbers differ; the first at {list(first)} should be "
        f"{expected[first].item():.4g}, yours is {value[first].item():.4g}."
    )
