"""Heads, transformer blocks and teachers beside lightly's and torch's: the same weights, values and gradients."""

import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.heads import DINOHead
from minissl.methods.simclr import ProjectionHead
from minissl.teacher import Teacher
from minissl.transformer import Attention, Block, Mlp, SwiGLU, attend
from tests.parity.ledger import Draw, Sides, compared
from tests.parity.losses import lightly
from tests.parity.networks import lend


@compared("DINO's head", "lightly", DINOHead, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Its prototypes have a length of their own, which is 1."""
    b, dim, k, hidden, out = draw.whole(2, 9), draw.whole(4, 20), draw.whole(4, 30), draw.whole(8, 20), draw.whole(4, 9)
    ours, x = draw.shake(DINOHead(dim, k, hidden, out)), draw.free(b, dim)
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of the weight norm that it is made with
        theirs = lightly("models.modules.heads").DINOProjectionHead(dim, hidden, out, k).to(draw.dtype)
    names = {"mlp.6": "layers.4", "mlp.3": "layers.2", "mlp.0": "layers.0", "last_layer.weight": "last_layer.weight_v"}
    ask = lend(theirs, dict(ours.named_parameters()), names, unused=("weight_g",))
    return Sides(lambda: ours(x), lambda: ask(x), [x, *ours.parameters()])


@compared("DINO's head with batch norms, its prototypes frozen", "torch", DINOHead, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """A bias before a batch norm is without effect, and so without a gradient."""
    b, dim, k, hidden, out = (
        draw.whole(8, 20),
        draw.whole(4, 20),
        draw.whole(4, 30),
        draw.whole(8, 20),
        draw.whole(4, 9),
    )
    ours, x = draw.shake(DINOHead(dim, k, hidden, out, batch_norm=True)), draw.free(b, dim)
    state = dict(ours.named_parameters())

    def theirs() -> Tensor:
        z = x
        for i in (0, 3):
            z = F.linear(z, state[f"mlp.{i}.weight"], state[f"mlp.{i}.bias"])
            weight, bias = state[f"mlp.{i + 1}.weight"], state[f"mlp.{i + 1}.bias"]
            z = F.gelu((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() * weight + bias)
        z = F.linear(z, state["mlp.6.weight"], state["mlp.6.bias"])
        z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        return torch.stack(
            [F.cosine_similarity(z, prototype[None]) for prototype in ours.last_layer.weight.detach()], 1
        )

    felt = [
        p for name, p in state.items() if name not in ("mlp.0.bias", "mlp.3.bias", "mlp.6.bias", "last_layer.weight")
    ]
    return Sides(lambda: ours(x, freeze_last=True), theirs, [x, *felt])


@compared("DINOv3's head, prototypes as they are", "torch", DINOHead, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, dim, k, hidden, out = draw.whole(2, 9), draw.whole(4, 20), draw.whole(4, 30), draw.whole(8, 20), draw.whole(4, 9)
    ours, x = draw.shake(DINOHead(dim, k, hidden, out, cosines=False)), draw.free(b, dim)
    state = dict(ours.named_parameters())
    body = nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out)
    )
    mlp = {name.removeprefix("mlp."): p for name, p in state.items() if "mlp" in name}
    ask = lend(body.to(draw.dtype), mlp, {"6.": "4.", "3.": "2."})

    def right() -> Tensor:
        z = ask(x)
        return z / z.square().sum(-1, keepdim=True).sqrt() @ state["last_layer.weight"].T

    return Sides(lambda: ours(x), right, [x, *ours.parameters()])


@compared("SimCLR's head", "lightly", ProjectionHead, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Our last norm has a bias that is never trained, and so is 0."""
    b, dim, hidden, out, layers = (
        draw.whole(8, 20),
        draw.whole(4, 20),
        draw.whole(4, 20),
        draw.whole(2, 9),
        draw.whole(2, 3),
    )
    ours, x = draw.shake(ProjectionHead(dim, hidden, out, layers)), draw.free(b, dim)
    theirs = lightly("models.modules.heads").SimCLRProjectionHead(dim, hidden, out, layers).to(draw.dtype)
    ask = lend(theirs, dict(ours.named_parameters()), {})
    return Sides(lambda: ours(x), lambda: ask(x), [x, *(p for p in ours.parameters() if p.requires_grad)])


@compared("a transformer's block, causal or not", "torch", Block, Attention, Mlp, attend, fp32=1e-5)
def _(draw: Draw) -> Sides:
    heads, t, causal, eps = draw.one_of(1, 2, 4), draw.whole(2, 9), draw.one_of(True, False), draw.real(1e-6, 1e-2)
    dim = heads * draw.whole(8, 12)
    ours, x = draw.shake(Block(dim, heads, causal=causal, eps=eps)), draw.free(draw.whole(1, 3), t, dim)
    theirs = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", eps, batch_first=True, norm_first=True)
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}
    ask = lend(theirs.to(draw.dtype), dict(ours.named_parameters()), names)
    mask = torch.full((t, t), -torch.inf, dtype=draw.dtype).triu(1) if causal else None
    return Sides(lambda: ours(x), lambda: ask(x, mask, is_causal=causal), [x, *ours.parameters()])


