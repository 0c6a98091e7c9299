"""Choose how many threads PyTorch uses on a CPU: no more than the process may use, and of these as many as are fastest.

A parallel loop ends when its last thread does. With more threads than free cores, all wait for the one that has no
core: on a machine of two cores, one of them busy, two threads train half as fast as one, or slower. PyTorch takes every
core it sees, whatever else runs there and whatever a container allows. So the number of threads is measured, on
training steps, before the run and again while it goes on.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import TracebackType

import torch

from minissl import distributed

ROUNDS = 3  # steps with each number of threads
TRIAL_SECONDS = 10.0  # after so long no further round begins
TOO_SLOW = 2.0  # times as slow as the fastest number in a round: not tried again
TOLERATED_SLOWDOWN = 2.0  # times as slow as measured: then measured again
OBSERVED_SECONDS = 3.0  # of such slow steps, before they count
PROBE_SECONDS = 60.0  # after so long the other numbers are tried again: a core may have become free
MAX_PROBE_FRACTION = 0.05  # of the time, spent on trying
MIN_GAIN = 1.1  # times as fast, to change a number of threads that works


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many cores the Linux control groups of this process allow it, as in a container; inf without a limit.

    Args:
        root: where the control groups are mounted.
        membership: the file that names those of the process.
    """
    quotas = [math.inf]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root  # version 1 has a folder for each controller
        relative = Path(path.lstrip("/"))
        for folder in [mount / relative, *(mount / parent for parent in relative.parents)]:
            quotas.append(_quota_of_group(folder))
    return min(quotas)


def _quota_of_group(folder: Path) -> float:
    """Return the cores that one control group allows; inf without a limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its control groups; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_quota())))


def thread_limit() -> int:
    """Return the largest number of threads to try: of the usable cores this process's part, at most OMP_NUM_THREADS."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if distributed.is_distributed() else 1
    return max(1, min(torch.get_num_threads(), usable_cores() // processes))


class Threads:
    """The number of PyTorch's threads while a method is trained: measured on its steps, and again when they slow down.

    Use it as a context, at whose end the number is as it was before, and each training step inside of `step`. On a GPU,
    with a fixed number and with several processes nothing is measured.

    Args:
        fixed: the number of threads; 0 chooses.
        device: of the training.
        report: receives a sentence when the number changes while training.
        clock: seconds, as `time.perf_counter` counts them.

    Attributes:
        count: the number chosen so far.
        seconds: of a step, as measured when it was chosen; inf before.
    """

    def __init__(
        self,
        fixed: int,
        device: torch.device,
        report: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        limit = fixed or thread_limit()
        measured = not fixed and device.type == "cpu" and not distributed.is_distributed()
        self.candidates = sorted({limit, -(-limit // 2), -(-limit // 4), 1}) if measured else [limit]
        self.count, self.report, self.clock = limit, report, clock
        self.seconds = math.inf
        self._before: list[int] = []  # a context may be entered within itself
        self._trials: list[int] = []  # numbers of threads of the next steps
        self._rounds = 0  # left, with those
        self._warm_up = True  # the first step with each number is slower and does not count
        self._times: dict[int, list[float]] = {}  # seconds of the steps tried so far, by number of threads
        self._recent: list[float] = []  # seconds of the last steps with the number chosen
        self._next_probe, self._trial_start = math.inf, 0.0
        if len(self.candidates) > 1:
            self._start_trials()

    def __enter__(self) -> "Threads":
        self._before.append(torch.get_num_threads())
        torch.set_num_threads(self.count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._before.pop())

    @property
    def settled(self) -> bool:
        """Return whether the number is chosen, so that no trial is going on."""
        return not self._trials

    def fix(self) -> None:
        """Keep the number chosen so far, as compiled code needs it."""
        self.candidates = [self.count]
        self._trials.clear()
        if self._before:  # inside the context; else entering it sets the number
            torch.set_num_threads(self.count)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run the training step inside with the number of threads chosen, or to be tried, and measure its time."""
        count = self._trials[0] if self._trials else self.count
        if len(self.candidates) > 1:
            torch.set_num_threads(count)
        start = self.clock()
        yield
        if len(self.candidates) > 1:
            self._record(count, self.clock() - start)

    def _start_trials(self) -> None:
        # In turns, so that what else runs on the machine slows all of them down alike.
        self._trials, self._rounds = list(self.candidates), ROUNDS
        self._times = {count: [] for count in self.candidates}
        self._recent, self._trial_start = [], self.clock()

    def _record(self, count: int, seconds: float) -> None:
        if self._trials:
            self._times[self._trials.pop(0)].append(seconds)
            if not self._trials:
                self._finish_round()
            return
        self._recent.append(seconds)
        while sum(self._recent) - self._recent[0] > OBSERVED_SECONDS and len(self._recent) > 3:
            self._recent.pop(0)
        observed = len(self._recent) >= 3 and sum(self._recent) >= OBSERVED_SECONDS
        slow = observed and median(self._recent) > TOLERATED_SLOWDOWN * self.seconds
        if slow or self.clock() >= self._next_probe:
            self._start_trials()

    def _finish_round(self) -> None:
        """Begin another round with the numbers that are fast enough, or choose."""
        if self._warm_up and self.clock() - self._trial_start < TRIAL_SECONDS:
            self._warm_up = False
            return self._start_trials()
        self._rounds -= 1
        best = {count: min(times) for count, times in self._times.items()}
        fast_enough = [count for count, seconds in best.items() if seconds < TOO_SLOW * min(best.values())]
        if self._rounds and len(fast_enough) > 1 and self.clock() - self._trial_start < TRIAL_SECONDS:
            self._trials = fast_enough
        else:
            self._choose()
        return None

    def _choose(self) -> None:
        """Take the fastest number of those tried; a small gain does not change it."""
        # The best time of each: a step that renders images or waits for a file says nothing about threads.
        seconds = {count: min(times) for count, times in self._times.items()}
        fastest, previous = min(seconds, key=seconds.__getitem__), self.count
        first = math.isinf(self.seconds)
        if first or seconds[previous] > MIN_GAIN * seconds[fastest]:
            self.count = fastest
        if not first and self.count != previous:
            old, new = (f"{seconds[count]:.2g} s with {count_threads(count)}" for count in (previous, self.count))
            self.report(f"A step takes {old} and {new}; training goes on with {count_threads(self.count)}.")
        self.seconds = median(self._times[self.count])
        torch.set_num_threads(self.count)
        now = self.clock()
        self._next_probe = now + max(PROBE_SECONDS, (now - self._trial_start) / MAX_PROBE_FRACTION)


def count_threads(count: int) -> str:
    """Return "1 thread" or "2 threads"."""
    return f"{count} thread" if count == 1 else f"{count} threads"
