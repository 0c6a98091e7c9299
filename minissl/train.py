"""The loop: every method, every device.

    terms = method.loss(batch, progress)
    terms["loss"].backward()
    optimizer.step()
    method.after_step(progress)

The loop owns the optimiser with its rate and weight decay, and the promise that nothing is lost. Chance is a function
of (seed, step) (`order`), so a run that was killed goes on from its last checkpoint: on a CPU to the same bits.
"""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from minissl import checkpoint, distribute, parallel
from minissl.machine import Plan, choose_precision, compile_encoders, memory_used, recompute, wait_for
from minissl.method import Batch
from minissl.optim import LARS, clip_gradients, param_groups, spare_encoder
from minissl.order import batches, check_parts, parts_of, seed_step
from minissl.record import Recorder, interruptible
from minissl.teacher import cosine, warmup_cosine


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, how careful.

    Args:
        epochs: passes over the images; used when minutes is 0.
        minutes: train for about this long instead; the number of steps is measured at the start and then kept.
        batch_size: images a step.
        optimizer: adamw, or lars for very large batches of a convolutional network.
        lr: learning rate at the end of the warm-up.
        final_lr: learning rate at the end of the run.
        warmup: share of the run in which the learning rate rises from 0.
        weight_decay: at the start; never on biases, norms and other vectors.
        final_weight_decay: at the end.
        heads_first: share of the run in which the encoder rests: new heads would undo one that has learnt before.
        cool: share of the run in which rate and decay move as said; then they are put back to lr and weight_decay.
        clip: largest norm of a single parameter's gradient, as DINO clips; 0 does not clip.
        precision: of the forward pass; auto takes bf16 where the hardware has it.
        shard: keep of every parameter, gradient and moment only a share in each process while training; see torchrun.
        compile: compile the encoders with torch.compile; the first steps then take a minute.
        accumulate: parts a batch is computed in, one after the other, to save memory, where the loss allows it.
        recompute: compute the blocks of a ViT once more for the gradient, to save memory; costs a forward pass more.
        seed: everything that is drawn, is drawn from it.
        watch_minutes: minutes between two k-NN evaluations.
        save_minutes: minutes between two checkpoints.
    """

    epochs: float = 100.0
    minutes: float = 0.0
    batch_size: int = 64
    optimizer: Literal["adamw", "lars"] = "adamw"
    lr: float = 5e-4
    final_lr: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    heads_first: float = 0.0
    cool: float = 1.0
    clip: float = 3.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shard: bool = False
    compile: bool = False
    accumulate: int = 1
    recompute: bool = False
    seed: int = 0
    watch_minutes: float = 2.0
    save_minutes: float = 1.0


def make_optimizer(method: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "lars":
        return LARS(param_groups(method), lr=config.lr)
    return torch.optim.AdamW(param_groups(method), lr=config.lr, fused=True)


def set_schedules(optimizer: torch.optim.Optimizer, config: TrainConfig, progress: float) -> float:
    """Set and return this step's learning rate, and set its weight decay."""
    lr, decay, moved = config.lr, config.weight_decay, progress / config.cool
    if moved < 1 or config.cool == 1:
        lr = warmup_cosine(0.0, config.lr, config.final_lr, moved, config.warmup)
        decay = cosine(config.weight_decay, config.final_weight_decay, moved)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
        if group["decay"]:
            group["weight_decay"] = decay
    return lr


