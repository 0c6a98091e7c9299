"""The vision transformer.

Dosovitskiy et al., An Image is Worth 16x16 Words, 2020 (arXiv:2010.11929), in the form of DINO (Caron et al., 2021,
arXiv:2104.14294): pre-norm blocks, learned position embeddings that are interpolated to other sizes, a class token.
Parameters have the names of the official DINO family, so that its weights load unchanged. The convolutional stem is
that of Xiao et al., Early Convolutions Help Transformers See Better, 2021 (arXiv:2106.14881); with it a small ViT
learns in minutes on a CPU.

Shapes: B images of H x W pixels, patches of p x p, a grid (h, w) = (H / p, W / p) of N = hw patches, width D, R
registers.
"""

import itertools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.models.layers import Block, quick_gelu
from minissl.models.outputs import Encoder, Tokens
from minissl.models.position_encoding import (
    RopeAngles,
    RopeAugmentation,
    augment_coordinates,
    patch_coordinates,
    resample_pos_embed,
    rope_angles,
)

SIZES = {  # name: width, depth, heads; "nano" is minissl's own, the others are those of DINO and DINOv2
    "nano": (128, 1, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Reshape images (B, 3, H, W) to patches (B, N, p p 3): row by row; within a patch channels vary fastest."""
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Reshape patches (B, N, p p 3) back to images (B, 3, H, W)."""
    x = patches.unflatten(2, (patch_size, patch_size, 3)).unflatten(1, grid)  # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Embed images (B, 3, H, W) as patch tokens (B, h, w, D).

    Args:
        patch_size: p.
        embed_dim: D.
        stem: "patch", one linear map per patch; "conv", overlapping convolutions, one for each halving of the size;
            "deep_conv", with a second one at every size.
    """

    def __init__(self, patch_size: int, embed_dim: int, stem: str):
        super().__init__()
        self.patch_size = patch_size
        self.stem: nn.Module
        if stem == "patch":
            self.stem = nn.Identity()
            self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        else:
            steps = int(math.log2(patch_size))
            widths = [3] + [max(embed_dim >> (steps - 1 - i), 24) for i in range(steps)]  # doubles as the map halves
            layers: list[nn.Module] = []
            for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
                # Padded on both sides, a patch token would be centered on the patch's upper left corner.
                padding = 0 if i == steps else 1
                layers += [nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))]
                layers += [nn.Conv2d(before, after, 3, 2, padding, bias=False), nn.BatchNorm2d(after), nn.ReLU(True)]
                if stem == "deep_conv":
                    # With a last 3 x 3 the receptive field would be 43 pixels, all of a small image; so it is 27.
                    kernel = 1 if i == steps else 3
                    layers += [nn.Conv2d(after, after, kernel, 1, kernel // 2, bias=False)]
                    layers += [nn.BatchNorm2d(after), nn.ReLU(True)]
            self.stem = nn.Sequential(*layers)
            self.proj = nn.Conv2d(widths[-1], embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions are faster, in bf16 by half
        return self.proj(self.stem(images)).permute(0, 2, 3, 1)


class ViT(Encoder):
    """A vision transformer. `vit` builds one by its name.

    Args:
        embed_dim: D.
        depth: number of blocks.
        num_heads: attention heads of each block.
        patch_size: p.
        image_size: side in pixels of the training images; others are possible later.
        stem: "patch", one linear map per patch; "conv", overlapping convolutions; "deep_conv", twice as many of them.
        drop_path: drop rate of the last block's residual branches; rises linearly from 0 at the first block.
        init_std: standard deviation of the blocks' initial weights; DINO has 0.02, a narrow ViT learns faster from
            1 / sqrt(width).
        pos_embed: "learned" vectors; "rope", rotary embeddings as in DINOv3, which hold for any grid; or "none".
        rope_augmentation: shift, jitter and rescale of RoPE coordinates while training, see `RopeAugmentation`.
        clip: use the form of CLIP's image tower: a norm before the blocks, QuickGELU, epsilon 1e-5.
        num_registers: R, additional tokens that are discarded at the end (Darcet et al., Vision Transformers Need
            Registers, 2023, arXiv:2309.16588); 4 in DINOv2's models that have them.
        layer_scale_init: initial value of LayerScale; 1e-5 in DINOv2; 0 leaves LayerScale out.
        swiglu: use SwiGLU in place of the MLP, as DINOv2's largest model.
        isolated_patches: embed each patch alone, as MAE does while training. It makes a difference for the conv stem,
            which otherwise sees the patch's neighbors.
    """

    supports_masking = True

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        image_size: int,
        stem: Literal["patch", "conv", "deep_conv"] = "patch",
        drop_path: float = 0.0,
        init_std: float = 0.02,
        pos_embed: Literal["learned", "rope", "none"] = "learned",
        rope_augmentation: tuple[float, float, float] = RopeAugmentation(),
        clip: bool = False,
        num_registers: int = 0,
        layer_scale_init: float = 0.0,
        swiglu: bool = False,
        isolated_patches: bool = False,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.isolated_patches = isolated_patches
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim, stem)
        side = image_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        learned = pos_embed == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, embed_dim)) if learned else None
        self.rope_augmentation = RopeAugmentation(*rope_augmentation) if pos_embed == "rope" else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]  # deeper blocks are dropped more often
        eps = 1e-5 if clip or pos_embed == "rope" else 1e-6  # CLIP's and DINOv3's; DINO's and DINOv2's
        self.norm_pre = nn.LayerNorm(embed_dim, eps=eps) if clip else nn.Identity()
        choices: dict[str, Any] = {"activation": quick_gelu if clip else F.gelu, "eps": eps}
        choices |= {"layer_scale_init": layer_scale_init, "swiglu": swiglu}
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate, **choices) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.init_weights(init_std)

    def init_weights(self, init_std: float) -> None:
        """Initialize all weights but those of the patch embedding and the norms."""
        for layer in [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]:
            nn.init.trunc_normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.register_tokens is not None:
            std = 1e-6 if self.rope_augmentation is None else 0.02  # DINOv2's, DINOv3's
            nn.init.normal_(self.register_tokens, std=std)

    @property
    def num_registers(self) -> int:
        """R, the number of tokens between the class token and the patches."""
        return 0 if self.register_tokens is None else self.register_tokens.shape[1]

    @property
    def num_heads(self) -> int:
        """Attention heads of each block."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.attn.num_heads

    def interpolate_pos_embed(self, h: int, w: int) -> Tensor:
        """Return the learned position embeddings (1, 1 + hw, D), resampled if the grid is not that of training."""
        if self.pos_embed is None:
            return torch.zeros_like(self.cls_token).expand(-1, 1 + h * w, -1)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        return resample_pos_embed(self.pos_embed, h, w, antialias=self.register_tokens is not None)

    def rope(self, grid: tuple[int, int] | None) -> RopeAngles | None:
        """Return the RoPE angles of a grid, augmented anew at each call while training; None without RoPE."""
        if self.rope_augmentation is None:
            return None
        if grid is None:
            raise InputError("RoPE needs all patches of a grid; use --encoder.pos_embed learned.")
        points = patch_coordinates(grid, self.cls_token.device)  # (N, 2)
        points = augment_coordinates(points, self.rope_augmentation) if self.training else points
        return rope_angles(points, self.embed_dim // self.num_heads)

    def prepare_tokens(
        self, images: Tensor, masks: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return the sequence (B, 1 + N, D) before the first block, and the grid (h, w). Arguments as for `forward`."""
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise InputError(
                f"Images of {images.shape[-2]} x {images.shape[-1]} pixels do not divide into patches of "
                f"{self.patch_size}; resize or crop them to a multiple."
            )
        if masks is not None and isinstance(self.patch_embed.stem, nn.Sequential):  # it sees beyond the patch
            images = images.masked_fill(F.interpolate(masks[:, None].float(), images.shape[-2:]) > 0.5, 0)
        patches = self.embed_alone(images) if self.isolated_patches else self.patch_embed(images)  # (B, h, w, D)
        if masks is not None and mask_token is not None:
            patches = torch.where(masks[..., None], mask_token, patches)
        h, w = patches.shape[1:3]
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(1, 2)], dim=1)
        return self.norm_pre(x + self.interpolate_pos_embed(h, w)), (h, w)

    def embed_alone(self, images: Tensor) -> Tensor:
        """Embed each patch of images (B, 3, H, W) alone, to (B, h, w, D)."""
        p = self.patch_size
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, p, p)
        return self.patch_embed(x.flatten(0, 2)).view(*x.shape[:3], self.embed_dim)

    def prepare_visible_tokens(self, patches: Tensor, indices: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the sequence (B, 1 + n, D) of some patches, each embedded alone, so that none sees another.

        Args:
            patches: pixels (B, n, 3, p, p).
            indices: (B, n) int64, the position of each in the grid, row by row.
            grid: (h, w) of the whole image.
        """
        visible = self.patch_embed(patches.flatten(0, 1)).view(*indices.shape, self.embed_dim)  # (B, n, D)
        positions = self.interpolate_pos_embed(*grid)
        cls = (self.cls_token + positions[:, :1]).expand(len(visible), -1, -1)
        # Not positions[0, 1:][indices]: threads would sum its gradient in an arbitrary order.
        own = positions[:, 1:].expand(len(visible), -1, -1).gather(1, indices[..., None].expand(-1, -1, self.embed_dim))
        return self.norm_pre(torch.cat([cls, visible + own], dim=1))

    def run_blocks(
        self, x: Tensor, num_blocks: int, grid: tuple[int, int] | None = None, cls_only: bool = False
    ) -> Tensor:
        """Apply the first blocks to (B, 1 + n, D). Returns (B, 1 + R + n, D), or (B, 1, D) with `cls_only`."""
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks[:num_blocks]:
            x = block(x, self.rope(grid), 1 if cls_only and block is self.blocks[-1] else None)
        return x

    def encode(self, x: Tensor, grid: tuple[int, int] | None = None, cls_only: bool = False) -> Tensor:
        """Apply all blocks and the final norm to (B, 1 + n, D); registers are removed.

        Args:
            x: the class token first.
            grid: (h, w) of the patches; RoPE needs it.
            cls_only: return the class token alone, (B, 1, D); the last block is computed for it alone.
        """
        x = self.norm(self.run_blocks(x, len(self.blocks), grid, cls_only))
        return torch.cat([x[:, :1], x[:, 1 + self.num_registers :]], dim=1) if self.num_registers else x

    def forward(
        self, images: Tensor, masks: Tensor | None = None, mask_token: Tensor | None = None, cls_only: bool = False
    ) -> Tokens:
        """Encode images.

        Args:
            images: (B, 3, H, W), normalized.
            masks: bool (B, h, w), True for patches that are masked.
            mask_token: (1, D), replaces masked patches.
            cls_only: compute the class token alone; patches are (B, 0, 0, D) then.

        Raises:
            InputError: if the patches do not divide the images.
        """
        x, grid = self.prepare_tokens(images, masks, mask_token)
        x = self.encode(x, grid, cls_only)
        return Tokens(x[:, 0], x[:, 1:].unflatten(1, (0, 0) if cls_only else grid))

    def cls_tokens(self, images: Tensor) -> Tensor:
        """Return the class tokens (B, D); the last block is computed for them alone."""
        return self(images, cls_only=True).cls

    @torch.no_grad()
    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Return the class token's attention to the patches, (B, heads, h, w), after the softmax over all tokens.

        Args:
            images: (B, 3, H, W), normalized.
            layer: block, counted as Python does: 0 is the first, -1 the last.

        Raises:
            InputError: if there is no such block.
        """
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise InputError(f"There is no block {layer}; this ViT has {depth}, from 0 (or {-depth}) to {depth - 1}.")
        x, grid = self.prepare_tokens(images)
        block = self.blocks[layer]
        assert isinstance(block, Block)
        q, k, _ = block.attn.project(block.norm1(self.run_blocks(x, layer % depth, grid)), self.rope(grid))
        weights = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)  # (B, heads, 1, 1 + R + N)
        return weights[:, :, 0, 1 + self.num_registers :].unflatten(-1, grid)


def vit(name: str = "small", patch_size: int = 16, image_size: int = 224, *, depth: int = 0, **choices: Any) -> ViT:
    """Build a ViT by name.

    Args:
        name: one of `SIZES`, with or without `vit_` before it.
        patch_size: p; a power of two for the conv stem.
        image_size: side in pixels of the training images; others are possible later.
        depth: number of blocks; 0 takes that of the name.
        choices: further arguments of `ViT`.

    Raises:
        InputError: for an unknown name, a negative depth, or an image size that the patches do not divide.
    """
    name = name.removeprefix("vit_")
    if name not in SIZES:
        raise InputError(f"There is no ViT {name!r}; choose one of {', '.join(SIZES)}.")
    if depth < 0:
        raise InputError(f"A ViT cannot have {depth} blocks; give 1 or more, or 0 for that of its name.")
    if patch_size < 1 or image_size % patch_size or image_size < patch_size:
        raise InputError(f"Images of {image_size} pixels do not divide into patches of {patch_size}; change one.")
    if choices.get("stem", "patch") != "patch" and 2 ** int(math.log2(patch_size)) != patch_size:
        raise InputError(
            f"The conv stem needs a patch size that is a power of two, not {patch_size}; use --encoder.stem patch."
        )
    width, blocks, heads = SIZES[name]
    return ViT(width, depth or blocks, heads, patch_size, image_size, **choices)
