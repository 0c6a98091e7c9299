"""Patches, their positions, and patch grids at another size, compared with Pillow, transformers and loops."""

import torch
from torch import Tensor

from minissl.methods.dinov3 import resize_patch_grid
from minissl.methods.mae import masked_pixel_loss
from minissl.methods.rotation import rotate_four
from minissl.models.position_encoding import (
    RopeAugmentation,
    apply_rope,
    augment_coordinates,
    patch_coordinates,
    resample_pos_embed,
    rope_angles,
)
from minissl.models.vit import patchify, unpatchify
from tests.parity.ledger import RandomInputs, Sides, comparison


def cubic_weights(target: int, source: int, step: float) -> Tensor:
    """Return weights (target, source) of Keys' cubic kernel, a = -0.75, on four pixels; the edge pixel is repeated."""
    weights = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        center = (i + 0.5) * step - 0.5
        first = int(center // 1) - 1
        for tap in range(first, first + 4):
            x = abs(center - tap)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
            weights[i, min(max(tap, 0), source - 1)] += near if x <= 1 else far
    return weights


def apply_separable(row_weights: Tensor, grids: Tensor, column_weights: Tensor) -> Tensor:
    return torch.einsum("i y, j x, b y x d -> b i j d", row_weights.to(grids), column_weights.to(grids), grids)


@comparison("patch grid of the Gram teacher, downsampled", "explicit loop", resize_patch_grid, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    high, wide, d = rng.integer(4, 8), rng.integer(4, 8), rng.integer(1, 3)
    grid, patches = (rng.integer(2, high - 1), rng.integer(2, wide - 1)), rng.normal(1, high, wide, d)

    def expected() -> Tensor:
        rows, columns = cubic_weights(grid[0], high, high / grid[0]), cubic_weights(grid[1], wide, wide / grid[1])
        return apply_separable(rows, patches.double(), columns)

    return Sides(lambda: resize_patch_grid(patches, grid), expected)


@comparison("learned position embeddings, resampled", "explicit loop", resample_pos_embed, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """DINO's code adds a tenth of a patch to the target size, which changes the step.

    The grid of training is left out: the ViT does not resample it, and torch's gradient there ignores the step.
    """
    side, h, d = rng.integer(3, 7), rng.integer(2, 9), rng.integer(1, 5)
    w = side + rng.choice(-1, 1, 2)
    pos_embed = rng.leaf(1, 1 + side**2, d)

    def expected() -> Tensor:
        grid = pos_embed[:, 1:].unflatten(1, (side, side))
        rows, columns = cubic_weights(h, side, side / (h + 0.1)), cubic_weights(w, side, side / (w + 0.1))
        return torch.cat([pos_embed[:, :1], apply_separable(rows, grid, columns).flatten(1, 2)], dim=1)

    return Sides(lambda: resample_pos_embed(pos_embed, h, w, antialias=False), expected, [pos_embed])


@comparison("learned position embeddings, resampled with antialiasing", "pillow", resample_pos_embed, fp64=None,
            fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    import numpy as np
    from PIL import Image

    side, h, w, d = rng.integer(3, 7), rng.integer(2, 9), rng.integer(2, 9), rng.integer(1, 5)
    pos_embed = rng.normal(1, 1 + side**2, d)

    def expected() -> Tensor:
        channels = [Image.fromarray(x.reshape(side, side).numpy()) for x in pos_embed[0, 1:].T]
        resized = [np.array(channel.resize((w, h), Image.Resampling.BICUBIC)).ravel() for channel in channels]
        return torch.cat([pos_embed[0, :1], torch.from_numpy(np.stack(resized, axis=-1))])[None]

    return Sides(lambda: resample_pos_embed(pos_embed, h, w, antialias=True), expected)


@comparison("RoPE", "explicit loop", patch_coordinates, rope_angles, apply_rope, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """Two channels, half a head apart, are one complex number, which is multiplied by exp(i angle)."""
    h, w, quarter, extra = rng.integer(1, 4), rng.integer(2, 4), rng.integer(1, 3), rng.integer(0, 2)
    d, x = 4 * quarter, rng.leaf(2, rng.integer(1, 2), extra + h * w, 4 * quarter)

    def rotate(row: Tensor, y: float, x_coordinate: float) -> Tensor:
        for i in range(2 * quarter):
            period = 100 ** ((i % quarter) / quarter)
            coordinate = y if i < quarter else x_coordinate
            angle = torch.tensor(2 * torch.pi * coordinate / period, dtype=torch.float64)
            pair = torch.complex(row[..., i], row[..., i + d // 2]) * torch.polar(torch.ones_like(angle), angle)
            rotated = {i: pair.real, i + d // 2: pair.imag}
            row = torch.stack([rotated.get(j, row[..., j]) for j in range(d)], dim=-1).to(x.dtype)
        return row

    def expected() -> Tensor:
        coordinates = [((n // w + 0.5) * 2 / h - 1, (n % w + 0.5) * 2 / w - 1) for n in range(h * w)]
        rows = [rotate(x[:, :, extra + n], *point) for n, point in enumerate(coordinates)]
        return torch.cat([x[:, :, :extra], torch.stack(rows, dim=2)], dim=2)

    return Sides(lambda: apply_rope(x, rope_angles(patch_coordinates((h, w)), d)), expected, [x])


@comparison("RoPE coordinate augmentation", "formula", augment_coordinates, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    points = rng.normal(rng.integer(2, 9), 2)
    options = RopeAugmentation(rng.number(0.1, 1), rng.number(1.1, 3), rng.number(1.1, 3))

    def actual() -> Tensor:
        torch.manual_seed(rng.seed)
        return augment_coordinates(points, options)

    def expected() -> Tensor:
        torch.manual_seed(rng.seed)
        shift, jitter, rescale = (torch.rand(n) * 2 - 1 for n in (2, 2, 1))
        return (points + shift * options.shift) * options.jitter**jitter * options.rescale**rescale

    return Sides(actual, expected)


@comparison("masked pixel loss", "explicit loop", masked_pixel_loss, patchify, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    b, p, h, w = rng.integer(1, 3), rng.integer(2, 4), rng.integer(1, 3), rng.integer(2, 3)
    images, normalize = rng.normal(b, 3, h * p, w * p), rng.choice(True, False)
    prediction, mask = rng.leaf(b, h * w, p * p * 3), rng.mask(b, h * w)
    mask[0, 0] = True

    def expected() -> Tensor:
        errors = []
        for i, n in mask.nonzero().tolist():
            y, x = n // w * p, n % w * p
            pixels = images[i, :, y : y + p, x : x + p].permute(1, 2, 0).flatten()
            if normalize:
                mean = sum(pixels) / len(pixels)
                variance = sum((pixel - mean) ** 2 for pixel in pixels) / (len(pixels) - 1)
                pixels = (pixels - mean) / (variance + 1e-6) ** 0.5
            errors.append(sum((prediction[i, n] - pixels) ** 2) / len(pixels))
        return sum(errors) / len(errors)

    return Sides(lambda: masked_pixel_loss(prediction, images, mask, p, normalize), expected, [prediction])


@comparison("patchify and unpatchify", "transformers", patchify, unpatchify, slow=True)
def _(rng: RandomInputs) -> Sides:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    p, side = rng.integer(2, 4), rng.integer(2, 4)
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    options |= {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    reference = ViTMAEForPreTraining(ViTMAEConfig(**options, image_size=p * side, patch_size=p))
    images, patches = rng.normal(2, 3, p * side, p * side), rng.normal(2, side**2, p * p * 3)
    return Sides(
        lambda: [patchify(images, p), unpatchify(patches, p, (side, side))],
        lambda: [reference.patchify(images), reference.unpatchify(patches)],
    )


@comparison("images rotated by 0, 90, 180, 270 degrees", "numpy", rotate_four)
def _(rng: RandomInputs) -> Sides:
    import numpy as np

    images = rng.normal(rng.integer(1, 4), rng.integer(1, 3), *[rng.integer(2, 9)] * 2)

    def expected() -> list[Tensor]:
        rotated = [np.rot90(image.numpy(), turns, axes=(1, 2)).copy() for turns in range(4) for image in images]
        return [torch.from_numpy(np.stack(rotated)), torch.arange(4 * len(images)) // len(images)]

    return Sides(lambda: rotate_four(images), expected)
