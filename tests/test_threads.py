"""The number of threads follows the cores that are free: on a simulated machine, whose clock the steps move on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from minissl.training import threads
from minissl.training.threads import Threads, cgroup_quota, usable_cores
from tests.benchmarks import busy

ROOT = Path(__file__).parent.parent

CPU = torch.device("cpu")


class Machine:
    """A machine of some cores, some of them busy: seconds of a step by its number of threads.

    A loop with more threads than there are free cores takes five times as long, as measured on two cores.
    """

    def __init__(self, monkeypatch, cores, busy=0, step_seconds=0.1):
        self.cores, self.busy, self.step_seconds, self.now = cores, busy, step_seconds, 0.0
        self.count, self.steps = cores, []
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.count)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "count", count))
        monkeypatch.setattr(threads, "usable_cores", lambda: cores)

    def seconds(self, count):
        free = max(1, self.cores - self.busy)
        return self.step_seconds * (5 if count > free else 1) / count**0.7

    def train(self, chooser, seconds):
        """Take steps for so long. Returns the images/s, against those with the best fixed number of threads."""
        end, start, steps = self.now + seconds, self.now, 0
        while self.now < end:
            with chooser.step():
                self.steps.append(self.count)
                self.now += self.seconds(self.count)
            steps += 1
        best = min(self.seconds(count) for count in range(1, self.cores + 1))
        return steps * best / (self.now - start)


@pytest.mark.parametrize(("cores", "busy", "best"), [(2, 0, 2), (2, 1, 1), (2, 4, 1), (8, 0, 8), (8, 4, 4), (8, 7, 1)])
def test_the_fastest_number_is_chosen_and_the_search_costs_little(monkeypatch, cores, busy, best):
    machine = Machine(monkeypatch, cores, busy)
    with Threads(0, CPU, clock=lambda: machine.now) as chooser:
        machine.train(chooser, 10)
        assert (chooser.settled, chooser.count) == (True, best)
        assert machine.train(chooser, 600) >= 0.9
        assert median(machine.steps) == best
    assert machine.count == cores  # as before


def test_a_process_that_comes_and_goes_is_noticed_and_said(monkeypatch):
    machine, lines = Machine(monkeypatch, 2), []
    with Threads(0, CPU, lines.append, lambda: machine.now) as chooser:
        machine.train(chooser, 20)
        assert (chooser.count, lines) == (2, [])
        machine.busy = 1
        machine.train(chooser, 10)
        assert (chooser.count, len(lines)) == (1, 1)
        machine.busy = 0
        machine.train(chooser, 70)
        assert (chooser.count, len(lines)) == (2, 2)


def test_a_context_within_itself_restores_the_number_of_before(monkeypatch):
    machine = Machine(monkeypatch, 2, busy=1)
    with Threads(0, CPU, clock=lambda: machine.now) as chooser:
        machine.train(chooser, 10)
        with chooser:
            machine.train(chooser, 10)
        assert machine.count == 1
    assert machine.count == 2


def test_a_step_that_renders_images_says_nothing_about_threads(monkeypatch):
    machine = Machine(monkeypatch, 2)
    seconds, calls = machine.seconds, iter(range(10**6))
    monkeypatch.setattr(machine, "seconds", lambda count: seconds(count) + 0.6 * (next(calls) % 5 == 0))
    with Threads(0, CPU, clock=lambda: machine.now) as chooser:
        machine.train(chooser, 10)
        assert chooser.count == 2


def test_long_steps_are_tried_once(monkeypatch):
    machine = Machine(monkeypatch, 16, step_seconds=60.0)
    with Threads(0, CPU, clock=lambda: machine.now) as chooser:
        machine.train(chooser, 1000)
        assert (chooser.settled, chooser.count, len(set(machine.steps[:4]))) == (True, 16, 4)
        assert machine.train(chooser, 20_000) >= 0.8


@pytest.mark.parametrize(("fixed", "device"), [(3, CPU), (0, torch.device("cuda"))])
def test_a_fixed_number_and_that_of_a_gpu_stay(monkeypatch, fixed, device):
    machine = Machine(monkeypatch, 2)
    with Threads(fixed, device, clock=lambda: machine.now) as chooser:
        machine.train(chooser, 5)
        machine.busy = 1
        machine.train(chooser, 100)
    assert set(machine.steps) == {fixed or 2}


def test_a_number_is_kept_once_code_is_compiled_for_it(monkeypatch):
    machine = Machine(monkeypatch, 2)
    with Threads(0, CPU, clock=lambda: machine.now) as chooser:
        machine.train(chooser, 5)
        chooser.fix()
        machine.busy, machine.steps = 1, []
        machine.train(chooser, 100)
    assert set(machine.steps) == {2}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_quota_of_control_groups(tmp_path):
    member = tmp_path / "cgroup"
    assert cgroup_quota(tmp_path / "fs", member) == math.inf
    member.write_text("0::/class/student\n")  # version 2
    assert cgroup_quota(tmp_path / "fs", member) == math.inf
    write(tmp_path / "fs/class/student", cpu__max="max 100000\n")
    write(tmp_path / "fs/class", cpu__max="150000 100000\n")  # a limit above it holds too
    assert cgroup_quota(tmp_path / "fs", member) == 1.5
    write(tmp_path / "fs/class/student", cpu__max="50000 100000\n")
    assert cgroup_quota(tmp_path / "fs", member) == 0.5
    write(tmp_path / "fs/class/student", cpu__max="damaged")
    assert cgroup_quota(tmp_path / "fs", member) == 1.5
    member.write_text("5:memory:/a\n4:cpu,cpuacct:/docker/x\n")  # version 1, in a container whose path is not mounted
    write(tmp_path / "fs/cpu,cpuacct", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    assert cgroup_quota(tmp_path / "fs", member) == 2.0
    write(tmp_path / "fs/cpu,cpuacct", cpu__cfs_quota_us="-1\n")
    assert cgroup_quota(tmp_path / "fs", member) == math.inf


def test_a_part_of_a_core_is_one_thread(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for quota, cores in ((0.5, 1), (1.5, 2), (math.inf, 2)):
        monkeypatch.setattr(threads, "cgroup_quota", lambda quota=quota: quota)
        assert usable_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_of_the_process_is_a_limit():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    code += "from minissl.training.threads import thread_limit; print(thread_limit())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_the_documentation_has_the_recorded_table():
    rates = json.loads((ROOT / "data/recorded/busy.json").read_text(encoding="utf-8"))
    assert busy.markdown_table(rates) in (ROOT / "docs/speed.md").read_text(encoding="utf-8")
