"""MAE: reconstruct the pixels of masked patches from the few visible ones.

He et al., Masked Autoencoders Are Scalable Vision Learners, 2021 (arXiv:2111.06377). The encoder sees only the visible
patches, a quarter of them; a small decoder, which is discarded after training, predicts the masked ones. Position
embeddings of encoder and decoder are learned here; they are fixed sine-cosine embeddings in the paper.

Shapes: B images (B, 3, H, W), patches of p x p pixels, a grid (h, w) of N = hw patches of which n are visible, D the
encoder's width, E the decoder's.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize
from minissl.data.transforms.masking import random_masking
from minissl.errors import InputError
from minissl.methods.base import PretextMethod
from minissl.models.layers import Block
from minissl.models.outputs import Encoder
from minissl.models.vit import ViT, patchify

HEAD_DIM = 32  # of the decoder's attention; the paper's 512 / 16


def masked_pixel_loss(
    prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool = True
) -> Tensor:
    """Compute the mean squared error over the pixels of masked patches.

    Args:
        prediction: (B, N, p p 3), in the order of `models.vit.patchify`.
        images: (B, 3, H, W) float, the targets.
        mask: (B, N), 1 or True where a patch is masked, at least one of them.
        patch_size: p.
        normalize: normalize the target pixels of each patch by their mean and standard deviation (divisor n - 1).

    Returns:
        A scalar; with `normalize` about 1 for a prediction of 0, the mean of each patch.
    """
    target = patchify(images, patch_size)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (prediction - target).square().mean(-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


class MaskedAutoencoder(PretextMethod):
    """Reconstruct the pixels of masked patches with an asymmetric encoder and decoder.

    Args:
        encoder: a ViT with learned position embeddings; with a conv stem it needs `isolated_patches`, so that it embeds
            whole images as it did visible patches while training.
        mask_ratio: fraction of the patches that are masked.
        norm_pix_loss: normalize the target pixels of each patch by their mean and standard deviation.
        decoder_dim: E, a multiple of 32.
        decoder_depth: number of the decoder's blocks.
        options: those of `PretextMethod`; `crop_size` is a multiple of the encoder's patch size.

    Raises:
        InputError: if the encoder is not such a ViT, or `crop_size` is not a multiple of its patch size.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": PretextMethod.presets["cpu"]
        | {
            "encoder.isolated_patches": True,  # the trained encoder embeds patches as it did while training
            "decoder_dim": 128,  # 512 in the paper
            "decoder_depth": 1,  # 8 in the paper
        },
        "gpu": PretextMethod.presets["gpu"]
        | {
            "lr": 1.5e-4,  # the paper's rule, 1.5e-4 * batch size / 256
            "beta2": 0.95,  # the paper's
        },
    }

    encoder: ViT

    def __init__(
        self,
        encoder: Encoder,
        *,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        **options: Any,
    ):
        super().__init__(encoder, **options)
        if not isinstance(encoder, ViT):
            raise InputError("MAE encodes visible patches alone and needs a ViT; give for example --encoder.name nano.")
        if isinstance(encoder.patch_embed.stem, nn.Sequential) and not encoder.isolated_patches:
            raise InputError("MAE embeds each patch alone; with a conv stem give --encoder.isolated_patches true.")
        self.check_crop_size()
        self.patch_size, self.mask_ratio, self.norm_pix_loss = encoder.patch_size, mask_ratio, norm_pix_loss
        num_patches = (self.crop_size // encoder.patch_size) ** 2
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, decoder_dim) * 0.02)
        blocks = [Block(decoder_dim, decoder_dim // HEAD_DIM) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch_size**2 * 3)

    def reconstruct(self, images: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        """Predict the pixels of all patches from a random subset of the patches.

        Args:
            images: (B, 3, H, W), normalized, of the training's crop size.
            mask_ratio: fraction of the patches that are masked, in [0, 1).

        Returns:
            Pixels (B, N, p p 3) float32, normalized per patch if the method was trained with `norm_pix_loss`, and the
            mask (B, N) bool, True for patches that were masked.
        """
        p = self.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        patches = patchify(images, p)  # (B, N, p p 3)
        visible, mask = random_masking(len(images), patches.shape[1], mask_ratio, images)  # (B, n), (B, N)
        pixels = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))  # (B, n, p p 3)
        pixels = pixels.unflatten(-1, (p, p, 3)).permute(0, 1, 4, 2, 3)  # (B, n, 3, p, p)
        x = self.encoder.encode(self.encoder.prepare_visible_tokens(pixels, visible, grid))  # (B, 1 + n, D)
        return self.decode(x, visible, patches.shape[1]).float(), mask

    def decode(self, tokens: Tensor, visible: Tensor, num_patches: int) -> Tensor:
        """Predict the pixels (B, N, p p 3) of all patches from the encoder's tokens of the visible ones.

        Args:
            tokens: (B, 1 + n, D), the class token first.
            visible: (B, n) int64 indices of the visible patches, 0 to N - 1.
            num_patches: N.
        """
        x = self.decoder_embed(tokens)  # (B, 1 + n, E)
        masked = self.mask_token.to(x.dtype).expand(len(x), num_patches, -1)
        x_patches = masked.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])  # (B, N, E)
        x = torch.cat([x[:, :1], x_patches], dim=1) + self.decoder_pos_embed  # (B, 1 + N, E)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def loss_on_crops(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the loss on images (B, 3, S, S) float in [0, 1], without augmentation.

        Returns:
            "loss", `masked_pixel_loss` of the normalized images.
        """
        images = normalize(images)
        prediction, mask = self.reconstruct(images, self.mask_ratio)
        return {"loss": masked_pixel_loss(prediction, images, mask, self.patch_size, self.norm_pix_loss)}
