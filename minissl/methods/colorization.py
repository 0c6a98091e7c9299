"""Colorization: predict the color of each image region from the grayscale image.

Zhang, Isola and Efros, Colorful Image Colorization, 2016 (arXiv:1603.08511). The paper classifies colors into bins of
the (a, b) plane and gives rare colors a larger weight. Regression of a and b is included for comparison: it predicts
the conditional mean of the colors, which is grayish. The paper's input is the lightness L of CIE Lab; here it is the
luma of ITU-R 601, repeated in three channels.

Shapes: B images (B, 3, H, W), a grid (h, w) of patches, D the encoder's width, Q color bins, c x c cells of each patch,
n nearest bins.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize, rgb_to_grayscale, to_float
from minissl.data.transforms.lab_color import (
    annealed_mean,
    gamut_bins,
    lab_to_rgb,
    rebalancing_weights,
    rgb_to_lab,
    soft_encode,
)
from minissl.methods.base import PretextMethod
from minissl.models.outputs import Encoder

CELLS = 2  # c: colors are predicted for 2 x 2 cells of a patch, of 4 x 4 pixels each for patches of 8
MAX_AB = 110  # regression targets are divided by this, so that they are in about [-1, 1]
NUM_IMAGES = 2000  # whose colors `prepare` counts


class Colorization(PretextMethod):
    """Predict color bins, or a and b, from grayscale images.

    Args:
        encoder: maps normalized images to Tokens; colors are predicted from its patch tokens.
        regression: predict a and b by regression, instead of a distribution over color bins.
        options: those of `PretextMethod`.
    """

    bins: Tensor  # (Q, 2)
    class_weights: Tensor  # (Q,)

    def __init__(self, encoder: Encoder, *, regression: bool = False, **options: Any):
        super().__init__(encoder, **options)
        self.regression = regression
        self.register_buffer("bins", gamut_bins())
        self.register_buffer("class_weights", torch.ones(len(self.bins)))
        self.head = nn.Linear(encoder.embed_dim, CELLS**2 * (2 if regression else len(self.bins)))

    @torch.no_grad()
    def prepare(self, dataset: Any) -> None:
        """Compute the loss weight of each color bin, larger for rarer colors, from at most 2000 training images."""
        images = to_float(dataset.subsample(NUM_IMAGES).images)
        images = F.adaptive_avg_pool2d(images, 8).to(self.bins.device)  # the data set may be on another device
        ab = rgb_to_lab(images)[:, 1:].permute(0, 2, 3, 1).reshape(-1, 2)
        index, weights = soft_encode(ab, self.bins)
        counts = torch.zeros_like(self.class_weights).index_add(0, index.flatten(), weights.flatten())
        self.class_weights.copy_(rebalancing_weights(counts / counts.sum()))

    def predict(self, images: Tensor) -> Tensor:
        """Predict colors from the grayscale version of images.

        Args:
            images: (B, 3, H, W) float in [0, 1], not normalized.

        Returns:
            (B, c h, c w, Q) float32 logits of the bins; with `regression` (B, c h, c w, 2), a and b divided by 110.
        """
        gray = normalize(rgb_to_grayscale(images).expand_as(images))
        x = self.head(self.encoder(gray).patches).float()  # (B, h, w, c c Q)
        x = x.unflatten(-1, (CELLS, CELLS, -1))  # (B, h, w, c, c, Q)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def loss_on_crops(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the loss on images (B, 3, S, S) float in [0, 1], without augmentation.

        Returns:
            "loss", the cross-entropy of the bins in nats, weighted by `class_weights` (equation 2), a mean over cells;
            with `regression`, the mean squared error of a and b divided by 110.
        """
        predictions = self.predict(images)  # (B, c h, c w, Q)
        cells = F.adaptive_avg_pool2d(images, (predictions.shape[1], predictions.shape[2]))
        ab = rgb_to_lab(cells)[:, 1:].permute(0, 2, 3, 1)  # (B, c h, c w, 2)
        if self.regression:
            return {"loss": F.mse_loss(predictions, ab / MAX_AB)}
        index, targets = soft_encode(ab.reshape(-1, 2), self.bins)  # (N, n)
        log_probs = predictions.flatten(0, 2).log_softmax(dim=-1).gather(1, index)  # (N, n)
        nearest_bin = index[:, 0]
        return {"loss": -(self.class_weights[nearest_bin] * (targets * log_probs).sum(1)).mean()}

    @torch.no_grad()
    def colorize(self, images: Tensor, temperature: float = 0.38) -> Tensor:
        """Replace the colors of images by the predicted ones; the lightness of the grayscale version is kept.

        Args:
            images: (B, 3, H, W) in [0, 1].
            temperature: of the annealed mean over bins, see `lab_color.annealed_mean`; regression ignores it.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        predictions = self.predict(images)
        ab = predictions * MAX_AB if self.regression else annealed_mean(predictions, self.bins, temperature)
        ab = F.interpolate(ab.permute(0, 3, 1, 2), size=images.shape[-2:], mode="bilinear")
        lightness = rgb_to_lab(rgb_to_grayscale(images).expand_as(images))[:, :1]
        return lab_to_rgb(torch.cat([lightness, ab], dim=1))
