"""Plan the length of a run, and keep to the minutes that were asked for while the speed of the machine changes.

A run of some minutes is planned for the number of steps that its first steps suggest. When the steps become slower or
faster, because other processes come or go, the length is revised, so that the run ends in the minutes asked for. Every
schedule is a function of `progress`, the fraction of the run that is done. It stays continuous: what is left of each
schedule is stretched or compressed over the steps that are left.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean, median

from minissl import distributed
from minissl.training.threads import count_threads

TOLERANCE = 0.1  # of the minutes asked for, by which a run may miss them without being revised
MIN_STEPS = 5  # measured before a revision
SMOOTHING = 0.5  # weight of the last measurement in the time of a step, so that a short disturbance changes little
MIN_LEFT = 0.01  # of the minutes, for the rest of the schedules even if the minutes are over
CHECKS_PER_RUN = 40
CHECK_SECONDS = (1.0, 10.0)  # shortest and longest time between two checks


@dataclass(frozen=True)
class Plan:
    """Length and cost of a run.

    Attributes:
        steps: length of the run.
        seconds_per_step: median of the steps measured before the run.
        memory: bytes, as `device.memory_used` returns them.
        threads: PyTorch's threads at the start; 0 is unknown.
        revisions: (step, steps) for each revision, in their order: until `step` the length was planned as `steps`.
    """

    steps: int
    seconds_per_step: float = 0.0
    memory: int = 0
    threads: int = 0
    revisions: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        minutes = self.steps * self.seconds_per_step / 60
        threads = f" with {count_threads(self.threads)}" if self.threads else ""
        return f"{self.steps} steps in about {minutes:.1f} minutes{threads}, {self.memory / 1e9:.1f} GB of memory"

    def progress(self, step: int) -> float:
        """Return the fraction of the run that is done after `step` steps, in [0, 1].

        Without a revision it is step / steps. After one, what was left then is divided over the steps left.
        """
        done, begin = 0.0, 0
        for end, steps in (*self.revisions, (self.steps, self.steps)):
            if step <= end:
                return done + (1 - done) * ((step - begin) / (steps - begin))
            done, begin = done + (1 - done) * ((end - begin) / (steps - begin)), end
        return 1.0

    def revise(self, step: int, steps: int) -> "Plan":
        """Return the plan with another length from `step` on; later revisions, of a killed process, are dropped."""
        earlier = tuple(revision for revision in self.revisions if revision[0] < step)
        planned = next((length for end, length in self.revisions if end >= step), self.steps)
        return replace(self, steps=steps, revisions=(*earlier, (step, planned)))


class Pace:
    """Keep a run to its minutes: asked after each step, it revises the plan if the run would miss them.

    Args:
        plan: of the run.
        minutes: asked for; 0 keeps the plan.
        start_step: step from which the run continues.
        seconds: spent on the steps before.
        on_gpu: steps are only started, and their time is that of the step that has to wait: their mean counts, not the
            median.
        clock: seconds, as `time.monotonic` counts them.
    """

    def __init__(
        self,
        plan: Plan,
        minutes: float,
        start_step: int = 0,
        seconds: float = 0.0,
        on_gpu: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.plan, self.budget, self.on_gpu, self.clock = plan, 60 * minutes, on_gpu, clock
        self.start = clock() - seconds
        shortest, longest = CHECK_SECONDS
        self.check_seconds = min(max(self.budget / CHECKS_PER_RUN, shortest), longest)
        self.seconds_per_step = plan.seconds_per_step
        self.last_step, self.last_check = start_step, clock()
        self.last_time: float | None = None  # none before the first step, which compiles, and loads what is loaded once
        self.times: list[float] = []  # of the steps since the last check

    @property
    def seconds(self) -> float:
        """Return the time spent so far, on evaluations and in earlier sessions too."""
        return self.clock() - self.start

    def due(self) -> bool:
        """Return whether it is time to call `revise`. To be asked after every step, whose time it measures."""
        if not self.budget:
            return False
        now = self.clock()
        if self.last_time is not None:
            self.times.append(now - self.last_time)
        self.last_time = now
        return now - self.last_check >= self.check_seconds

    def skip(self) -> None:
        """Leave what was done since the last step, an evaluation, out of the time of the next one."""
        self.last_time = self.clock()

    def revise(self, step: int) -> bool:
        """Revise the plan after `step` steps if need be, in all processes at the same step. Returns whether it was."""
        steps = distributed.broadcast_object(self._steps_in_budget(step))
        if steps is None:
            return False
        self.plan = replace(self.plan.revise(step, steps), seconds_per_step=self.seconds_per_step)
        return True

    def _steps_in_budget(self, step: int) -> int | None:
        """Return the length with which the run ends in its minutes; None if the planned one is near enough."""
        if len(self.times) < MIN_STEPS or step >= self.plan.steps:
            return None
        measured = fmean(self.times) if self.on_gpu else median(self.times)
        self.times, self.last_check = [], self.clock()
        self.seconds_per_step += (measured - self.seconds_per_step) * (SMOOTHING if self.seconds_per_step else 1.0)
        left = max(self.budget - self.seconds, MIN_LEFT * self.budget)
        expected = (self.plan.steps - step) * self.seconds_per_step
        if abs(expected - left) <= TOLERANCE * self.budget:
            return None
        return step + max(1, round(left / self.seconds_per_step))
