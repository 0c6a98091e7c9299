"""Rotation prediction: classify by how many quarter turns an image was rotated.

Gidaris et al., Unsupervised Representation Learning by Predicting Image Rotations, 2018 (arXiv:1803.07728). The pretext
task needs no labels: the rotation is the label, and recognizing it requires knowing how objects usually stand.

Shapes: B images (B, 3, S, S), D the encoder's width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize
from minissl.methods.base import PretextMethod
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


class Rotation(PretextMethod):
    """Classify the rotation of images, one of four.

    Args:
        encoder: maps normalized images to Tokens; its class token is classified.
        options: those of `PretextMethod`.
    """

    def __init__(self, encoder: Encoder, **options: Any):
        super().__init__(encoder, **options)
        self.head = nn.Linear(encoder.embed_dim, 4)

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
