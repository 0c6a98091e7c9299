"""What a run shows and leaves behind: the bar, log.jsonl, checkpoints and evaluations, each in its time.

Numbers are read from the device about once a second, never every step, so that a GPU does not wait for the person.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

from minissl import checkpoint, parallel
from minissl.errors import InputError


class Every:
    """True once every so many seconds, for all processes at once."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self) -> bool:
        if not parallel.anyone(time.monotonic() - self.last >= self.seconds):
            return False
        self.last = time.monotonic()
        return True


class Log:
    """log.jsonl, a line of numbers at a time. When a run goes on, what was written after its checkpoint is dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step] if step else []
        if parallel.rank() == 0:
            checkpoint.write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def __call__(self, **numbers: float) -> None:
        if parallel.rank() == 0:
            with checkpoint.writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(numbers) + "\n")


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log.jsonl; one that a kill or a power cut left broken is left out, a missing file has none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


class Recorder:
    """Called after every step with the terms of the loss.

    Args:
        out: the run's folder.
        start, steps: the step the run goes on from, and its length.
        batch_size: images a step.
        watch: measures the encoder; called every `watch_minutes` and at the end.
        save: keeps everything at a step; called every `save_minutes` and at the end.
        look: says of the lines of the log so far what is wrong, as findings with a name; called after `watch`.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        steps: int,
        batch_size: int,
        watch: Callable[[], dict[str, float]],
        save: Callable[[int], None],
        watch_minutes: float,
        save_minutes: float,
        look: Callable[[list[dict[str, float]]], list],
    ):
        self.log = Log(out / "log.jsonl", start)
        self.steps, self.batch_size, self.watch, self.save = steps, batch_size, watch, save
        self.look, self.said = look, set()
        self.read, self.watched, self.saved = Every(1.0), Every(60 * watch_minutes), Every(60 * save_minutes)
        self.clock = (time.monotonic(), start)
        size = {"total": steps * batch_size, "initial": start * batch_size}
        self.bar = tqdm(
            **size, unit=" images", unit_scale=True, smoothing=0.05, mininterval=0.5, disable=parallel.rank() > 0
        )

    def __call__(self, step: int, terms: dict[str, Tensor], lr: float) -> None:
        self.bar.update(self.batch_size)
        last = step == self.steps
        if self.read() or last:
            numbers = self._numbers(terms, step)
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()})
            self.log(step=step, lr=lr, images_per_second=self._rate(step), **numbers)
        if self.watched() or last:
            found = self.watch()
            self.log(step=step, **found)
            self._write(f"step {step} of {self.steps}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
            self._say(self.look(read_log(self.log.path)))
            self.clock = (time.monotonic(), step)
        if self.saved() or last:
            self._numbers(terms, step)
            self.save(step)

    def _numbers(self, terms: dict[str, Tensor], step: int) -> dict[str, float]:
        """The terms, read from the device. What stops the run is the last line of its log."""
        numbers = {name: float(term) for name, term in terms.items()}
        if not math.isfinite(numbers["loss"]):
            self.log(step=step, **numbers)
        return finite(numbers, step)

    def _say(self, findings: list) -> None:
        """Each once."""
        for finding in findings:
            if finding.name not in self.said:
                self._write(str(finding))
        self.said |= {finding.name for finding in findings}

    def _write(self, text: str) -> None:
        if parallel.rank() == 0:
            self.bar.write(text)

    def _rate(self, step: int) -> float:
        (then, before), now = self.clock, time.monotonic()
        self.clock = (now, step)
        return round((step - before) * self.batch_size / max(now - then, 1e-9), 1)


def finite(numbers: dict[str, float], step: int) -> dict[str, float]:
    """The terms of a step. Raises InputError if the loss is no number."""
    if not math.isfinite(numbers["loss"]):
        raise InputError(
            f"The loss is {numbers['loss']} at step {step}; the last checkpoint is from before. "
            "Start again with a lower --lr, or with --precision fp32."
        )
    return numbers


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is noted and not raised: the step is finished, so that what is saved is whole. Twice raises."""
    asked = False

    def note(number, frame):
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
