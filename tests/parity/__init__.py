"""Comparisons of every loss, head, schedule, network and metric with an independent implementation.

`ledger` defines what a comparison is; the other modules contain the comparisons. `python -m tests.parity` measures
them.
"""

import importlib

from tests.parity.ledger import COMPARISONS, Comparison

MODULES = ("losses", "heads", "networks", "towers", "official", "maps", "pretext", "schedules_and_optimizers", "views")
MODULES += ("evaluation", "dense", "video", "golden")


def load_comparisons() -> dict[str, Comparison]:
    """Return all comparisons by name."""
    for name in MODULES:
        importlib.import_module(f"{__name__}.{name}")
    return COMPARISONS
