"""The text transformer of CLIP.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020), section
2.4: a causal transformer whose output at the end token is projected into the shared embedding space.

Shapes: B sentences, L tokens each, width D, E dimensions of the shared embedding space.
"""

import torch
from torch import Tensor, nn

from minissl.models.layers import Block, Mlp, quick_gelu


class TextTransformer(nn.Module):
    """Embed token ids (B, up to L) as (B, E). Initial weights are those of the authors' code.

    Args:
        vocab_size: number of token ids; the largest is the end token.
        context_length: L.
        width: D.
        layers: number of blocks.
        heads: attention heads of each block.
        embed_dim: E.
    """

    def __init__(self, vocab_size: int, context_length: int, width: int, layers: int, heads: int, embed_dim: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        blocks = [Block(width, heads, causal=True, activation=quick_gelu, eps=1e-5) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)
        for block in blocks:
            self._init_block(block, width, layers)

    @staticmethod
    def _init_block(block: Block, width: int, layers: int) -> None:
        assert isinstance(block.mlp, Mlp)
        nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attn.proj.weight, std=(2 * layers * width) ** -0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=(2 * layers * width) ** -0.5)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (B, up to L) int64, padded with zeros after the end token, as (B, E), not normalized."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        end = tokens.argmax(dim=-1)  # the end token has the largest id
        x = self.ln_final(x)[torch.arange(len(x), device=x.device), end]  # (B, D)
        return self.text_projection(x)
