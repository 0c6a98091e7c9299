"""Held against others: every loss, head, schedule, network and evaluation beside an independent implementation.

`ledger` says what a comparison is, the other modules are the comparisons, and `python -m tests.parity` measures them.
"""

import importlib
from typing import Any

MODULES = ("losses", "heads", "networks", "towers", "official", "maps", "pretext", "schedules_and_optimisers", "views")
MODULES += ("evaluation", "dense", "video", "golden")


def everything() -> dict[str, Any]:
    """All comparisons by their names."""
    for name in MODULES:
        importlib.import_module(f"{__name__}.{name}")
    return importlib.import_module(f"{__name__}.ledger").COMPARISONS
