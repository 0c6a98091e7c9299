"""The one exception for errors that the user can correct, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, explained in a sentence: what is wrong and what to do. The command line prints it and exits with 2."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'NAME'?)" for the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
