"""What an optimiser is given, and one that torch does not have.

DINO's rules: what is a matrix or larger is decayed, vectors are not; each gradient is clipped on its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def param_groups(method: nn.Module) -> list[dict[str, Any]]:
    """What is decayed (matrices and larger) and what is not (biases, norms, vectors), as in DINO.

    A scalar has a group of its own: it is whole where all else may be dealt out to several processes. A method whose
    layers learn at different speeds says so by `rates()`: parameter's name -> factor on the rate.
    """
    rates, groups = method.rates() if hasattr(method, "rates") else {}, {}
    for name, p in method.named_parameters():
        if p.requires_grad:
            decay = p.ndim >= 2 and not name.endswith(".bias")
            groups.setdefault((rates.get(name, 1.0), decay, p.ndim > 0), []).append(p)
    groups = groups | {key: groups.get(key, []) for key in ((1.0, True, True), (1.0, False, True))}
    return [
        {"params": params, "rate": rate, "decay": decay} | ({} if decay else {"weight_decay": 0.0})
        for (rate, decay, _), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def spare_encoder(method: nn.Module, now: bool = True) -> None:
    """Forget the encoder's gradients, so that this step moves only what is on top of it."""
    for name, p in method.named_parameters() if now else ():
        if "encoder." in name:
            p.grad = None


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Shrink each gradient that is longer than `max_norm`, each on its own: not the norm of them all together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1).unbind()))


class LARS(torch.optim.Optimizer):
    """SGD whose step is measured by the layer it moves, for very large batches of a convolutional network.

    You et al., Large Batch Training of Convolutional Networks, 2017 (arXiv:1708.03888), as SimCLR uses it:

    g <- gradient + weight decay * w;  r = trust |w| / |g|;  v <- momentum v + lr r g;  w <- w - v.

    where r is 1 for vectors (biases, norms), and where |w| or |g| is 0.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        weight_decay: 0 for vectors, by their groups.
        momentum: of v; the rate multiplies what is added to it.
        trust: how far a layer may move, as a share of its own length.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient; nothing is read back from the device."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                if p.ndim > 1:
                    long, steep = p.norm(), gradient.norm()
                    ratio = group["trust"] * long / steep
                    gradient = gradient * torch.where((long > 0) & (steep > 0), ratio, 1.0)
                state = self.state[p]
                if not state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].mul_(group["momentum"]).add_(gradient, alpha=group["lr"])
                p.sub_(state["velocity"])
