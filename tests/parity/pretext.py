"""Pretext tasks and the head of dino.txt, on encoders with given outputs, compared with loops and libraries.

The losses are computed in float32 in any precision, so they are not compared in fp64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.lab_color import (
    annealed_mean,
    gamut_bins,
    lab_to_rgb,
    rebalancing_weights,
    rgb_to_lab,
    soft_encode,
)
from minissl.methods.colorization import Colorization
from minissl.methods.dinotxt import DINOtxt
from minissl.methods.inpainting import ContextEncoder
from minissl.methods.rotation import Rotation
from minissl.models.outputs import Encoder, Tokens
from tests.parity.ledger import RandomInputs, Sides, comparison
from tests.parity.losses import log_prob
from tests.parity.networks import bind_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def normalize_by_formula(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x, dtype=images.dtype).view(3, 1, 1) for x in (MEAN, STD))
    return (images - mean) / std


class FixedPatches(Encoder):
    """Encoder that returns given patches, whatever the images."""

    def __init__(self, patches: Tensor, patch_size: int):
        super().__init__()
        self.embed_dim, self.patch_size = patches.shape[-1], patch_size
        self.patches = patches

    def forward(self, images: Tensor) -> Tokens:
        return Tokens(self.patches.mean(dim=(1, 2)), self.patches)


class FirstPixels(Encoder):
    """Encoder whose class token is the first values of the image."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim, self.patch_size = embed_dim, 1

    def forward(self, images: Tensor) -> Tokens:
        return Tokens(images.flatten(1)[:, : self.embed_dim], images.permute(0, 2, 3, 1))


def rgb_to_lab_by_skimage(images: Tensor) -> Tensor:
    """Convert (..., 3, H, W) in [0, 1]; float64."""
    from skimage.color import rgb2lab

    return torch.from_numpy(rgb2lab(images.double().numpy(), channel_axis=-3))


