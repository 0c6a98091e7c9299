"""MAE: reconstruct the pixels of masked patches from the few visible ones.

He et al., Masked Autoencoders Are Scalable Vision Learners, 2021 (arXiv:2111.06377). The encoder sees only the visible
patches, a quarter of them; a small decoder, which is discarded after training, predicts the masked ones. Position
embeddings of encoder and decoder are learned here; they are fixed sine-cosine embeddings in the paper.

Shapes: B images (B, 3, H, W), patches of p x p pixels, a grid (h, w) of N = hw patches of which n are visible, D the
encoder's width, E the decoder's.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize, random_horizontal_flip, random_resized_crop
from minissl.data.transforms.masking import random_masking
from minissl.errors import InputError
from minissl.methods.base import Batch, Method
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


class MaskedAutoencoder(Method):
    """Reconstruct the pixels of masked patches with an asymmetric encoder and decoder.

    Args:
        encoder: a ViT with learned position embeddings.
        crop_size: side of the training crops in pixels, a multiple of the encoder's patch size.
        crop_scale: range of a crop's area, as a fraction of the image's.
        mask_ratio: fraction of the patches that are masked.
        norm_pix_loss: normalize the target pixels of each patch by their mean and standard deviation.
        decoder_dim: E, a multiple of 32.
        decoder_depth: number of the decoder's blocks.

    Raises:
        InputError: if the encoder is not a ViT, or `crop_size` is not a multiple of its patch size.
    """

    feature_pooling: ClassVar[Literal["cls", "both"]] = "both"  # the loss trains the patch tokens, not the class token
    supports_grad_accumulation: ClassVar[bool] = True  # the loss is a mean over images
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Trains in minutes on two CPU cores.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",  # a linear patch embedding learns next to nothing in this time
            "encoder.init_std": 0.088,  # 1 / sqrt(128): a narrow ViT learns faster from larger weights
            "image_size": 64,
            "crop_size": 32,
            "crop_scale": (0.6, 1.0),  # from 0.2 in the paper: a crop of 32 pixels must show the object
            "decoder_dim": 128,  # 512 in the paper
            "decoder_depth": 1,  # 8 in the paper
            "batch_size": 128,
            "lr": 2e-3,
            "final_weight_decay": 0.04,  # constant
            "minutes": 8.0,
        },
        # ViT-S/16 on one GPU.
        "gpu": {
            "encoder.name": "small",
            "image_size": 256,
            "batch_size": 256,  # 4,096 in the paper
            "weight_decay": 0.05,  # the paper's, constant
            "final_weight_decay": 0.05,
            "clip_grad": 0.0,  # none in the paper
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: Encoder,
        *,
        crop_size: int = 224,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
    ):
        super().__init__()
        if not isinstance(encoder, ViT):
            raise InputError("MAE encodes visible patches alone and needs a ViT; give for example --encoder.name nano.")
        patch_size = encoder.patch_size
        if crop_size % patch_size:
            raise InputError(
                f"Crops of {crop_size} pixels do not divide into patches of {patch_size}; give --crop_size a multiple."
            )
        self.encoder: ViT = encoder
        self.crop_size, self.crop_scale, self.patch_size = crop_size, crop_scale, patch_size
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        num_patches = (crop_size // patch_size) ** 2
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, decoder_dim) * 0.02)
        blocks = [Block(decoder_dim, decoder_dim // HEAD_DIM) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * 3)

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

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        crops = random_resized_crop(batch.images, self.crop_size, self.crop_scale)
        return self.loss_on_crops(random_horizontal_flip(crops))

    def loss_on_crops(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the loss on images (B, 3, S, S) float in [0, 1], without augmentation.

        Returns:
            "loss", `masked_pixel_loss` of the normalized images.
        """
        images = normalize(images)
        prediction, mask = self.reconstruct(images, self.mask_ratio)
        return {"loss": masked_pixel_loss(prediction, images, mask, self.patch_size, self.norm_pix_loss)}
