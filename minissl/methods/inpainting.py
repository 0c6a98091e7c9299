"""Inpainting: predict the masked central region of an image from its surroundings.

Pathak et al., Context Encoders: Feature Learning by Inpainting, 2016 (arXiv:1604.07379), without the adversarial loss.
The region, the hole, has half the image's side. Its outermost two pixels have ten times the weight in the loss, so that
the prediction continues the surroundings. In the authors' code the encoder sees this border; here it is masked too.

Shapes: B images (B, 3, S, S), patches of p x p pixels, a grid (h, w) of N = hw patches, D the encoder's width.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize
from minissl.methods.base import PretextMethod
from minissl.models.outputs import Encoder
from minissl.models.vit import unpatchify

BORDER_WEIGHT = 10  # the paper's
BORDER_PIXELS = 2  # 4 of 128 pixels in the paper


class ContextEncoder(PretextMethod):
    """Predict the pixels of a central hole by regression.

    Args:
        encoder: maps normalized images to Tokens; pixels are predicted from its patch tokens.
        options: those of `PretextMethod`; `crop_size` is a multiple of the encoder's patch size.

    Raises:
        InputError: if `crop_size` is not a multiple of the encoder's patch size.
    """

    def __init__(self, encoder: Encoder, **options: Any):
        super().__init__(encoder, **options)
        self.check_crop_size()
        self.patch_size, hidden_dim = encoder.patch_size, 4 * encoder.embed_dim
        self.head = nn.Sequential(
            nn.Linear(encoder.embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, self.patch_size**2 * 3)
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
