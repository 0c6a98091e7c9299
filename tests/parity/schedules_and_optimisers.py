"""Schedules over a whole run, what a group of parameters gets, and the steps of optimisers, beside the libraries'."""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from minissl.optim import LARS, clip_gradients, param_groups
from minissl.teacher import cosine, linear, warmup_cosine
from minissl.transformer import layer_rates
from tests.parity.ledger import Draw, Sides, compared
from tests.parity.losses import lightly
from tests.parity.networks import our_vit, sizes


@compared("a cosine", "lightly", cosine)
def _(draw: Draw) -> Sides:
    steps, start, end = draw.whole(2, 60), draw.real(-1, 1), draw.real(-1, 1)
    theirs = lightly("utils.scheduler").cosine_schedule
    return Sides(
        lambda: torch.tensor([cosine(start, end, i / (steps - 1)) for i in range(steps)], dtype=torch.float64),
        lambda: torch.tensor([theirs(i, steps, start, end) for i in range(steps)], dtype=torch.float64),
    )


@compared("a line, then constant", "numpy", linear)
def _(draw: Draw) -> Sides:
    start, end, until = draw.real(-1, 1), draw.real(-1, 1), draw.real(0.1, 1)
    progress = [i / 40 for i in range(41)]
    return Sides(
        lambda: torch.tensor([linear(start, end, x, until) for x in progress], dtype=torch.float64),
        lambda: torch.from_numpy(np.interp(progress, [0, until], [start, end])),
    )


@compared("a warm-up and a cosine", "timm", warmup_cosine, slow=True)
def _(draw: Draw) -> Sides:
    from timm.scheduler import CosineLRScheduler

    warm, steps = draw.whole(1, 9), draw.whole(10, 50)
    start, peak, end = draw.real(0, 0.1), draw.real(0.5, 1), draw.real(0, 0.1)

    def theirs() -> Tensor:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        options = {"lr_min": end, "warmup_t": warm, "warmup_lr_init": start, "warmup_prefix": True}
        schedule, found = CosineLRScheduler(optimizer, t_initial=steps - warm, **options), []
        for i in range(steps):
            schedule.step(i)
            found.append(optimizer.param_groups[0]["lr"])
        return torch.tensor(found, dtype=torch.float64)

    def ours() -> Tensor:
        found = [warmup_cosine(start, peak, end, i / steps, warm / steps) for i in range(steps)]
        return torch.tensor(found, dtype=torch.float64)

    return Sides(ours, theirs)


@compared("which parameters decay", "timm", param_groups, slow=True)
def _(draw: Draw) -> Sides:
    from timm.optim import param_groups_weight_decay

    network, decay = our_vit(draw, registers=draw.whole(0, 2), layer_scale=1.0), draw.real(0.01, 0.1)
    network.scale = nn.Parameter(torch.tensor(1.0))

    def per_parameter(groups: list[dict]) -> Tensor:
        decays = {id(p): group.get("weight_decay", decay) for group in groups for p in group["params"]}
        return torch.tensor([decays[id(p)] for p in network.parameters()])

    return Sides(
        lambda: per_parameter(param_groups(network)), lambda: per_parameter(param_groups_weight_decay(network, decay))
    )


@compared("how fast each layer learns", "timm", layer_rates, slow=True)
def _(draw: Draw) -> Sides:
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    ours, decay = our_vit(draw), draw.real(0.3, 0.95)
    theirs = VisionTransformer(**sizes(ours))

    def right() -> Tensor:
        groups = param_groups_layer_decay(theirs, layer_decay=decay)
        rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        names = dict(theirs.named_parameters())
        return torch.tensor([rates[id(names[name])] for name, _ in ours.named_parameters()], dtype=torch.float64)

    return Sides(lambda: torch.tensor(list(layer_rates(ours, decay).values()), dtype=torch.float64), right)


