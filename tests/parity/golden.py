"""Golden numbers: outputs of the authors' own functions on deterministic sine inputs, as far as they were recorded.

The authors' code was run once; it is not part of this repository. The numbers have eight digits, some of them five.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl import evaluation
from minissl.data.transforms.masking import block_masks
from minissl.methods.clip import clip_loss
from minissl.methods.dino import center_and_sharpen, dino_loss, update_center
from minissl.methods.dinov2 import ibot_patch_loss
from minissl.methods.dinov3 import gram_loss, resize_patch_grid
from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from minissl.methods.mae import masked_pixel_loss
from minissl.methods.simclr import nt_xent
from minissl.models.position_encoding import apply_rope, patch_coordinates, resample_pos_embed, rope_angles
from minissl.models.vit import patchify
from minissl.training.schedules import cosine, linear, warmup_cosine
from tests.golden import wave
from tests.parity.ledger import GOLDEN, RandomInputs, Sides, comparison


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assignments() -> Tensor:
    """Return Sinkhorn-Knopp assignments (6, 8)."""
    return sinkhorn_knopp(wave(6, 8, c=0.9, phase=0.2), 0.07)


@comparison("NT-Xent, temperatures 0.5, 0.1, 0.07", GOLDEN, nt_xent, fp64=1e-8)
def _(rng: RandomInputs) -> Sides:
    views = wave(4, 8), wave(4, 8, phase=0.5)
    return Sides(
        lambda: torch.stack([nt_xent(*views, t) for t in (0.5, 0.1, 0.07)]),
        lambda: numbers(1.36053224, 1.24435718, 1.45774209),
    )


@comparison("CLIP loss", GOLDEN, clip_loss, fp64=1e-8)
def _(rng: RandomInputs) -> Sides:
    return Sides(lambda: clip_loss(wave(4, 8), wave(4, 8, phase=0.5), 1 / 0.07), lambda: 1.36494888)


@comparison("masked pixel loss, and patchify", GOLDEN, masked_pixel_loss, patchify, fp64=1e-7)
def _(rng: RandomInputs) -> Sides:
    images, prediction = wave(2, 3, 8, 8, c=0.37), wave(2, 4, 48, c=0.11)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])

    def actual() -> list[Tensor]:
        losses = [masked_pixel_loss(prediction, images, mask, 4, normalize) for normalize in (True, False)]
        return [torch.stack(losses), patchify(images, 4)[0, 1, :6]]

    first = numbers(0.99588084, 0.02725540, -0.98946051, 0.96127520, 0.38689204, -0.87013809)
    return Sides(actual, lambda: [numbers(1.49852178, 1.02068374), first])


@comparison("DINO loss, and its center", GOLDEN, dino_loss, center_and_sharpen, update_center, linear, fp64=1e-6)
def _(rng: RandomInputs) -> Sides:
    student, teacher, center = 2 * wave(4, 3, 16), 2 * wave(2, 3, 16, c=0.9, phase=0.2), 0.1 * wave(1, 16, c=0.3)

    def actual() -> list[Tensor]:
        target = center_and_sharpen(teacher, center, linear(0.04, 0.07, 1 / 2))  # the second of three epochs
        updated = update_center(center, teacher, 0.9)
        return [dino_loss(student, target, 0.1), updated[0, :4], updated.sum()]

    return Sides(actual, lambda: [20.42619324, numbers(0.02952958, 0.04329170, 0.04204365, 0.04289632), 0.36289691])


@comparison("iBOT losses of class token and patches, and center of the patches", GOLDEN, dino_loss,
            ibot_patch_loss, update_center, fp64=1e-6)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    student, patches, local = 2 * wave(4, 16), 2 * wave(4, 4, 16, c=0.6), 2 * wave(2, 16, c=1.1)
    teacher, teacher_patches = 2 * wave(4, 16, c=0.9, phase=0.2), 2 * wave(4, 4, 16, c=0.8, phase=0.3)
    masks = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)

    def actual() -> list[Tensor]:
        zero = torch.zeros(1, 16, dtype=torch.float64)
        target = center_and_sharpen(teacher, zero, 0.04).unflatten(0, (2, 2))
        cls_loss = dino_loss(torch.cat([student, local]).unflatten(0, (3, 2)), target)
        patch_target = center_and_sharpen(teacher_patches, zero, 0.07)[masks]
        patch_loss = ibot_patch_loss(patches[masks], patch_target, masks)
        return [cls_loss, patch_loss, cls_loss + patch_loss, update_center(zero, teacher_patches)[0, :3]]

    first = numbers(0.09086393, 0.02925309, -0.05010228)
    return Sides(actual, lambda: [20.69134857, 12.20627368, 32.89762225, first])


@comparison("warmup and cosine schedules, both ways to count steps", GOLDEN, warmup_cosine, cosine, fp64=1e-5)
def _(rng: RandomInputs) -> Sides:
    """In DINO and DINOv2 the last step is one before the end of the schedule; in DINOv3 it is the end."""

    def actual() -> list[Tensor]:
        first = [warmup_cosine(0.0, 1.0, 0.1, i / 10, 0.2) for i in range(2, 11)]
        second = [cosine(1.0, 0.1, i / 7) for i in range(8)]
        gram_loss_weight = [cosine(0.0, 1.25, i / 3) for i in range(5)]
        return [numbers(*first), numbers(*second), numbers(*gram_loss_weight)]

    first = numbers(1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254, 0.1)
    second = numbers(1, 0.955436, 0.83057, 0.650134, 0.449866, 0.26943, 0.144564, 0.1)
    return Sides(actual, lambda: [first, second, numbers(0, 0.3125, 0.9375, 1.25, 1.25)])


@comparison("Sinkhorn-Knopp", GOLDEN, sinkhorn_knopp, fp64=1e-4)
def _(rng: RandomInputs) -> Sides:
    """The large and the small entries of the first row, and the sums of all columns and rows."""
    large = numbers(0.33337560, 0.66656083)
    columns = numbers(0.67647, 0.66177, 0.66677, 0.81802, 0.87459, 0.85606, 0.77187, 0.67445)
    small = numbers(1.7152e-5, 2.4700e-5, 2.1704e-5)

    def actual() -> list[Tensor]:
        q = assignments()
        return [q[0, 1:3], q.sum(0), q.sum(1), q[0, [0, 3, 7]]]

    return Sides(actual, lambda: [large, columns, torch.ones(6), small])


@comparison("class-token loss of DINOv2 and DINOv3", GOLDEN, dino_loss, fp64=1e-6)
def _(rng: RandomInputs) -> Sides:
    """`dino_loss` skips pairs of a crop with itself; passed as local crops, after two others, all pairs count."""

    def mean_of_all_pairs(crops: Tensor) -> Tensor:
        views, target = torch.cat([wave(2, 3, 8), crops]), assignments().view(2, 3, 8)
        local = dino_loss(views, target) - dino_loss(views, target, local_loss_weight=0.0)
        return local * (2 * len(views) - 2) / (2 * len(crops))

    def actual() -> list[Tensor]:
        sum_of_four = 4 * mean_of_all_pairs(torch.stack([wave(3, 8), wave(3, 8, phase=0.4)]))
        without_same = dino_loss(wave(2, 3, 8), assignments().view(2, 3, 8))
        return [sum_of_four, without_same, mean_of_all_pairs(wave(2, 3, 8)), mean_of_all_pairs(wave(4, 3, 8))]

    return Sides(actual, lambda: [35.91656800, 9.09590816, 9.38280010, 9.69242668])


@comparison("iBOT patch loss, in DINOv2's form", GOLDEN, ibot_patch_loss, fp64=1e-6)
def _(rng: RandomInputs) -> Sides:
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)

    def actual() -> Tensor:
        return ibot_patch_loss(wave(5, 8), sinkhorn_knopp(wave(5, 8, c=0.9, phase=0.2), 0.07), masks)

    return Sides(actual, lambda: 6.98835330)


@comparison("KoLeo loss, and of two equal features", GOLDEN, koleo_loss, fp64=1e-7)
def _(rng: RandomInputs) -> Sides:
    return Sides(
        lambda: [koleo_loss(wave(5, 8)), koleo_loss(wave(1, 8).expand(2, 8))], lambda: [0.42841986, 17.0782267]
    )


@comparison("Gram loss, four ways, per image and per batch", GOLDEN, gram_loss, fp64=1e-6)
def _(rng: RandomInputs) -> Sides:
    student, anchor = wave(2, 5, 8), wave(2, 5, 8, c=0.9, phase=0.2)
    options = [{}, {"negatives": "drop"}, {"negatives": "drop anchor's"}, {"normalize": False}]
    per_image, per_batch = (student, anchor), (student.view(1, 10, 8), anchor.view(1, 10, 8))

    def actual() -> list[Tensor]:
        return [torch.stack([gram_loss(*pair, **choice) for choice in options]) for pair in (per_image, per_batch)]

    def expected() -> list[Tensor]:
        by_image = numbers(0.09403699, 0.02033243, 0.12645595, 1.68827450)
        return [by_image, numbers(0.35115761, 0.12131894, 0.43801993, 5.83778334)]

    return Sides(actual, expected)


@comparison("RoPE", GOLDEN, patch_coordinates, rope_angles, apply_rope, fp64=1e-6)
def _(rng: RandomInputs) -> Sides:
    def actual() -> list[Tensor]:
        angles = rope_angles(patch_coordinates((2, 3)), 8)
        rotated = apply_rope(wave(8).expand(1, 1, 6, 8), angles)[0, 0, 1]
        return [angles.sin[1, :4], angles.cos[1, :4], rotated, patch_coordinates((2, 4)).T]

    def expected() -> list[Tensor]:
        rotated = numbers(0, 0.50428945, 0.98544973, 0.86320937, -0.33498815, -0.53268886, -0.87157577, -0.98245263)
        coordinates = numbers(*[-0.5] * 4, *[0.5] * 4, *[-0.75, -0.25, 0.25, 0.75] * 2).view(2, 8)
        return [numbers(0, -0.30901700, 0, 0), numbers(-1, 0.95105654, 1, 1), rotated, coordinates]

    return Sides(actual, expected)


@comparison("RoPE periods of a head of width 64", GOLDEN, rope_angles, fp64=1e-4)
def _(rng: RandomInputs) -> Sides:
    """The periods were recorded with five digits; compared are the cosines of their angles at the edge of an image."""
    periods = numbers(1, 1.33352, 1.77828, 2.37137, 3.16228, 74.98942)

    def actual() -> Tensor:
        return rope_angles(numbers(1, 0)[None], 64).cos[0, [0, 1, 2, 3, 4, 15]]

    return Sides(actual, lambda: (2 * torch.pi / periods).cos())


@comparison("number of masked patches, means of 1,000 samples", GOLDEN, block_masks, fp64=5e-4)
def _(rng: RandomInputs) -> Sides:
    """DINOv2's rectangles on four grids; the random means differ by some hundredths of a patch, of 128 at most."""
    sides, targets = (16, 16, 16, 8, 8, 7, 4, 4), (25, 76, 128, 6, 32, 24, 1, 8)

    def actual() -> list[Tensor]:
        masks = [block_masks(1000, (n, n), (t + 0.01) / n**2, random.Random(0)) for n, t in zip(sides, targets)]
        counts = [mask.flatten(1).sum(dim=1).double() for mask in masks]
        return [torch.stack([c.mean() for c in counts]), torch.stack([c.max() for c in counts])]

    return Sides(actual, lambda: [numbers(24.90, 75.92, 127.92, 5.98, 31.95, 23.97, 0.71, 7.99), numbers(*targets)])


