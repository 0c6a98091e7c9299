"""Run the training loop, for every method and device::

    terms = method.loss(batch, progress)
    terms["loss"].backward()
    optimizer.step()
    method.after_step(progress)

The loop owns the optimizer, the learning rate and the weight decay. All random numbers depend on (seed, step) only, see
`sampler`, so a run that was killed continues from its last checkpoint. With a fixed number of steps (`epochs`) and of
threads, the result on a CPU is identical bit for bit.
"""

import copy
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minissl import distributed
from minissl.data.batch import Batch
from minissl.data.images import ImageDataset
from minissl.distributed import Loss
from minissl.methods.base import Method
from minissl.models.outputs import Encoder
from minissl.training import checkpoint
from minissl.training.config import TrainConfig
from minissl.training.device import (
    choose_precision,
    compile_encoders,
    enable_activation_checkpointing,
    memory_used,
    synchronize,
)
from minissl.training.logger import Logger, TrainingMonitor, defer_interrupt
from minissl.training.optimizers import LARS, clip_grad_per_tensor, param_groups, zero_encoder_grads
from minissl.training.plan import Pace, Plan
from minissl.training.sampler import check_batch_split, iterate_batches, seed_step
from minissl.training.schedules import cosine, warmup_cosine
from minissl.training.threads import Threads

PLAN_STEPS = 3  # measured to plan a run of some epochs
PLAN_STEPS_OF_MINUTES = 8  # measured where the number of steps depends on the time of each