@compared("each gradient clipped by itself", "torch", clip_gradients, fp32=1e-5)
def _(draw: Draw) -> Sides:
    most, shapes = draw.real(0.5, 3), [(draw.whole(1, 5), draw.whole(1, 5)) for _ in range(draw.whole(2, 5))]
    gradients = [draw.normal(*shape, scale=draw.one_of(0.1, 1.0)) for shape in shapes]

    def given() -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for p, g in zip(parameters, gradients):
            p.grad = g.clone()
        return parameters

    first, second = given(), given()

    def ours() -> list[Tensor]:
        clip_gradients(first, most)
        return [p.grad for p in first]

    def theirs() -> list[Tensor]:
        for p in second:
            nn.utils.clip_grad_norm_([p], most)
        return [p.grad for p in second]

    return Sides(ours, theirs)


def descend(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]
) -> list[Tensor]:
    """The parameters after each of some steps."""
    seen = []
    for step in gradients:
        for p, g in zip(parameters, step):
            p.grad = g.clone()
        optimizer.step()
        seen += [p.detach().clone() for p in parameters]
    return seen


def drawn(draw: Draw, steps: int) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    """A matrix and a vector, and their gradients."""
    parameters = [
        nn.Parameter(draw.normal(draw.whole(2, 6), draw.whole(2, 6))),
        nn.Parameter(draw.normal(draw.whole(2, 6))),
    ]
    return parameters, [[draw.normal(*p.shape) for p in parameters] for _ in range(steps)]


@compared("LARS without decay", "lightly", LARS, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Theirs asks for a decay to measure a layer at all, so it gets one too small to be felt."""
    parameters, gradients = drawn(draw, 4)
    lr, momentum, trust = draw.real(0.1, 1), draw.real(0.5, 0.95), draw.real(1e-3, 1e-1)
    others, least = copy.deepcopy(parameters), 1e-300 if draw.dtype == torch.float64 else 1e-30
    options = {"lr": lr, "momentum": momentum}
    ours = LARS([{"params": [p], "weight_decay": 0.0} for p in parameters], **options, trust=trust)
    groups = [{"params": [others[0]], "weight_decay": least}, {"params": [others[1]], "weight_decay": 0.0}]
    theirs = lightly("utils.lars").LARS(groups, **options, trust_coefficient=trust, eps=0.0)
    return Sides(lambda: descend(ours, parameters, gradients), lambda: descend(theirs, others, gradients))


@compared("LARS with decay and a changing rate", "a loop", LARS, fp32=1e-5)
def _(draw: Draw) -> Sides:
    parameters, gradients = drawn(draw, 4)
    lr, momentum, trust, decay = draw.real(0.1, 1), draw.real(0.5, 0.95), draw.real(1e-3, 1e-1), draw.real(0.01, 0.5)
    starts = [p.detach().clone() for p in parameters]
    groups = [{"params": [parameters[0]], "weight_decay": decay}, {"params": [parameters[1]]}]
    optimizer = LARS(groups, lr=lr, momentum=momentum, trust=trust)

    def ours() -> list[Tensor]:
        seen = []
        for step, now in enumerate(gradients):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5**step
            seen += descend(optimizer, parameters, [now])
        return seen

    def length(x: list[float]) -> float:
        return math.sqrt(sum(number**2 for number in x))

    def theirs() -> list[Tensor]:
        weights, moves, seen = [w.flatten().tolist() for w in starts], [[0.0] * w.numel() for w in starts], []
        for step, now in enumerate(gradients):
            for i, (start, g) in enumerate(zip(starts, now)):
                shrink = decay if i == 0 else 0.0
                g = [a + shrink * w for a, w in zip(g.flatten().tolist(), weights[i])]
                ratio = trust * length(weights[i]) / length(g) if i == 0 else 1.0
                moves[i] = [momentum * v + lr * 0.5**step * ratio * a for v, a in zip(moves[i], g)]
                weights[i] = [w - v for w, v in zip(weights[i], moves[i])]
                seen.append(torch.tensor(weights[i], dtype=torch.float64).view_as(start))
        return seen

    return Sides(ours, theirs)
