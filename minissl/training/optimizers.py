"""Define parameter groups, per-tensor gradient clipping, and the optimizer LARS.

As in DINO's code: weight decay applies to matrices and larger tensors only, and each gradient is clipped on its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minissl.methods.base import Method


def param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with weight decay (matrices and larger) and those without.

    Scalars have a group of their own, because FSDP2 cannot shard them. Parameters for which a method's
    `param_lr_scales` differ are in different groups.

    Returns:
        Groups for a torch optimizer; besides "params" each holds "lr_scale", the factor on its learning rate, and
        "decay", whether weight decay applies. The two groups with factor 1, of matrices and of vectors, always exist
        but may be empty.
    """
    lr_scales = module.param_lr_scales() if isinstance(module, Method) else {}
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            decay = p.ndim >= 2 and not name.endswith(".bias")
            groups.setdefault((lr_scales.get(name, 1.0), decay, p.ndim > 0), []).append(p)
    groups = groups | {key: groups.get(key, []) for key in ((1.0, True, True), (1.0, False, True))}
    return [
        {"params": params, "lr_scale": lr_scale, "decay": decay} | ({} if decay else {"weight_decay": 0.0})
        for (lr_scale, decay, _), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def zero_encoder_grads(method: nn.Module) -> None:
    """Clear the encoder's gradients, so that a step changes only the heads; its weight decay is skipped too."""
    for name, p in method.named_parameters():
        if "encoder." in name:
            p.grad = None


def clip_grad_per_tensor(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Scale each gradient whose L2 norm exceeds `max_norm` down to that norm, in place and each on its own."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1).unbind()))


class LARS(torch.optim.Optimizer):
    """Update parameters by SGD with a learning rate for each layer, for very large batches of a convolutional network.

    You et al., Large Batch Training of Convolutional Networks, 2017 (arXiv:1708.03888), as SimCLR uses it::

        g <- gradient + weight decay * w;  r = trust |w| / |g|;  v <- momentum v + lr r g;  w <- w - v.

    r is 1 for vectors (biases, norms), and where the norm of w or of g is 0.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        weight_decay: 0 for vectors, set in their group.
        momentum: of the velocity v; lr multiplies what is added to v.
        trust: trust coefficient, the norm of a step relative to the norm of the layer's weights.
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
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Update every parameter that has a gradient, without waiting for a GPU."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        grad = grad.add(p, alpha=group["weight_decay"])
        if p.ndim > 1:
            weight_norm, grad_norm = p.norm(), grad.norm()
            ratio = group["trust"] * weight_norm / grad_norm
            grad = grad * torch.where((weight_norm > 0) & (grad_norm > 0), ratio, 1.0)
        state = self.state[p]
        if not state:
            state["velocity"] = torch.zeros_like(p)
        state["velocity"].mul_(group["momentum"]).add_(grad, alpha=group["lr"])
        p.sub_(state["velocity"])
