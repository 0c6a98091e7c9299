"""The vision transformer: an image is a sentence of patches.

Dosovitskiy et al., An Image is Worth 16x16 Words, 2020 (arXiv:2010.11929), in the form of DINO (Caron et al., 2021,
arXiv:2104.14294): pre-norm blocks, learned positions that are interpolated to other sizes, a class token. Parameters
have the names of the official DINO family, so that its weights load as they are.

Shapes: B images of H x W pixels, patches of p x p, a grid (h, w) = (H / p, W / p) of N = hw patches, width D.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.method import Tokens
from minissl.patches import PatchEmbed
from minissl.positions import Stretch, Turn, coordinates, resample, stretch, turn
from minissl.transformer import Block, quick_gelu

#        width, depth, heads; nano is ours, of one block: after a second one the patches have told each other what they
#        show, and the class token may look anywhere for it; the others are DINO's and DINOv2's
SIZES = {
    "nano": (128, 1, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


class ViT(nn.Module):
    """A vision transformer, images (B, 3, H, W) -> Tokens. `vit` makes one by its name.

    Args:
        dim: D.
        depth: blocks.
        heads: of each block's attention.
        patch_size: pixels a side of a patch.
        img_size: pixels a side of the images it is trained on; others are possible later.
        stem: how pixels become patch vectors, one linear map of each patch or a few small convolutions.
        drop_path: rate at which the last block's branches are left out; rises linearly from 0 at the first.
        init_std: deviation of the blocks' first weights, DINO's 0.02; a narrow ViT learns faster from 1 / sqrt(width).
        positions: what says where a patch is: learned vectors, or, as in DINOv3, rotary angles, which hold for any
            grid; with none, a patch is only what it shows.
        stretch: of rotary positions while training: shift, jitter and rescale, see `positions.Stretch`.
        clip: the form of CLIP's image tower: a norm before the blocks, its approximate GELU, its epsilon.
        registers: tokens besides, in which a large ViT may keep what it would else write over dull patches (Darcet et
            al., Vision Transformers Need Registers, 2023, arXiv:2309.16588); 4 in DINOv2's models that have them.
        layer_scale: factor on every branch at the start, learnt; 1e-5 in DINOv2; 0 leaves it out.
        gated: SwiGLU in place of the perceptron, as in DINOv2's largest.
    """

    spares = True  # what nobody asks for: see `method.class_token`

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        img_size: int,
        stem: Literal["patch", "conv"] = "patch",
        drop_path: float = 0.0,
        init_std: float = 0.02,
        positions: Literal["learned", "rotary", "none"] = "learned",
        stretch: tuple[float, float, float] = Stretch(),
        clip: bool = False,
        registers: int = 0,
        layer_scale: float = 0.0,
        gated: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(patch_size, dim, stem)
        side = img_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim)) if positions == "learned" else None
        self.stretch = Stretch(*stretch) if positions == "rotary" else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]  # deeper blocks are left out more often
        eps = 1e-5 if clip or positions == "rotary" else 1e-6  # CLIP's and DINOv3's; DINO's and DINOv2's
        activation = quick_gelu if clip else F.gelu
        self.norm_pre = nn.LayerNorm(dim, eps=eps) if clip else nn.Identity()
        choices = {"activation": activation, "eps": eps, "layer_scale": layer_scale, "gated": gated}
        self.blocks = nn.ModuleList(Block(dim, heads, rate, **choices) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.draw(init_std)

    def draw(self, init_std: float) -> None:
        """The first weights of all but the patch embedding and the norms."""
        for layer in [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]:
            nn.init.trunc_normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6 if self.stretch is None else 0.02)  # DINOv2's, DINOv3's

    def positions(self, h: int, w: int) -> Tensor:
        """The learned positions (1, 1 + hw, D), resampled when the grid is not the one they were learned on."""
        if self.pos_embed is None:
            return torch.zeros_like(self.cls_token).expand(-1, 1 + h * w, -1)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        return resample(self.pos_embed, h, w, antialias=self.register_tokens is not None)

    def turn(self, grid: tuple[int, int] | None) -> Turn | None:
        """The angles of a grid's patches, another draw each time while training; None if positions are not rotary."""
        if self.stretch is None:
            return None
        if grid is None:
            raise InputError("Rotary positions need all patches of a grid; choose --encoder.positions learned.")
        points = coordinates(grid, self.cls_token.device)  # (N, 2)
        points = stretch(points, self.stretch) if self.training else points
        return turn(points, self.dim // self.blocks[0].attn.heads)

    def embed(
        self, images: Tensor, masks: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """The sequence (B, 1 + N, D) before the first block, and the grid (h, w); arguments as for `forward`."""
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise InputError(
                f"Images of {images.shape[-2]} x {images.shape[-1]} pixels do not divide into patches of "
                f"{self.patch_size}; resize or crop them to a multiple."
            )
        if masks is not None and isinstance(self.patch_embed.stem, nn.Sequential):  # it looks beyond the patch
            images = images.masked_fill(F.interpolate(masks[:, None].float(), images.shape[-2:]) > 0.5, 0)
        patches = self.patch_embed(images)  # (B, h, w, D)
        if masks is not None:
            patches = torch.where(masks[..., None], mask_token, patches)
        h, w = patches.shape[1:3]
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(1, 2)], dim=1)
        return self.norm_pre(x + self.positions(h, w)), (h, w)

    def embed_some(self, patches: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """The sequence (B, 1 + n, D) of some patches, each embedded by itself, so that it knows nothing of the others.

        Args:
            patches: their pixels, (B, n, 3, p, p).
            places: (B, n) int64, where each belongs, row by row.
            grid: (h, w) of the whole.
        """
        seen = self.patch_embed(patches.flatten(0, 1)).view(*places.shape, self.dim)  # (B, n, D)
        positions = self.positions(*grid)
        first = (self.cls_token + positions[:, :1]).expand(len(seen), -1, -1)
        # Not positions[0, 1:][places], whose gradient is summed in any order by several threads.
        own = positions[:, 1:].expand(len(seen), -1, -1).gather(1, places[..., None].expand(-1, -1, self.dim))
        return self.norm_pre(torch.cat([first, seen + own], dim=1))

    @property
    def registers(self) -> int:
        """R, how many tokens stand between the class token's and the patches."""
        return 0 if self.register_tokens is None else self.register_tokens.shape[1]

    def run(self, x: Tensor, blocks: int, grid: tuple[int, int] | None = None, alone: bool = False) -> Tensor:
        """The first `blocks` blocks of a sequence (B, 1 + n, D); then it is (B, 1 + R + n, D), or (B, 1, D) alone."""
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks[:blocks]:
            x = block(x, self.turn(grid), 1 if alone and block is self.blocks[-1] else None)
        return x

    def encode(self, x: Tensor, grid: tuple[int, int] | None = None, alone: bool = False) -> Tensor:
        """All blocks and the last norm, of a sequence (B, 1 + n, D); its registers have served then.

        Args:
            x: the class token first.
            grid: (h, w) of the patches; rotary positions need it.
            alone: the class token is all that is asked for, (B, 1, D); the last block is computed for it alone.
        """
        x = self.norm(self.run(x, len(self.blocks), grid, alone))
        return torch.cat([x[:, :1], x[:, 1 + self.registers :]], dim=1) if self.registers else x

    def forward(
        self, images: Tensor, masks: Tensor | None = None, mask_token: Tensor | None = None, alone: bool = False
    ) -> Tokens:
        """Images (B, 3, H, W) to tokens.

        Args:
            images: normalised.
            masks: bool (B, h, w), True for patches that are not to be seen.
            mask_token: (1, D), what stands in their place.
            alone: the class token is all that is asked for; there are no patches then, (B, 0, 0, D).
        """
        x, grid = self.embed(images, masks, mask_token)
        x = self.encode(x, grid, alone)
        return Tokens(x[:, 0], x[:, 1:].unflatten(1, (0, 0) if alone else grid))

    @torch.no_grad()
    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Where the class token of a block looks: (B, heads, h, w), the patches' share of its softmax.

        Args:
            images: (B, 3, H, W), normalised.
            layer: which block, counted as Python does: 0 is the first, -1 the last.

        Raises:
            InputError: for a block there is none of.
        """
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise InputError(f"There is no block {layer}; this ViT has {depth}, from 0 (or {-depth}) to {depth - 1}.")
        x, grid = self.embed(images)
        asked = self.blocks[layer]
        q, k, _ = asked.attn.split(asked.norm1(self.run(x, layer % depth, grid)), self.turn(grid))
        weights = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)  # (B, heads, 1, 1 + R + N)
        return weights[:, :, 0, 1 + self.registers :].unflatten(-1, grid)


def vit(name: str = "small", patch_size: int = 16, img_size: int = 224, *, depth: int = 0, **choices: Any) -> ViT:
    """A ViT by name.

    Args:
        name: the size, of `SIZES`, where width, depth and heads stand.
        patch_size: pixels a side of a patch; a power of two for the conv stem.
        img_size: pixels a side of the images it is trained on; others are possible later.
        depth: blocks; 0: as many as the name says.
        choices: what else a `ViT` may be.

    Raises:
        InputError: for an unknown name, fewer than no blocks, or a size that the patches do not divide.
    """
    if name not in SIZES:
        raise InputError(f"There is no ViT {name!r}; choose one of {', '.join(SIZES)}.")
    if depth < 0:
        raise InputError(f"A ViT cannot have {depth} blocks; give 1 or more, or 0 for as many as its name says.")
    if img_size % patch_size or img_size < patch_size:
        raise InputError(f"Images of {img_size} pixels do not divide into patches of {patch_size}; change one.")
    if choices.get("stem") == "conv" and 2 ** int(math.log2(patch_size)) != patch_size:
        raise InputError(f"The conv stem halves the image again and again, so a patch of {patch_size} cannot be made.")
    width, blocks, heads = SIZES[name]
    return ViT(width, depth or blocks, heads, patch_size, img_size, **choices)
