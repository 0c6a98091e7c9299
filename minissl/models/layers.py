"""Layers of the transformer: attention, MLP and the block of both.

Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762), in pre-norm form. Parameters have the names of the
official DINO family. The same block serves image patches (`vit`) and text (`text_encoder`).

Shapes: B sequences of T tokens, width D, d = D / heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.distributed import local_rows, world_size
from minissl.models.position_encoding import RopeAngles, apply_rope


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v for (B, heads, T, d); with `causal`, tokens see themselves and earlier ones.

    Uses the fused kernel on a GPU. Its backward pass is slow on a CPU for short sequences: there the formula is
    computed as written, as long as the T x T weights fit into a core's cache.
    """
    if q.is_cuda or q.shape[-2] > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    weights = q * q.shape[-1] ** -0.5 @ k.mT  # (B, heads, T, T)
    if causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = weights.masked_fill(later, -torch.inf)
    return weights.softmax(dim=-1) @ v


def quick_gelu(x: Tensor) -> Tensor:
    """Compute CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, causal: bool = False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, rope: RopeAngles | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of tokens (B, T, D), each (B, heads, T, d); RoPE is applied."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return (q, k, v) if rope is None else (apply_rope(q, rope), apply_rope(k, rope), v)

    def forward(self, x: Tensor, rope: RopeAngles | None = None, num_queries: int | None = None) -> Tensor:
        """Map tokens (B, T, D) to the same shape, or only the first `num_queries` of them; they attend to all."""
        q, k, v = self.project(x, rope)
        return self.proj(attention(q[:, :, :num_queries], k, v, self.causal).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated MLP: silu(x w1) * (x w2), projected back. Shazeer, 2020 (arXiv:2002.05202), as in DINOv2.

    Args:
        dim: D.
        hidden_dim: width of an MLP with the same number of parameters; two thirds of it, rounded up to a multiple of 8,
            are used.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        hidden_dim = -(-int(hidden_dim * 2 / 3) // 8) * 8
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * x)


class LayerScale(nn.Module):
    """Learned factor per channel of a residual branch. Touvron et al., CaiT, 2021 (arXiv:2103.17239)."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drop a residual branch for random images while training.

    Huang et al., Deep Networks with Stochastic Depth, 2016 (arXiv:1603.09382).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = local_rows(torch.rand(len(x) * world_size(), 1, 1, device=x.device)) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), with optional LayerScale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: float = 0.0,
        causal: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        eps: float = 1e-6,
        layer_scale_init: float = 0.0,
        swiglu: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, causal)
        self.ls1 = LayerScale(dim, layer_scale_init) if layer_scale_init else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale_init) if layer_scale_init else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, 4 * dim) if swiglu else Mlp(dim, 4 * dim, activation)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: RopeAngles | None = None, num_queries: int | None = None) -> Tensor:
        """Map tokens (B, T, D) to tokens.

        Args:
            x: the tokens.
            rope: RoPE angles of the last N tokens.
            num_queries: return only so many tokens, the first ones; None returns all.
        """
        x = x[:, :num_queries] + self.drop_path(self.ls1(self.attn(self.norm1(x), rope, num_queries)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def layer_lr_scales(network: nn.Module, decay: float, prefix: str = "", layers_above: int = 0) -> dict[str, float]:
    """Compute learning-rate factors for layer-wise decay: 1 for the last block, times `decay` for each block below.

    Clark et al., ELECTRA, 2020 (arXiv:2003.10555), grouped as in timm. BEiT and DINOv2 count the heads as one more
    layer, `layers_above`. A network without `blocks` has one factor, `decay`.

    Args:
        network: an encoder.
        decay: 1 gives all layers the same rate, 0 freezes all but the last.
        prefix: put before each parameter's name.
        layers_above: layers that follow the last block, which then has decay**layers_above.

    Returns:
        Factors by parameter name.
    """
    depth, scales = len(getattr(network, "blocks", ())), {}
    for name, _ in network.named_parameters():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        below = layers_above + (depth - 1 - int(block) if block else max(depth, 1))
        below = 0 if name.startswith("norm.") and depth else below
        scales[prefix + name] = decay**below
    return scales
