"""A run keeps to its minutes while the machine becomes slower and faster, and its schedules stay continuous."""

import json
import random
import time
from itertools import pairwise

import pytest

from minissl.training import plan as plan_module
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.plan import Pace, Plan
from tests.runs import ToyMethod, numbered_images


def test_progress_without_a_revision_is_the_fraction_of_the_steps():
    for steps in (1, 7, 1000):
        assert [Plan(steps).progress(step) for step in range(steps + 1)] == [step / steps for step in range(steps + 1)]


@pytest.mark.parametrize("seed", range(20))
def test_progress_is_continuous_and_ends_with_the_run(seed):
    rng = random.Random(seed)
    plan, step = Plan(rng.randint(50, 100)), 0
    before = [plan.progress(0)]
    for _ in range(rng.randint(1, 5)):  # each revision leaves what was done as it was
        revised_at = rng.randint(step + 1, min(step + 20, plan.steps - 1))
        before += [plan.progress(s) for s in range(step + 1, revised_at + 1)]
        plan, step = plan.revise(revised_at, revised_at + rng.randint(20, 100)), revised_at
    values = [plan.progress(s) for s in range(plan.steps + 1)]
    assert values[: len(before)] == pytest.approx(before)
    assert (values[0], values[-1], plan.progress(plan.steps + 3)) == (0.0, pytest.approx(1.0), 1.0)
    rises = [b - a for a, b in pairwise(values)]
    assert min(rises) > 0
    assert rises[step:] == pytest.approx([rises[-1]] * (plan.steps - step))


def test_a_revision_replaces_later_ones_of_a_process_that_was_killed():
    plan = Plan(100).revise(20, 50).revise(40, 80)
    assert plan.revisions == ((20, 100), (40, 50))
    resumed = plan.revise(30, 60)  # it continued from a checkpoint of step 25, and was slower again
    assert (resumed.steps, resumed.revisions) == (60, ((20, 100), (30, 50)))
    assert resumed.progress(30) == plan.progress(30)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run_at_speed(pace, clock, seconds_per_step, step=0):
    """Take steps until the plan ends, each as long as a function of the time says. Returns the number of revisions."""
    revisions = 0
    while step < pace.plan.steps:
        clock.now += seconds_per_step(clock.now)
        step += 1
        revisions += pace.due() and pace.revise(step)
    return revisions


@pytest.mark.parametrize(
    ("seconds_per_step", "revisions"),
    [
        (lambda now: 0.1, range(1)),
        (lambda now: 0.105, range(1)),  # near enough
        (lambda now: 0.5, range(1, 10)),  # a machine that became busy after the plan
        (lambda now: 0.02, range(1, 10)),
        (lambda now: 0.1 if now < 100 else 0.6, range(1, 10)),
        (lambda now: 0.1 if now < 430 else 0.6, range(1, 10)),  # shortly before the end
        (lambda now: 0.6 if 100 < now < 300 else 0.1, range(2, 20)),
        (lambda now: 1.0 if now % 60 < 3 else 0.1, range(20)),
    ],
)
def test_minutes_are_kept(seconds_per_step, revisions):
    clock = Clock()
    pace = Pace(Plan(4800, 0.1), 8.0, clock=clock)
    assert run_at_speed(pace, clock, seconds_per_step) in revisions
    assert clock.now == pytest.approx(480, rel=0.15)


def test_steps_of_a_gpu_are_judged_by_their_mean():
    """Nine of ten are only started, and the tenth waits for all."""
    clock, count = Clock(), iter(range(10**6))
    pace = Pace(Plan(4800, 0.1), 8.0, on_gpu=True, clock=clock)
    assert run_at_speed(pace, clock, lambda now: 0.91 if next(count) % 10 == 9 else 0.01) == 0
    assert clock.now == pytest.approx(480, rel=0.02)


def test_a_first_step_that_compiles_hardly_changes_the_plan():
    clock, first = Clock(), iter([60.0])
    pace = Pace(Plan(3000, 0.3), 15.0, on_gpu=True, clock=clock)
    assert run_at_speed(pace, clock, lambda now: next(first, 0.3)) <= 1
    assert pace.plan.steps == pytest.approx(3000, rel=0.1)


def test_an_evaluation_is_no_slow_step():
    clock = Clock()
    pace = Pace(Plan(4800, 0.1), 8.0, on_gpu=True, clock=clock)
    for step in range(1, 1001):
        clock.now += 0.1
        assert not (pace.due() and pace.revise(step))
        if step % 300 == 0:
            clock.now += 5.0
            pace.skip()


def test_a_resumed_run_has_the_minutes_that_are_left():
    clock = Clock()
    pace = Pace(Plan(4800, 0.1), 8.0, start_step=2400, seconds=300.0, clock=clock)  # 5 of 8 minutes are over
    run_at_speed(pace, clock, lambda now: 0.1, 2400)
    assert clock.now == pytest.approx(180, abs=48)


def test_epochs_are_never_revised():
    clock = Clock()
    pace = Pace(Plan(4800, 0.1), 0.0, clock=clock)
    assert run_at_speed(pace, clock, lambda now: 0.9) == 0
    assert pace.plan == Plan(4800, 0.1)


class SlowMethod(ToyMethod):
    def loss(self, batch, progress):
        self.first = getattr(self, "first", time.monotonic())
        time.sleep(0.02)
        return super().loss(batch, progress)


def test_a_run_that_becomes_slow_ends_in_time_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_module, "CHECK_SECONDS", (0.1, 0.2))
    method, plans = SlowMethod(), []
    config = TrainConfig(batch_size=4, precision="fp32", minutes=2 / 60)
    plan = trainer.fit(
        method, numbered_images(12), config, Plan(1000, 0.002), tmp_path, lambda encoder: {}, lambda encoder: None,
        record=plans.append,
    )  # fmt: skip
    assert time.monotonic() - method.first < 2.5
    assert plans
    assert plans[-1] == plan
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == plan.steps < 120
    assert "instead of" in "".join(capsys.readouterr())
