"""Rotation prediction: classify by how many quarter turns an image was rotated.

Gidaris et al., Unsupervised Representation Learning by Predicting Image Rotations, 2018 (arXiv:1803.07728). The pretext
task needs no labels: the rotation is the label, and recognizing it requires knowing how objects usually stand.

Shapes: B images (B, 3, S, S), D the encoder's width.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize, random_horizontal_flip, random_resized_crop
from minissl.methods.base import Batch, Method
from minissl.models.outputs import Encoder


def rotate_four(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate square images by 0, 90, 180 and 270 degrees counterclockwise, without interpolation.

    Args:
        images: (B, C, S, S) of any dtype.

    Returns:
        Images (4B, C, S, S), rotation by rotation: row = rotation * B + image; and the rotations (4B,) int64, 0 to 3
        quarter turns.
    """
    rotated = torch.cat([torch.rot90(images, rotation, (-2, -1)) for rotation in range(4)])
    return rotated, torch.arange(4, device=images.device).repeat_interleave(len(images))


class Rotation(Method):
    """Classify the rotation of images, one of four.

    Args:
        encoder: maps normalized images to Tokens; its class token is classified.
        crop_size: side of the training crops in pixels.
        crop_scale: range of a crop's area, as a fraction of the image's.
    """

    feature_pooling: ClassVar[Literal["cls", "both"]] = "both"  # as for the other pretext tasks, for comparison
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
        self.encoder: Encoder = encoder
        self.crop_size, self.crop_scale = crop_size, crop_scale
        self.head = nn.Linear(encoder.embed_dim, 4)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        crops = random_resized_crop(batch.images, self.crop_size, self.crop_scale)
        return self.loss_on_crops(random_horizontal_flip(crops))

    def loss_on_crops(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the loss on all four rotations of images (B, 3, S, S) float in [0, 1], without augmentation.

        Returns:
            "loss", the cross-entropy, ln 4 at chance level, and "accuracy", 0 to 1, over 4B images.
        """
        rotated, rotations = rotate_four(images)
        logits = self.head(self.encoder.cls_tokens(normalize(rotated))).float()  # (4B, 4)
        accuracy = (logits.argmax(dim=1) == rotations).float().mean()
        return {"loss": F.cross_entropy(logits, rotations), "accuracy": accuracy}

    def num_candidates(self, batch_size: int) -> dict[str, int]:
        return {"loss": 4}
