"""Inpainting: predict the masked central region of an image from its surroundings.

Pathak et al., Context Encoders: Feature Learning by Inpainting, 2016 (arXiv:1604.07379), without the adversarial loss.
The region, the hole, has half the image's side. Its outermost two pixels have ten times the weight in the loss, so that
the prediction continues the surroundings. In the authors' code the encoder sees this border; here it is masked too.

Shapes: B images (B, 3, S, S), patches of p x p pixels, a grid (h, w) of N = hw patches, D the encoder's width.
"""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize, random_horizontal_flip, random_resized_crop
from minissl.errors import InputError
from minissl.methods.base import Batch, Method
from minissl.models.outputs import Encoder
from minissl.models.vit import unpatchify

BORDER_WEIGHT = 10  # the paper's
BORDER_PIXELS = 2  # 4 of 128 pixels in the paper


class ContextEncoder(Method):
    """Predict the pixels of a central hole by regression.

    Args:
        encoder: maps normalized images to Tokens; pixels are predicted from its patch tokens.
        crop_size: side of the training crops in pixels, a multiple of the encoder's patch size.
        crop_scale: range of a crop's area, as a fraction of the image's.

    Raises:
        InputError: if `crop_size` is not a multiple of the encoder's patch size.
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
            "crop_scale": (0.6, 1.0),  # a crop of 32 pixels must show the object
            "batch_size": 128,
            "lr": 2e-3,
            "final_weight_decay": 0.04,  # constant
            "minutes": 8.0,
        },
        # ViT-S/16 on one GPU.
        "gpu": {
            "encoder.name": "small",
            "image_size": 256,
            "batch_size": 256,
            "weight_decay": 0.05,  # MAE's, constant; the four pretext tasks share one preset
            "final_weight_decay": 0.05,
            "clip_grad": 0.0,  # none in MAE
            "compile": True,
        },
    }

    def __init__(self, encoder: Encoder, *, crop_size: int = 224, crop_scale: tuple[float, float] = (0.2, 1.0)):
        super().__init__()
        patch_size, hidden_dim = encoder.patch_size, 4 * encoder.embed_dim
        if crop_size % patch_size:
            raise InputError(
                f"Crops of {crop_size} pixels do not divide into patches of {patch_size}; give --crop_size a multiple."
            )
        self.encoder: Encoder = encoder
        self.crop_size, self.crop_scale, self.patch_size = crop_size, crop_scale, patch_size
        self.head = nn.Sequential(
            nn.Linear(encoder.embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, patch_size**2 * 3)
        )

    def inpaint(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the pixels of the hole from its surroundings.

        Args:
            images: (B, 3, S, S), normalized; the hole is set to 0, the mean color, before they are encoded.

        Returns:
            Normalized pixels (B, 3, S, S) float32, trained inside the hole only, and the hole (1, 1, S, S), 1 inside.
        """
        side, quarter = images.shape[-1], images.shape[-1] // 4
        hole = images.new_zeros(1, 1, side, side)
        hole[..., quarter : side - quarter, quarter : side - quarter] = 1
        patches = self.encoder(images * (1 - hole)).patches  # (B, h, w, D); 0 is the mean color
        pixels = self.head(patches).float().flatten(1, 2)  # (B, N, p p 3)
        return unpatchify(pixels, self.patch_size, patches.shape[1:3]), hole

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        crops = random_resized_crop(batch.images, self.crop_size, self.crop_scale)
        return self.loss_on_crops(random_horizontal_flip(crops))

    def loss_on_crops(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the loss on images (B, 3, S, S) float in [0, 1], without augmentation.

        Returns:
            "loss", the weighted mean squared error of the hole's normalized pixels.
        """
        images = normalize(images)
        predictions, hole = self.inpaint(images)
        interior = -F.max_pool2d(-hole, 2 * BORDER_PIXELS + 1, 1, BORDER_PIXELS)  # the hole without its border
        weight = interior + BORDER_WEIGHT * (hole - interior)  # (1, 1, S, S)
        return {"loss": ((predictions - images).square() * weight).sum() / (3 * len(images) * weight.sum())}