@comparison("RGB to Lab", "skimage", rgb_to_lab, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """Half of the images are dark, where the formula is linear."""
    brightness = torch.tensor([1.0, 0.05]).view(2, 1, 1, 1).to(rng.dtype)
    images = rng.uniform(2, 3, rng.integer(2, 9), rng.integer(2, 9)) * brightness
    return Sides(lambda: rgb_to_lab(images), lambda: rgb_to_lab_by_skimage(images))


@comparison("Lab to RGB", "skimage", lab_to_rgb, fp64=1e-6, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """Colors inside the gamut."""
    from skimage.color import lab2rgb

    lab = rgb_to_lab_by_skimage(rng.uniform(2, 3, rng.integer(2, 9), rng.integer(2, 9), low=0.05, high=0.95))
    return Sides(lambda: lab_to_rgb(lab.to(rng.dtype)), lambda: torch.from_numpy(lab2rgb(lab.numpy(), channel_axis=1)))


@comparison("bins of the color gamut", "skimage", gamut_bins, fp64=1e-6)
def _(rng: RandomInputs) -> Sides:
    step = rng.integer(6, 20)

    def expected() -> Tensor:
        levels = [i / 85 for i in range(86)]
        colors = torch.cartesian_prod(*[torch.tensor(levels, dtype=torch.float64)] * 3)
        surface = colors[((colors == 0) | (colors == 1)).any(dim=1)]
        ab = rgb_to_lab_by_skimage(surface.T[:, :, None])[1:, :, 0].T
        return torch.tensor(sorted({tuple(x) for x in (ab / step).round().mul(step).add(0.0).tolist()}))

    return Sides(lambda: gamut_bins(step), expected)


@comparison("soft encoding of colors, and annealed mean", "explicit loop", soft_encode, annealed_mean, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    n, q, num_nearest = rng.integer(2, 6), rng.integer(9, 20), rng.integer(1, 6)
    sigma, t = rng.number(3, 9), rng.number(0.2, 1)
    ab, bins, logits = rng.uniform(n, 2, low=-50, high=50), rng.uniform(q, 2, low=-50, high=50), rng.leaf(n, q)

    def expected() -> list[Tensor]:
        indices, weights, means = [], [], []
        for point, point_logits in zip(ab, logits):
            distances = [float(((point - b) ** 2).sum()) for b in bins]
            nearest = sorted(range(q), key=distances.__getitem__)[:num_nearest]
            kernel = [math.exp((distances[nearest[0]] - distances[i]) / (2 * sigma**2)) for i in nearest]
            indices.append(nearest)
            weights.append([k / sum(kernel) for k in kernel])
            scaled = list(point_logits / t)
            means.append(sum(log_prob(scaled, i).exp() * b for i, b in enumerate(bins)))
        return [torch.tensor(indices), torch.tensor(weights, dtype=torch.float64), torch.stack(means)]

    def actual() -> list[Tensor]:
        return [*soft_encode(ab, bins, num_nearest, sigma), annealed_mean(logits, bins, t)]

    return Sides(actual, expected)


@comparison("rebalancing weights of rare colors", "formula", rebalancing_weights, fp64=1e-6, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    q, mixture = rng.integer(3, 20), rng.number(0.1, 0.9)
    fractions = rng.uniform(q) * rng.mask(q, fraction=0.7)
    fractions[0] = 0.5
    fractions = fractions / fractions.sum()

    def expected() -> Tensor:
        p = fractions.tolist()
        weights = [1 / ((1 - mixture) * x + mixture / sum(y > 0 for y in p)) if x else 0.0 for x in p]
        return torch.tensor(weights, dtype=torch.float64) / sum(w * x for w, x in zip(weights, p))

    return Sides(lambda: rebalancing_weights(fractions, mixture), expected)


def colorization_inputs(rng: RandomInputs, max_batch: int) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Sample patches (B, h, w, D) and images (B, 3, 4h, 4w); list the cells (image, row, column) of 2 x 2 pixels."""
    b, h, w, d = rng.integer(1, max_batch), rng.integer(1, 3), rng.integer(1, 3), rng.integer(3, 6)
    cells = [(i, y, x) for i in range(b) for y in range(2 * h) for x in range(2 * w)]
    return rng.leaf(b, h, w, d), rng.uniform(b, 3, 4 * h, 4 * w), cells


def cell_ab(images: Tensor, i: int, y: int, x: int) -> Tensor:
    """Return a and b (2,) of the mean color of a cell."""
    pixels = images[i, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(1, 2))
    return rgb_to_lab_by_skimage(pixels[:, None, None])[1:, 0, 0]


def cell_outputs(method: Colorization, patches: Tensor, i: int, y: int, x: int) -> Tensor:
    """Return the head's outputs for a cell."""
    outputs = F.linear(patches[i, y // 2, x // 2], method.head.weight, method.head.bias).view(4, -1)
    return outputs[y % 2 * 2 + x % 2]


@comparison("colorization loss, classification", "skimage", Colorization, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    patches, images, cells = colorization_inputs(rng, 2)
    method = rng.randomize(Colorization(FixedPatches(patches, 4), regression=False))
    method.class_weights.copy_(rng.uniform(len(method.class_weights), low=0.5, high=2))

    def expected() -> Tensor:
        total = 0.0
        for cell in cells:
            distances = ((cell_ab(images, *cell) - method.bins) ** 2).sum(dim=1)
            nearest = distances.argsort()[:5]
            targets = (-distances[nearest] / 50).softmax(dim=0)
            log_probs = cell_outputs(method, patches, *cell).log_softmax(dim=-1)
            total = total - method.class_weights[nearest[0]] * (targets.to(log_probs) * log_probs[nearest]).sum()
        return total / len(cells)

    return Sides(lambda: method.loss_on_crops(images)["loss"], expected, [patches, *method.parameters()])


@comparison("colorization loss, regression", "skimage", Colorization, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    patches, images, cells = colorization_inputs(rng, 3)
    method = rng.randomize(Colorization(FixedPatches(patches, 4), regression=True))

    def expected() -> Tensor:
        errors = []
        for cell in cells:
            prediction = cell_outputs(method, patches, *cell)
            errors.append((prediction - cell_ab(images, *cell).to(prediction) / 110).square().mean())
        return sum(errors) / len(errors)

    return Sides(lambda: method.loss_on_crops(images)["loss"], expected, [patches, *method.parameters()])


@comparison("inpainting loss", "explicit loop", ContextEncoder, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, p, d = rng.integer(1, 3), rng.choice(2, 4, 8), rng.integer(3, 6)
    side = rng.choice(16, 24)
    grid = side // p
    patches, images = rng.leaf(b, grid, grid, d), rng.uniform(b, 3, side, side)
    method = rng.randomize(ContextEncoder(FixedPatches(patches, p), crop_size=side))
    first, _, second = method.head

    def expected() -> Tensor:
        start, end, pixels = side // 4, side - side // 4, normalize_by_formula(images)
        outputs = F.linear(F.gelu(F.linear(patches, first.weight, first.bias)), second.weight, second.bias)
        outputs, total, total_weight = outputs.unflatten(-1, (p, p, 3)), 0.0, 0.0
        for y in range(start, end):
            for x in range(start, end):
                weight = 1 if start + 2 <= y < end - 2 and start + 2 <= x < end - 2 else 10
                error = outputs[:, y // p, x // p, y % p, x % p] - pixels[:, :, y, x]
                total, total_weight = total + weight * error.square().mean(), total_weight + weight
        return total / total_weight

    return Sides(lambda: method.loss_on_crops(images)["loss"], expected, [patches, *method.parameters()])


@comparison("rotation prediction loss", "numpy", Rotation, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    import numpy as np

    b, side, d = rng.integer(1, 4), rng.integer(3, 6), rng.integer(3, 9)
    images = rng.uniform(b, 3, side, side)
    method = rng.randomize(Rotation(FirstPixels(d)))

    def expected() -> Tensor:
        total = 0.0
        for image in images:
            for rotation in range(4):
                rotated = torch.from_numpy(np.rot90(image.numpy(), rotation, (1, 2)).copy())
                features = normalize_by_formula(rotated).flatten()[:d]
                logits = F.linear(features, method.head.weight, method.head.bias)
                total = total - log_prob(list(logits), rotation) / (4 * b)
        return total

    return Sides(lambda: method.loss_on_crops(images)["loss"], expected, list(method.parameters()))


@comparison("dino.txt embeddings of images and patches", "torch", DINOtxt.embed_images, DINOtxt.embed_patches,
            fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    b, h, w, d = rng.integer(1, 3), rng.integer(1, 3), rng.integer(1, 3), 4 * rng.integer(2, 6)
    embed_dim = rng.integer(3, 9)
    patches = rng.normal(b, h, w, d)
    text = {"text_width": 8, "text_layers": 1, "text_heads": 1, "context_length": 4, "vocab_size": 520}
    head_depth = rng.integer(1, 2)
    method = rng.randomize(DINOtxt(FixedPatches(patches, 4), head_depth=head_depth, embed_dim=embed_dim, **text))
    layer = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    module = nn.TransformerEncoder(layer, head_depth, nn.LayerNorm(d), enable_nested_tensor=False).to(rng.dtype)
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}
    state = {f"layers.{name}": p for name, p in method.head.named_parameters()}
    reference = bind_weights(module, state, names | {f"layers.{head_depth}.": "norm."})
    weight = method.visual_projection.weight

    def expected() -> list[Tensor]:
        x = reference(torch.cat([patches.mean(dim=(1, 2))[:, None], patches.flatten(1, 2)], dim=1))
        first, second = weight.split(d, dim=1)
        return [x[:, 0] @ first.T + x[:, 1:].mean(dim=1) @ second.T, (x[:, 1:] @ second.T).unflatten(1, (h, w))]

    inputs = [weight, *method.head.parameters()]
    return Sides(lambda: [method.embed_images(patches), method.embed_patches(patches)], expected, inputs)
