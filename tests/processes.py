"""Start a group of processes, and report their standard error when one of them crashes."""

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException, spawn


def spawn_group(work: Callable, world_size: int, folder: Path) -> None:
    """Run work(rank, world_size, folder) in each of some processes. Fails with their standard error if one crashes."""
    try:
        spawn(_run, (work, world_size, str(folder)), world_size)
    except ProcessExitedException as error:
        errors = (
            f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.glob("stderr_*"))
        )
        pytest.fail("\n".join([str(error), *errors]))


def _run(rank: int, work: Callable, world_size: int, folder: str) -> None:
    """Redirect standard error to a file: a crash in C++ leaves no exception."""
    os.dup2(os.open(f"{folder}/stderr_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.enable()
    work(rank, world_size, folder)
    os._exit(0)  # the shutdown of the interpreter beside gloo's threads is not tested
