"""Start the processes of a group, and read what each said when one of them dies."""

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException, spawn


def group(work: Callable, world: int, folder: Path) -> None:
    """work(number, world, folder) in each of `world` processes; fails with their last words if one is killed."""
    try:
        spawn(_one, (work, world, str(folder)), world)
    except ProcessExitedException as error:
        said = [f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.glob("said_*"))]
        pytest.fail("\n".join([str(error), *said]))


def _one(number: int, work: Callable, world: int, folder: str) -> None:
    """A crash in C++ leaves no exception, only what stands in its standard error."""
    os.dup2(os.open(f"{folder}/said_{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.enable()
    work(number, world, folder)
    os._exit(0)  # what is asked for is done; the end of an interpreter beside gloo's threads is not what is tested
