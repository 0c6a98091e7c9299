"""Schedules over a run, parameter groups and optimizer steps, compared with the libraries."""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from minissl.models.layers import layer_lr_scales
from minissl.training.optimizers import LARS, clip_grad_per_tensor, param_groups
from minissl.training.schedules import cosine, linear, warmup_cosine
from tests.parity.ledger import RandomInputs, Sides, comparison
from tests.parity.losses import lightly
from tests.parity.networks import random_vit, timm_config


@comparison("cosine schedule", "lightly", cosine)
def _(rng: RandomInputs) -> Sides:
    steps, start, end = rng.integer(2, 60), rng.number(-1, 1), rng.number(-1, 1)
    reference = lightly("utils.scheduler").cosine_schedule
    return Sides(
        lambda: torch.tensor([cosine(start, end, i / (steps - 1)) for i in range(steps)], dtype=torch.float64),
        lambda: torch.tensor([reference(i, steps, start, end) for i in range(steps)], dtype=torch.float64),
    )


@comparison("linear schedule, then constant", "numpy", linear)
def _(rng: RandomInputs) -> Sides:
    start, end, until = rng.number(-1, 1), rng.number(-1, 1), rng.number(0.1, 1)
    progress = [i / 40 for i in range(41)]
    return Sides(
        lambda: torch.tensor([linear(start, end, x, until) for x in progress], dtype=torch.float64),
        lambda: torch.from_numpy(np.interp(progress, [0, until], [start, end])),
    )


@comparison("warmup and cosine schedule", "timm", warmup_cosine, slow=True)
def _(rng: RandomInputs) -> Sides:
    from timm.scheduler import CosineLRScheduler

    warmup, steps = rng.integer(1, 9), rng.integer(10, 50)
    start, peak, end = rng.number(0, 0.1), rng.number(0.5, 1), rng.number(0, 0.1)

    def actual() -> Tensor:
        rates = [warmup_cosine(start, peak, end, i / steps, warmup / steps) for i in range(steps)]
        return torch.tensor(rates, dtype=torch.float64)

    def expected() -> Tensor:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        options = {"lr_min": end, "warmup_t": warmup, "warmup_lr_init": start, "warmup_prefix": True}
        schedule, rates = CosineLRScheduler(optimizer, t_initial=steps - warmup, **options), []
        for i in range(steps):
            schedule.step(i)
            rates.append(optimizer.param_groups[0]["lr"])
        return torch.tensor(rates, dtype=torch.float64)

    return Sides(actual, expected)


@comparison("parameter groups with weight decay", "timm", param_groups, slow=True)
def _(rng: RandomInputs) -> Sides:
    from timm.optim import param_groups_weight_decay

    encoder, decay = random_vit(rng, num_registers=rng.integer(0, 2), layer_scale_init=1.0), rng.number(0.01, 0.1)
    encoder.scale = nn.Parameter(torch.tensor(1.0))

    def decay_by_parameter(groups: list[dict]) -> Tensor:
        decays = {id(p): group.get("weight_decay", decay) for group in groups for p in group["params"]}
        return torch.tensor([decays[id(p)] for p in encoder.parameters()])

    return Sides(
        lambda: decay_by_parameter(param_groups(encoder)),
        lambda: decay_by_parameter(param_groups_weight_decay(encoder, decay)),
    )


@comparison("layer-wise learning-rate decay", "timm", layer_lr_scales, slow=True)
def _(rng: RandomInputs) -> Sides:
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    encoder, decay = random_vit(rng), rng.number(0.3, 0.95)
    reference = VisionTransformer(**timm_config(encoder))

    def expected() -> Tensor:
        groups = param_groups_layer_decay(reference, layer_decay=decay)
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        names = dict(reference.named_parameters())
        return torch.tensor([scales[id(names[name])] for name, _ in encoder.named_parameters()], dtype=torch.float64)

    return Sides(lambda: torch.tensor(list(layer_lr_scales(encoder, decay).values()), dtype=torch.float64), expected)


