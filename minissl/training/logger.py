"""Log a run while it trains: progress bar, log.jsonl, evaluations and checkpoints.

Values are read from the device about once a second, not at every step, so that a GPU does not wait.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm.auto import tqdm

from minissl import distributed
from minissl.errors import InputError
from minissl.training import checkpoint
from minissl.training.config import TrainConfig
from minissl.training.plan import Pace, Plan


class Logger(Protocol):
    """Receive the metrics of a run: the protocol of all loggers. Only the first process calls it."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics by name after `step` steps: of training if "loss" is one of them, else of an evaluation."""

    def close(self) -> None:
        """Release what the logger holds; called once, also after an error."""


class JsonLinesLogger:
    """Write log.jsonl, one JSON object per line. A resumed run drops the lines after its checkpoint.

    Args:
        path: the file.
        step: the step at which the run starts; later lines in the file are dropped.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = [line for line in read_log(path) if line["step"] <= step] if step else []
        if distributed.rank() == 0:
            checkpoint.write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line. Raises InputError if the file cannot be written."""
        if distributed.rank() == 0:
            with checkpoint.report_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | metrics) + "\n")

    def close(self) -> None:
        """Do nothing: every line is on the disk already."""


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the lines of a log.jsonl. Lines damaged by a kill or power failure are skipped; a missing file gives []."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


class Interval:
    """Tell when an interval has passed since it was last started.

    Args:
        seconds: length of the interval.
    """

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        """Return whether the interval has passed."""
        return time.monotonic() - self.last >= self.seconds

    def restart(self) -> None:
        """Start the interval anew."""
        self.last = time.monotonic()


class TrainingMonitor:
    """Log, evaluate, save and keep to the plan when it is due; called after every step, in all processes.

    Terms of the loss are logged about once a second.

    Args:
        output_dir: the run directory.
        pace: the plan of the run, at the step from which it continues.
        config: its batch_size, eval_minutes and save_minutes are used.
        evaluate: returns metrics of the encoder by name; called every `eval_minutes` and at the end.
        save: writes the checkpoint of a step; called every `save_minutes` and at the end.
        record: receives the plan when it is revised.
        diagnose: returns findings (with `name`) from the lines of the log and the length of the run; called after
            `evaluate`.
        loggers: receive the same metrics as log.jsonl.
    """

    def __init__(
        self,
        output_dir: Path,
        pace: Pace,
        config: TrainConfig,
        evaluate: Callable[[], dict[str, float]],
        save: Callable[[int], None],
        record: Callable[[Plan], None],
        diagnose: Callable[[list[dict[str, float]], int], Sequence[Any]],
        loggers: Sequence[Logger] = (),
    ):
        self.log_path = output_dir / "log.jsonl"
        self.loggers: list[Logger] = [JsonLinesLogger(self.log_path, pace.last_step), *loggers]
        self.pace, self.batch_size, self.evaluate, self.save = pace, config.batch_size, evaluate, save
        self.record, self.diagnose, self.reported = record, diagnose, set[str]()
        self.intervals = [Interval(s) for s in (1.0, 60 * config.eval_minutes, 60 * config.save_minutes)]
        self.last_time, self.last_step = time.monotonic(), pace.last_step
        self.bar = tqdm(
            total=pace.plan.steps * self.batch_size, initial=pace.last_step * self.batch_size, unit=" images",
            unit_scale=True, smoothing=0.05, mininterval=0.5, disable=distributed.rank() > 0,
        )  # fmt: skip

    def __call__(self, step: int, terms: dict[str, Tensor], lr: float, interrupted: bool = False) -> bool:
        """Do what is due after `step` steps.

        Args:
            step: number of steps done.
            terms: scalars of the last step in this process by name, still on the device.
            lr: learning rate of the last step.
            interrupted: whether the run shall be saved and stopped.

        Returns:
            Whether the run was interrupted in any process before its last step, and is saved.

        Raises:
            InputError: if the loss is not finite when it is read, or a file cannot be written.
        """
        self.bar.update(self.batch_size)
        flags = [interval.due() for interval in self.intervals]
        log, evaluate, save, revise, stop = distributed.any_process(*flags, self.pace.due(), interrupted)
        if revise and self.pace.revise(step):
            self._tell_revision()
            self.pace.skip()
        last = step == self.pace.plan.steps
        actions = (self._log_terms, log), (self._evaluate, evaluate), (self._save, save or stop)
        for interval, (action, is_due) in zip(self.intervals, actions):
            if is_due or last:
                interval.restart()
                action(step, terms, lr)
        if evaluate or save:
            self.pace.skip()
        return stop and not last

    def _log_terms(self, step: int, terms: dict[str, Tensor], lr: float) -> None:
        values = self._read(terms, step)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        self._log(step, {"lr": lr, "images_per_second": self._images_per_second(step), **values})

    def _evaluate(self, step: int, *unused: Any) -> None:
        metrics, steps = self.evaluate(), self.pace.plan.steps
        self._log(step, metrics)
        self.print(f"step {step} of {steps}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
        self._report(self.diagnose(read_log(self.log_path), steps))
        self.last_time, self.last_step = time.monotonic(), step

    def _save(self, step: int, terms: dict[str, Tensor], lr: float) -> None:
        self._read(terms, step)
        self.save(step)

    def _tell_revision(self) -> None:
        """Record the revised plan, and say so."""
        plan = self.pace.plan
        self.record(plan)
        self.print(f"{plan.steps} steps now instead of {plan.revisions[-1][1]}, to keep to the minutes asked for.")
        self.bar.total = plan.steps * self.batch_size
        self.bar.refresh()

    def close(self) -> None:
        """Close the bar and all loggers."""
        self.bar.close()
        for logger in self.loggers:
            logger.close()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if distributed.rank() == 0:
            for logger in self.loggers:
                logger.log(step, metrics)

    def _read(self, terms: dict[str, Tensor], step: int) -> dict[str, float]:
        """Read the terms from the device. A loss that is not finite becomes the last line of the log."""
        values = {name: float(term) for name, term in distributed.mean_terms(terms).items()}
        if not math.isfinite(values["loss"]):
            self._log(step, values)
        return check_finite(values, step)

    def _report(self, findings: Sequence[Any]) -> None:
        """Print each finding once."""
        for finding in findings:
            if finding.name not in self.reported:
                self.print(str(finding))
        self.reported |= {finding.name for finding in findings}

    def print(self, text: str) -> None:
        """Print a line above the bar, in the first process."""
        if distributed.rank() == 0:
            self.bar.write(text)

    def _images_per_second(self, step: int) -> float:
        """Return the images per second since the last call or evaluation."""
        now = time.monotonic()
        images, seconds = (step - self.last_step) * self.batch_size, now - self.last_time
        self.last_time, self.last_step = now, step
        return round(images / max(seconds, 1e-9), 1)


def check_finite(values: dict[str, float], step: int) -> dict[str, float]:
    """Return the terms of a step unchanged. Raises InputError if "loss" is not finite."""
    if not math.isfinite(values["loss"]):
        raise InputError(
            f"The loss is {values['loss']} at step {step}; the last checkpoint is from before. "
            "Start again with a lower --lr, or with --precision fp32."
        )
    return values


@contextmanager
def defer_interrupt() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C instead of raising it, so that the current step is finished and saved. A second Ctrl-C raises.

    Yields:
        A function that returns whether Ctrl-C was pressed; always False in a thread other than the main one.
    """
    interrupted = False

    def note(number: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous_handler = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous_handler)
