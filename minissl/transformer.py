"""The transformer's parts: attention, a perceptron, and the block of both.

Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762), with the norms before the branches. Parameters have
the names of the official DINO family. The same block reads patches (`vit`) and words (`text`).

Shapes: B sequences of T tokens, width D, d = D / heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.parallel import rand
from minissl.positions import Turn, rotate


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k' / sqrt(d)) v for (B, heads, T, d); if causal, a token sees itself and those before it.

    On a GPU the fused kernel; on a CPU, where its backward pass is slow for short sequences, the formula as it stands,
    until its T x T weights no longer fit into a core's cache.
    """
    if q.is_cuda or q.shape[-2] > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    weights = q * q.shape[-1] ** -0.5 @ k.mT  # (B, heads, T, T)
    if causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = weights.masked_fill(later, -torch.inf)
    return weights.softmax(dim=-1) @ v


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor, turn: Turn | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens (B, T, D), each (B, heads, T, D / heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return (q, k, v) if turn is None else (rotate(q, turn), rotate(k, turn), v)

    def forward(self, x: Tensor, turn: Turn | None = None, first: int | None = None) -> Tensor:
        """Tokens (B, T, D) to as many, or to the first few: they look at all, and no one else looks."""
        q, k, v = self.split(x, turn)
        return self.proj(attend(q[:, :, :first], k, v, self.causal).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU, or another activation, between them."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    """A perceptron with a gate: silu(x w1) * (x w2), and back. Shazeer, 2020 (arXiv:2002.05202), as DINOv2 has it.

    Args:
        dim: D.
        hidden: width it would have without a gate; two thirds of it, in eights, need as many numbers.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = -(-int(hidden * 2 / 3) // 8) * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * x)


class LayerScale(nn.Module):
    """A factor on each number of a branch, small at first. Touvron et al., CaiT, 2021 (arXiv:2103.17239)."""

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Leave a residual branch out for some images, while training (Huang et al., 2016, arXiv:1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = rand(len(x), 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch scaled where `layer_scale` is not 0."""

    def __init__(
        self,
        dim: int,
        heads: int,
        drop_path: float = 0.0,
        causal: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        eps: float = 1e-6,
        layer_scale: float = 0.0,
        gated: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, causal)
        self.ls1, self.ls2 = (LayerScale(dim, layer_scale) if layer_scale else nn.Identity() for _ in range(2))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, 4 * dim) if gated else Mlp(dim, 4 * dim, activation)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, turn: Turn | None = None, first: int | None = None) -> Tensor:
        """Tokens (B, T, D) to tokens.

        Args:
            x: the tokens.
            turn: says where the last of them are in the image, if not they themselves.
            first: how many are asked for, those in front; None: all.
        """
        x = x[:, :first] + self.drop_path(self.ls1(self.attn(self.norm1(x), turn, first)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def layer_rates(network: nn.Module, decay: float, prefix: str = "", above: int = 0) -> dict[str, float]:
    """Factors on the learning rate: 1 for the last block and what follows it, times `decay` for each block before.

    Clark et al., ELECTRA, 2020 (arXiv:2003.10555), as timm groups it: early layers are general and are moved least.
    BEiT and DINOv2 count the heads as one more layer, `above`. A network without `blocks` has one factor, `decay`.

    Args:
        network: an encoder.
        decay: 1 moves all alike, 0 none but the last.
        prefix: put before each parameter's name.
        above: layers that follow the last block; then it has decay**above.
    """
    depth, out = len(getattr(network, "blocks", ())), {}
    for name, _ in network.named_parameters():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        below = above + (depth - 1 - int(block) if block else max(depth, 1))
        below = 0 if name.startswith("norm.") and depth else below
        out[prefix + name] = decay**below
    return out