@comparison("patch grids resampled in three ways", GOLDEN, resample_pos_embed, resize_patch_grid, fp64=2e-5)
def _(rng: RandomInputs) -> Sides:
    """With DINO's step, by size as in DINOv3, and antialiased."""
    grid = wave(4, 4, c=1.3)
    pos_embed = torch.cat([torch.ones(1, 1, 1), grid.float().view(1, 16, 1)], dim=1)

    def actual() -> list[Tensor]:
        grids = [resize_patch_grid(grid[None, :, :, None], (size, size)).flatten()[:4] for size in (2, 6)]
        for antialias in (False, True):
            grids += [resample_pos_embed(pos_embed, size, size, antialias)[0, 1:5, 0] for size in (2, 6)]
        return grids

    def expected() -> list[Tensor]:
        by_size = [numbers(0.10478, 0.29437, -0.72011, 0.43022), numbers(-0.00594, 0.60464, 1.05318, 0.67814)]
        by_step = [numbers(0.09102, 0.42134, -0.77079, 0.42508), numbers(-0.00603, 0.58688, 1.05354, 0.71875)]
        antialiased = [numbers(0.08342, 0.39519, -0.58809, 0.29357), numbers(-0.00469, 0.53850, 1.01869, 0.63008)]
        return by_size + by_step + antialiased

    return Sides(actual, expected)