@compared("attention of a long sequence", "a loop", attend, fp32=1e-5)
def _(draw: Draw) -> Sides:
    t, d, causal = draw.one_of(20, 260), draw.whole(2, 5), draw.one_of(True, False)
    q, k, v = (draw.free(1, 1, t, d) for _ in range(3))

    def theirs() -> Tensor:
        rows = []
        for i in range(t):
            seen = i + 1 if causal else t
            power = ((k[0, 0, :seen] * q[0, 0, i]).sum(-1) / math.sqrt(d)).exp()
            rows.append((power[:, None] * v[0, 0, :seen]).sum(0) / power.sum())
        return torch.stack(rows)[None, None]

    return Sides(lambda: attend(q, k, v, causal), theirs, [q, k, v])


@compared("SwiGLU", "timm", SwiGLU, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    from timm.layers import GluMlp

    dim = draw.whole(4, 20)
    ours, x = draw.shake(SwiGLU(dim, 4 * dim)), draw.free(3, 2, dim)
    theirs = GluMlp(dim, ours.w12.out_features, act_layer=nn.SiLU, gate_last=False).to(draw.dtype)
    ask = lend(theirs, dict(ours.named_parameters()), {"w12": "fc1", "w3": "fc2"})
    return Sides(lambda: ours(x), lambda: ask(x), [x, *ours.parameters()])


@compared("a teacher that follows", "lightly", Teacher, Teacher.follow, fp32=1e-5)
def _(draw: Draw) -> Sides:
    student = draw.shake(nn.Sequential(nn.Linear(draw.whole(2, 9), 5), nn.LayerNorm(5), nn.Linear(5, draw.whole(2, 9))))
    ours, theirs, steps = Teacher(student), copy.deepcopy(student), draw.whole(1, 4)
    momentum = [draw.real(0.0, 1.0) for _ in range(steps)]
    students = [draw.shake(copy.deepcopy(student)) for _ in range(steps)]
    move = lightly("models.utils").update_momentum

    def found() -> list[Tensor]:
        for now, m in zip(students, momentum):
            ours.follow(now, m)
        return list(ours.network.parameters())

    def right() -> list[Tensor]:
        for now, m in zip(students, momentum):
            move(now, theirs, m)
        return list(theirs.parameters())

    return Sides(found, right)


@compared("a teacher that lets gradients through", "torch", Teacher.leaking, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """As if it were the student; so the other side is the student itself."""
    student = draw.shake(nn.Sequential(nn.Linear(draw.whole(2, 9), 5), nn.GELU(), nn.Linear(5, draw.whole(2, 9))))
    ours, x = Teacher(student), draw.free(4, student[0].in_features)
    return Sides(lambda: ours.leaking(student, x), lambda: student(x), [x, *student.parameters()])
