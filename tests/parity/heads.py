"""Heads, transformer blocks and EMA teachers, compared with lightly and torch: equal weights, values and gradients."""

import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.methods.simclr import ProjectionHead
from minissl.models.ema import EMATeacher
from minissl.models.heads import DINOHead
from minissl.models.layers import Attention, Block, Mlp, SwiGLU, attention
from tests.parity.ledger import RandomInputs, Sides, comparison
from tests.parity.losses import lightly
from tests.parity.networks import bind_weights


def dino_head_sizes(rng: RandomInputs) -> tuple[int, int, int, int]:
    """Sample the width of the input, the number of prototypes, and the widths of hidden layers and bottleneck."""
    return rng.integer(4, 20), rng.integer(4, 30), rng.integer(8, 20), rng.integer(4, 9)


@comparison("DINO head", "lightly", DINOHead, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """lightly's prototypes have a separate norm, which is 1."""
    b, (dim, k, hidden_dim, out) = rng.integer(2, 9), dino_head_sizes(rng)
    head, x = rng.randomize(DINOHead(dim, k, hidden_dim, out)), rng.leaf(b, dim)
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of torch's deprecated weight norm
        reference = lightly("models.modules.heads").DINOProjectionHead(dim, hidden_dim, out, k).to(rng.dtype)
    names = {"mlp.6": "layers.4", "mlp.3": "layers.2", "mlp.0": "layers.0", "last_layer.weight": "last_layer.weight_v"}
    reference = bind_weights(reference, dict(head.named_parameters()), names, unused=("weight_g",))
    return Sides(lambda: head(x), lambda: reference(x), [x, *head.parameters()])


@comparison("DINO head with batch norm, prototypes frozen", "torch", DINOHead, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """A bias before a batch norm has no effect, and so no gradient."""
    b, (dim, k, hidden_dim, out) = rng.integer(8, 20), dino_head_sizes(rng)
    head, x = rng.randomize(DINOHead(dim, k, hidden_dim, out, use_bn=True)), rng.leaf(b, dim)
    state = dict(head.named_parameters())

    def batch_norm(z: Tensor) -> Tensor:
        return (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()

    def expected() -> Tensor:
        z = x
        for i in (0, 3):
            z = F.linear(z, state[f"mlp.{i}.weight"], state[f"mlp.{i}.bias"])
            z = F.gelu(batch_norm(z) * state[f"mlp.{i + 1}.weight"] + state[f"mlp.{i + 1}.bias"])
        z = batch_norm(F.linear(z, state["mlp.6.weight"], state["mlp.6.bias"]))
        prototypes = head.last_layer.weight.detach()
        return torch.stack([F.cosine_similarity(z, prototype[None]) for prototype in prototypes], 1)

    without_gradient = ("mlp.0.bias", "mlp.3.bias", "mlp.6.bias", "last_layer.weight")
    parameters = [p for name, p in state.items() if name not in without_gradient]
    return Sides(lambda: head(x, freeze_last_layer=True), expected, [x, *parameters])


@comparison("DINOv3 head, prototypes not normalized", "torch", DINOHead, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, (dim, k, hidden_dim, out) = rng.integer(2, 9), dino_head_sizes(rng)
    head = rng.randomize(DINOHead(dim, k, hidden_dim, out, normalize_prototypes=False))
    x, state = rng.leaf(b, dim), dict(head.named_parameters())
    layers = (
        nn.Linear(dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, out),
    )
    weights = {name.removeprefix("mlp."): p for name, p in state.items() if "mlp" in name}
    reference = bind_weights(nn.Sequential(*layers).to(rng.dtype), weights, {"6.": "4.", "3.": "2."})

    def expected() -> Tensor:
        z = reference(x)
        return z / z.square().sum(-1, keepdim=True).sqrt() @ state["last_layer.weight"].T

    return Sides(lambda: head(x), expected, [x, *head.parameters()])


@comparison("SimCLR projection head", "lightly", ProjectionHead, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """The last batch norm of minissl has a bias that is never trained, and so is 0."""
    b, dim, hidden_dim, out = rng.integer(8, 20), rng.integer(4, 20), rng.integer(4, 20), rng.integer(2, 9)
    num_layers = rng.integer(2, 3)
    head, x = rng.randomize(ProjectionHead(dim, hidden_dim, out, num_layers)), rng.leaf(b, dim)
    module = lightly("models.modules.heads").SimCLRProjectionHead(dim, hidden_dim, out, num_layers).to(rng.dtype)
    reference = bind_weights(module, dict(head.named_parameters()), {})
    return Sides(lambda: head(x), lambda: reference(x), [x, *(p for p in head.parameters() if p.requires_grad)])


@comparison("transformer block, causal or not", "torch", Block, Attention, Mlp, attention, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    heads, t, causal = rng.choice(1, 2, 4), rng.integer(2, 9), rng.choice(True, False)
    eps = rng.number(1e-6, 1e-2)
    dim = heads * rng.integer(8, 12)
    block, x = rng.randomize(Block(dim, heads, causal=causal, eps=eps)), rng.leaf(rng.integer(1, 3), t, dim)
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", eps, batch_first=True, norm_first=True)
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}
    reference = bind_weights(layer.to(rng.dtype), dict(block.named_parameters()), names)
    mask = torch.full((t, t), -torch.inf, dtype=rng.dtype).triu(1) if causal else None
    return Sides(lambda: block(x), lambda: reference(x, mask, is_causal=causal), [x, *block.parameters()])


@comparison("attention over a long sequence", "explicit loop", attention, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    t, d, causal = rng.choice(20, 260), rng.integer(2, 5), rng.choice(True, False)
    q, k, v = (rng.leaf(1, 1, t, d) for _ in range(3))

    def expected() -> Tensor:
        rows = []
        for i in range(t):
            end = i + 1 if causal else t
            weights = ((k[0, 0, :end] * q[0, 0, i]).sum(-1) / math.sqrt(d)).exp()
            rows.append((weights[:, None] * v[0, 0, :end]).sum(0) / weights.sum())
        return torch.stack(rows)[None, None]

    return Sides(lambda: attention(q, k, v, causal), expected, [q, k, v])


@comparison("SwiGLU", "timm", SwiGLU, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from timm.layers import GluMlp

    dim = rng.integer(4, 20)
    mlp, x = rng.randomize(SwiGLU(dim, 4 * dim)), rng.leaf(3, 2, dim)
    module = GluMlp(dim, mlp.w12.out_features, act_layer=nn.SiLU, gate_last=False).to(rng.dtype)
    reference = bind_weights(module, dict(mlp.named_parameters()), {"w12": "fc1", "w3": "fc2"})
    return Sides(lambda: mlp(x), lambda: reference(x), [x, *mlp.parameters()])


@comparison("EMA teacher, update", "lightly", EMATeacher, EMATeacher.update, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    layers = nn.Linear(rng.integer(2, 9), 5), nn.LayerNorm(5), nn.Linear(5, rng.integer(2, 9))
    student = rng.randomize(nn.Sequential(*layers))
    teacher, reference, steps = EMATeacher(student), copy.deepcopy(student), rng.integer(1, 4)
    momenta = [rng.number(0.0, 1.0) for _ in range(steps)]
    students = [rng.randomize(copy.deepcopy(student)) for _ in range(steps)]
    update_momentum = lightly("models.utils").update_momentum

    def actual() -> list[Tensor]:
        for new, momentum in zip(students, momenta):
            teacher.update(new, momentum)
        return list(teacher.network.parameters())

    def expected() -> list[Tensor]:
        for new, momentum in zip(students, momenta):
            update_momentum(new, reference, momentum)
        return list(reference.parameters())

    return Sides(actual, expected)


@comparison(
    "EMA teacher, forward pass with gradients for the student", "torch", EMATeacher.forward_with_gradient, fp32=1e-5
)
def _(rng: RandomInputs) -> Sides:
    """The teacher equals the student, so the expected side is the student itself."""
    layers = nn.Linear(rng.integer(2, 9), 5), nn.GELU(), nn.Linear(5, rng.integer(2, 9))
    student = rng.randomize(nn.Sequential(*layers))
    teacher, x = EMATeacher(student), rng.leaf(4, layers[0].in_features)
    return Sides(lambda: teacher.forward_with_gradient(student, x), lambda: student(x), [x, *student.parameters()])