@comparison("attention mass mask", GOLDEN, evaluation.attention_mass_mask)
def _(rng: RandomInputs) -> Sides:
    attention = numbers(0.05, 0.30, 0.10, 0.25, 0.20, 0.10).view(1, 6)
    return Sides(lambda: evaluation.attention_mass_mask(attention)[0].double(), lambda: numbers(0, 1, 0, 1, 1, 0))


@comparison("label propagation, four recipes", GOLDEN, evaluation.propagate_frame, fp64=1e-5)
def _(rng: RandomInputs) -> Sides:
    current, context = F.normalize(wave(3, 3, 4), dim=-1), F.normalize(wave(2, 3, 3, 4, c=0.65, phase=0.1), dim=-1)
    classes = torch.tensor([[[0, 0, 1], [0, 1, 1], [0, 0, 1]], [[0, 1, 1], [0, 1, 1], [0, 0, 0]]])
    labels = F.one_hot(classes).double()
    recipes = [(1, 3, 0.2, "circle"), (1, 3, 0.2, "square"), (12, 5, 0.2, "circle"), (1, 3, 0.1, "square")]

    def actual() -> list[Tensor]:
        return [evaluation.propagate_frame(current, context, labels, *recipe)[..., 1].flatten() for recipe in recipes]

    def expected() -> list[Tensor]:
        return [
            numbers(0.111371, 0.522698, 1, 0.602799, 0.875020, 0.891218, 0, 0.030197, 0.026956),
            numbers(0.111371, 0.522698, 1, 0.494790, 0.722317, 1, 0.519948, 0.418502, 0.440738),
            numbers(0.167665, 0.401768, 0.359964, 0.649809, 0.698631, 0.358684, 0.492384, 0.535119, 0.485406),
            numbers(0.030445, 0.399246, 1, 0.654529, 0.775233, 1, 0.590081, 0.507472, 0.331916),
        ]

    return Sides(actual, expected)