def training_step(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    progress: float,
    config: TrainConfig,
    loss: Callable[[Batch, float], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """One step. Returns the terms of the loss, still on the device: reading them would make a GPU wait.

    With several processes `loss` is what `distribute.averaged` made of the method, and the terms are the mean of all.
    """
    set_schedules(optimizer, config, progress)
    bf16, found = config.precision == "bf16", []
    optimizer.zero_grad(set_to_none=True)
    torch.clear_autocast_cache()  # it holds an earlier step's weights if an error came just as autocast was entered
    for part in parts_of(batch, config.accumulate) if config.accumulate > 1 else [batch]:
        with torch.autocast(batch.images.device.type, torch.bfloat16) if bf16 else nullcontext():
            terms = (loss or method.loss)(part, progress)
        (terms["loss"] / config.accumulate).backward()
        found.append({name: term.detach() for name, term in terms.items()})
    spare_encoder(method, progress < config.heads_first)
    if config.clip:
        clip_gradients([p for group in optimizer.param_groups for p in group["params"]], config.clip)
    optimizer.step()
    method.after_step(progress)
    return distribute.mean_terms({name: sum(part[name] for part in found) / len(found) for name in found[0]})


def plan(method: nn.Module, data, config: TrainConfig) -> Plan:
    """Take a few steps on a throw-away copy, and say how long the run is and what it will take.

    Args:
        method: on its device; it is not changed.
        data, config: as for `batches`; with its precision resolved.
    """
    trial, device, seconds = copy.deepcopy(method), next(method.parameters()).device, []
    if config.recompute:
        recompute(trial)
    optimizer, source = make_optimizer(trial, config), batches(data, config.batch_size, config.seed, device=device)
    for _ in range(8 if config.minutes else 3):
        start = time.perf_counter()
        training_step(trial, optimizer, next(source), 0.5, config)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    each = float(np.median(seconds[1:]))  # the first step warms up
    steps = config.minutes * 60 / each if config.minutes else config.epochs * (len(data) // config.batch_size)
    return Plan(max(1, round(steps)), each, memory_used(device))


def learn(
    method: nn.Module,
    data,
    config: TrainConfig,
    steps: int,
    look: Callable[[], dict[str, float]] = dict,
    every: int = 0,
) -> list[dict[str, float]]:
    """Train for a few steps in memory, without a folder: what a notebook does.

    Args:
        method: on its device; it is changed.
        data, config: as for `batches`; how fast, not how long.
        steps: length of the run.
        look: measures something, `every` so many steps if that is not 0.

    Returns:
        For every step the terms of the loss, and what `look` saw after it.
    """
    device = next(method.parameters()).device
    config = replace(config, precision=choose_precision(config.precision, device))
    if hasattr(method, "prepare"):
        method.prepare(data)
    method.train()  # a look in between may have left it in evaluation mode, its batch norms frozen
    optimizer, history = make_optimizer(method, config), []
    for step, batch in zip(range(steps), batches(data, config.batch_size, config.seed, device=device)):
        seed_step(config.seed, step)
        history.append(training_step(method, optimizer, batch, step / steps, config))
        if every and (step + 1) % every == 0:
            history[-1] |= look()
    return [{name: float(term) for name, term in terms.items()} for terms in history]


def _begin(
    method: nn.Module, config: TrainConfig, path: Path
) -> tuple[Callable, torch.optim.Optimizer, nn.Module, int]:
    """The loss to ask, the optimiser, what is measured and saved, and the step a run stands at."""
    check_parts(method, config.batch_size, config.accumulate)
    found, info = checkpoint.load_method(path, method) if checkpoint.there(path) else ({}, {"step": 0})
    shard = config.shard and parallel.together()
    plain = copy.deepcopy(method) if shard else method
    loss = distribute.sharded(method) if shard else distribute.averaged(method)
    if config.recompute:
        recompute(method)
    optimizer = make_optimizer(method, config)
    checkpoint.load_optimizer(found, optimizer)
    return loss, optimizer, plain, info["step"]


def fit(
    method: nn.Module,
    data,
    config: TrainConfig,
    steps: int,
    out: Path,
    watch: Callable[[nn.Module], dict[str, float]],
    export: Callable[[nn.Module], None],
    look: Callable[[list[dict[str, float]]], list] = lambda lines: [],
) -> None:
    """Train, from the checkpoint in `out` if there is one.

    Args:
        method, data, config: as for `plan`; method is changed.
        steps, out: length of the run; its folder, for log.jsonl and checkpoint.safetensors.
        watch: measures the encoder, now and then.
        export: keeps the encoder, with every checkpoint.
        look: says what is wrong, from the lines of the log, whenever the encoder was measured.

    Raises:
        InputError: when the loss is not finite, a checkpoint cannot be written, or a batch cannot be shared out.
        KeyboardInterrupt: after Ctrl-C, when the step is finished and saved.
    """
    path = out / "checkpoint.safetensors"
    loss, optimizer, plain, start = _begin(method, config, path)

    def gathered() -> nn.Module:
        return method if plain is method else distribute.gather_method(method, plain)

    def save(step: int) -> None:
        checkpoint.save_training(path, gathered(), optimizer, {"step": step})
        if parallel.rank() == 0:
            export(plain.encoder)

    if start >= steps and parallel.rank() == 0:
        export(plain.encoder)  # a kill may have come between the last checkpoint and its encoder
    if config.compile:
        compile_encoders(method)
    record = Recorder(
        out, start, steps, config.batch_size, lambda: watch(gathered().encoder), save,
        config.watch_minutes, config.save_minutes, look,
    )  # fmt: skip
    with record.bar, interruptible() as interrupted:
        source = batches(data, config.batch_size, config.seed, start, next(method.parameters()).device)
        for step, batch in zip(range(start, steps), source):
            seed_step(config.seed, step)
            terms = training_step(method, optimizer, batch, step / steps, config, loss)
            record(step + 1, terms, optimizer.param_groups[0]["lr"])
            if parallel.anyone(interrupted()) and step + 1 < steps:
                save(step + 1)
                raise KeyboardInterrupt
