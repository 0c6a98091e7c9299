"""Methods: one file per paper, each with its loss functions and one subclass of `base.Method`."""

import pkgutil

_NOT_METHODS = ("base", "losses", "registry")


def list_methods() -> list[str]:
    """Return the names of all methods, the files of this folder. Nothing is imported for it."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_METHODS)