@comparison("gradient clipping per tensor", "torch", clip_grad_per_tensor, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    max_norm = rng.number(0.5, 3)
    shapes = [(rng.integer(1, 5), rng.integer(1, 5)) for _ in range(rng.integer(2, 5))]
    gradients = [rng.normal(*shape, scale=rng.choice(0.1, 1.0)) for shape in shapes]

    def with_gradients() -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for p, g in zip(parameters, gradients):
            p.grad = g.clone()
        return parameters

    first, second = with_gradients(), with_gradients()

    def actual() -> list[Tensor]:
        clip_grad_per_tensor(first, max_norm)
        return [p.grad for p in first]

    def expected() -> list[Tensor]:
        for p in second:
            nn.utils.clip_grad_norm_([p], max_norm)
        return [p.grad for p in second]

    return Sides(actual, expected)


def take_steps(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]
) -> list[Tensor]:
    """Return the parameters after each step."""
    history = []
    for step in gradients:
        for p, g in zip(parameters, step):
            p.grad = g.clone()
        optimizer.step()
        history += [p.detach().clone() for p in parameters]
    return history


def random_parameters(rng: RandomInputs, steps: int) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    """Sample a matrix and a vector, and their gradients in each step."""
    parameters = [
        nn.Parameter(rng.normal(rng.integer(2, 6), rng.integer(2, 6))),
        nn.Parameter(rng.normal(rng.integer(2, 6))),
    ]
    return parameters, [[rng.normal(*p.shape) for p in parameters] for _ in range(steps)]


@comparison("LARS without weight decay", "lightly", LARS, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """lightly computes a layer's trust ratio only with weight decay, so it gets one too small to have an effect."""
    parameters, gradients = random_parameters(rng, 4)
    lr, momentum, trust = rng.number(0.1, 1), rng.number(0.5, 0.95), rng.number(1e-3, 1e-1)
    copies, tiny_decay = copy.deepcopy(parameters), 1e-300 if rng.dtype == torch.float64 else 1e-30
    options = {"lr": lr, "momentum": momentum}
    optimizer = LARS([{"params": [p], "weight_decay": 0.0} for p in parameters], **options, trust=trust)
    groups = [{"params": [copies[0]], "weight_decay": tiny_decay}, {"params": [copies[1]], "weight_decay": 0.0}]
    reference = lightly("utils.lars").LARS(groups, **options, trust_coefficient=trust, eps=0.0)
    return Sides(lambda: take_steps(optimizer, parameters, gradients), lambda: take_steps(reference, copies, gradients))


@comparison("LARS with weight decay and a changing learning rate", "explicit loop", LARS, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    parameters, gradients = random_parameters(rng, 4)
    lr, momentum, trust = rng.number(0.1, 1), rng.number(0.5, 0.95), rng.number(1e-3, 1e-1)
    decay = rng.number(0.01, 0.5)
    initial = [p.detach().clone() for p in parameters]
    groups = [{"params": [parameters[0]], "weight_decay": decay}, {"params": [parameters[1]]}]
    optimizer = LARS(groups, lr=lr, momentum=momentum, trust=trust)

    def actual() -> list[Tensor]:
        history = []
        for step, step_gradients in enumerate(gradients):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5**step
            history += take_steps(optimizer, parameters, [step_gradients])
        return history

    def norm(x: list[float]) -> float:
        return math.sqrt(sum(number**2 for number in x))

    def expected() -> list[Tensor]:
        weights = [w.flatten().tolist() for w in initial]
        velocities, history = [[0.0] * w.numel() for w in initial], []
        for step, step_gradients in enumerate(gradients):
            for i, (start, g) in enumerate(zip(initial, step_gradients)):
                layer_decay = decay if i == 0 else 0.0
                g = [a + layer_decay * w for a, w in zip(g.flatten().tolist(), weights[i])]
                ratio = trust * norm(weights[i]) / norm(g) if i == 0 else 1.0
                velocities[i] = [momentum * v + lr * 0.5**step * ratio * a for v, a in zip(velocities[i], g)]
                weights[i] = [w - v for w, v in zip(weights[i], velocities[i])]
                history.append(torch.tensor(weights[i], dtype=torch.float64).view_as(start))
        return history

    return Sides(actual, expected)