def create_optimizer(method: Method, config: TrainConfig) -> torch.optim.Optimizer:
    """Create AdamW or LARS for the trainable parameters, in the groups of `param_groups`."""
    if config.optimizer == "lars":
        return LARS(param_groups(method), lr=config.lr)
    betas = (0.9, config.beta2)
    return torch.optim.AdamW(param_groups(method), lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def set_schedules(optimizer: torch.optim.Optimizer, config: TrainConfig, progress: float) -> float:
    """Set the learning rate and weight decay of a step.

    Args:
        optimizer: with the groups of `param_groups`.
        config: see TrainConfig.
        progress: fraction of the run that is done, in [0, 1].

    Returns:
        The learning rate of parameters whose "lr_scale" is 1.
    """
    lr, weight_decay = config.lr, config.weight_decay
    schedule_progress = progress / config.schedule_fraction
    if schedule_progress < 1 or config.schedule_fraction == 1:
        lr = warmup_cosine(0.0, config.lr, config.final_lr, schedule_progress, config.warmup_fraction)
        weight_decay = cosine(config.weight_decay, config.final_weight_decay, schedule_progress)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decay"]:
            group["weight_decay"] = weight_decay
    return lr


def training_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    progress: float,
    config: TrainConfig,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Compute the loss and its gradients for one batch, and take one optimizer step.

    Args:
        method: the method; it is changed.
        optimizer: from `create_optimizer`.
        batch: on the method's device.
        progress: fraction of the run that is done, in [0, 1].
        config: with its precision resolved.
        loss: the method's loss as `wrap_ddp` or `wrap_fsdp` returns it; None calls `method.loss`.

    Returns:
        The terms of the loss, averaged over all parts, of this process. They stay on the device, so that a GPU does
        not wait; `distributed.mean_terms` averages them over the processes.
    """
    set_schedules(optimizer, config, progress)
    bf16, part_terms = config.precision == "bf16", []
    optimizer.zero_grad(set_to_none=True)
    # An exception during the entry of an earlier autocast would leave the weights of that step in the cache.
    torch.clear_autocast_cache()
    for part in batch.split(config.grad_accum_steps) if config.grad_accum_steps > 1 else [batch]:
        with torch.autocast(batch.images.device.type, torch.bfloat16) if bf16 else nullcontext():
            terms = (loss or method.loss)(part, progress)
        (terms["loss"] / config.grad_accum_steps).backward()
        part_terms.append({name: term.detach() for name, term in terms.items()})
    if distributed.is_distributed() and not isinstance(loss, nn.Module):  # DDP and FSDP2 do it themselves
        distributed.average_gradients(method.parameters())
    if progress < config.freeze_encoder_fraction:
        zero_encoder_grads(method)
    if config.clip_grad:
        clip_grad_per_tensor([p for group in optimizer.param_groups for p in group["params"]], config.clip_grad)
    optimizer.step()
    method.after_step(progress)
    sums = {name: sum((terms[name] for terms in part_terms[1:]), term) for name, term in part_terms[0].items()}
    return {name: total / len(part_terms) for name, total in sums.items()}


def train_steps(
    method: Method,
    dataset: ImageDataset,
    config: TrainConfig,
    progress: Callable[[int], float],
    threads: Threads,
    *,
    start_step: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
    """Take a training step for each item that is requested, without end. This is the only training loop.

    Args:
        method: on its device; it is changed.
        dataset: training images.
        config: with its precision resolved.
        progress: maps the number of steps done before to the fraction of the run that is done, in [0, 1].
        threads: of the steps.
        start_step: number of steps that are done already.
        optimizer: None creates one.
        loss: as for `training_step`.

    Yields:
        The number of steps done, and the terms of the loss in this process by name, still on the device.
    """
    optimizer = optimizer or create_optimizer(method, config)
    device = next(method.parameters()).device
    batches = iterate_batches(dataset, config.batch_size, config.seed, start_step, device)
    for step in count(start_step):
        with threads.step():
            batch = next(batches)
            seed_step(config.seed, step)
            terms = training_step(method, optimizer, batch, progress(step), config, loss)
        yield step + 1, terms


def plan(method: Method, dataset: ImageDataset, config: TrainConfig, threads: Threads | None = None) -> Plan:
    """Measure a few steps of a copy of the method, and return the length and the cost of the run.

    Args:
        method: on its device; it is not changed.
        dataset: training images.
        config: with its precision resolved.
        threads: chooses the number of threads on these steps; None chooses for these steps alone.

    Returns:
        The number of steps for `config.minutes`, or else for `config.epochs`, with the median time of a step.
    """
    trial, device, seconds = copy.deepcopy(method), next(method.parameters()).device, []
    if config.activation_checkpointing:
        enable_activation_checkpointing(trial)
    least = PLAN_STEPS_OF_MINUTES if config.minutes else PLAN_STEPS
    with nullcontext(threads) if threads else Threads(config.threads, device) as threads:
        start = time.perf_counter()
        for step, _ in train_steps(trial, dataset, config, lambda step: 0.5, threads):
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            if step >= least and threads.settled:
                break
            start = time.perf_counter()
    # The first step warms up; where numbers of threads were tried, the steps with the fastest count.
    per_step = threads.seconds if math.isfinite(threads.seconds) else float(np.median(seconds[1:]))
    steps = config.minutes * 60 / per_step if config.minutes else config.epochs * (len(dataset) // config.batch_size)
    return Plan(max(1, round(steps)), per_step, memory_used(device), threads.count)


def learn(
    method: Method,
    dataset: ImageDataset,
    config: TrainConfig,
    steps: int,
    evaluate: Callable[[], dict[str, float]] = dict,
    eval_every: int = 0,
) -> list[dict[str, float]]:
    """Train a method in memory, without a run directory, as notebooks do.

    Args:
        method: on its device; it is prepared for the data set and changed.
        dataset: training images.
        config: its epochs, minutes, eval_minutes and save_minutes are not used.
        steps: length of the run.
        evaluate: returns metrics; called every `eval_every` steps, unless that is 0.

    Returns:
        For every step the terms of the loss, with the metrics of `evaluate` where it was called.
    """
    device = next(method.parameters()).device
    config = replace(config, precision=choose_precision(config.precision, device))
    method.prepare(dataset)
    method.train()  # an evaluation in between may have left it in evaluation mode, with frozen batch norms
    history: list[dict[str, Any]] = []
    with Threads(config.threads, device) as threads:
        for step, terms in islice(train_steps(method, dataset, config, Plan(steps).progress, threads), steps):
            history.append(distributed.mean_terms(terms))
            if eval_every and step % eval_every == 0:
                history[-1] |= evaluate()
    return [{name: float(term) for name, term in terms.items()} for terms in history]


class _Training:
    """The state of a run in its directory: method, optimizer, step, checkpoint.

    Args:
        method: the method; it is loaded from the checkpoint, if there is one, and wrapped for all processes.
        config: see TrainConfig.
        output_dir: the run directory.
        export: writes the encoder, with every checkpoint.
    """

    def __init__(self, method: Method, config: TrainConfig, output_dir: Path, export: Callable[[Encoder], None]):
        self.path = output_dir / "checkpoint.safetensors"
        self.method, self.export = method, export
        check_batch_split(method, config.batch_size, config.grad_accum_steps)
        tensors: dict[str, Tensor] = {}
        self.start_step, self.seconds = 0, 0.0
        if checkpoint.checkpoint_exists(self.path):
            tensors, info = checkpoint.load_method_state(self.path, method)
            self.start_step, self.seconds = info["step"], info.get("seconds", 0.0)
        shard = config.shard and distributed.is_distributed()
        self.unsharded = copy.deepcopy(method) if shard else method
        self.loss = distributed.wrap_fsdp(method) if shard else distributed.wrap_ddp(method)
        if config.activation_checkpointing:
            enable_activation_checkpointing(method)
        self.optimizer = create_optimizer(method, config)
        checkpoint.load_optimizer_state(tensors, self.optimizer)

    def gather(self) -> Method:
        """Return the method with all its weights; with FSDP2 all processes take part."""
        if self.unsharded is not self.method:
            distributed.gather_method(self.method, self.unsharded)
        return self.unsharded

    def save(self, step: int, seconds: float) -> None:
        """Write the checkpoint after so many steps and seconds of training, and the encoder."""
        info = {"step": step, "seconds": seconds}
        checkpoint.save_training_state(self.path, self.gather(), self.optimizer, info)
        self.save_encoder()

    def save_encoder(self) -> None:
        """Write the encoder, as of the last checkpoint."""
        if distributed.rank() == 0:
            self.export(self.unsharded.encoder)


def fit(
    method: Method,
    dataset: ImageDataset,
    config: TrainConfig,
    plan: Plan,
    output_dir: Path,
    evaluate: Callable[[Encoder], dict[str, float]],
    export: Callable[[Encoder], None],
    diagnose: Callable[[list[dict[str, float]], int], Sequence[Any]] = lambda lines, steps: [],
    loggers: Sequence[Logger] = (),
    threads: Threads | None = None,
    record: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """Train a method in a run directory, from its checkpoint if it has one.

    Args:
        method: on its device, prepared for the data set; it is changed.
        dataset: training images.
        config: with its precision resolved; with `minutes` the plan is revised to keep to them.
        plan: length of the run.
        output_dir: the run directory; log.jsonl and checkpoint.safetensors are written into it.
        evaluate: returns metrics of the encoder; called every `eval_minutes` and at the end.
        export: writes the encoder; called with every checkpoint.
        diagnose: returns findings (with `name`) from the lines of the log and the length of the run; called after each
            evaluation.
        loggers: receive the same metrics as log.jsonl.
        threads: of the steps; None chooses the number on the first ones.
        record: receives the plan when it is revised.

    Returns:
        The plan as it was at the end.

    Raises:
        InputError: if the loss is not finite, a checkpoint cannot be written, or a batch cannot be split.
        KeyboardInterrupt: after Ctrl-C, when the step is finished and saved.
    """
    training = _Training(method, config, output_dir, export)
    step = training.start_step
    if step >= plan.steps:
        training.save_encoder()  # the process may have been killed between the last checkpoint and its encoder
    device = next(method.parameters()).device
    threads = threads or Threads(config.threads, device)
    if config.compile:
        compile_encoders(method)
        threads.fix()
    pace = Pace(plan, config.minutes, step, training.seconds, on_gpu=device.type != "cpu")
    monitor = TrainingMonitor(
        output_dir, pace, config, lambda: evaluate(training.gather().encoder),
        lambda step: training.save(step, pace.seconds), record, diagnose, loggers,
    )  # fmt: skip
    threads.report = monitor.print
    loop = train_steps(
        method, dataset, config, lambda step: pace.plan.progress(step), threads,
        start_step=step, optimizer=training.optimizer, loss=training.loss,
    )  # fmt: skip
    with threads, closing(monitor), closing(loop), defer_interrupt() as interrupted:
        while step < pace.plan.steps:
            step, terms = next(loop)
            if monitor(step, terms, training.optimizer.param_groups[0]["lr"], interrupted()):
                raise KeyboardInterrupt
    return pace.plan
