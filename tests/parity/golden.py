"""The authors' own functions, run once on waves of numbers: what they gave, as far as it was written down.

Their code is not here and is not run. The numbers have eight digits, some of them five.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from minissl import evaluate
from minissl.balance import koleo, sinkhorn_knopp
from minissl.masking import block_masks
from minissl.methods.clip import clip_loss
from minissl.methods.dino import center_and_sharpen, cross_view_entropy, update_center
from minissl.methods.dinov2 import masked_patch_entropy
from minissl.methods.dinov3 import bring_down, gram_loss
from minissl.methods.pretext import masked_pixel_loss
from minissl.methods.simclr import nt_xent
from minissl.patches import patchify
from minissl.positions import coordinates, resample, rotate, turn
from minissl.teacher import cosine, linear, warmup_cosine
from tests.golden import wave
from tests.parity.ledger import GOLDEN, Draw, Sides, compared


def numbers(*given: float) -> Tensor:
    return torch.tensor(given, dtype=torch.float64)


def balanced() -> Tensor:
    return sinkhorn_knopp(wave(6, 8, c=0.9, phase=0.2), 0.07)


@compared("NT-Xent, temperatures 0.5, 0.1, 0.07", GOLDEN, nt_xent, fp64=1e-8)
def _(draw: Draw) -> Sides:
    views = wave(4, 8), wave(4, 8, phase=0.5)
    return Sides(
        lambda: torch.stack([nt_xent(*views, t) for t in (0.5, 0.1, 0.07)]),
        lambda: numbers(1.36053224, 1.24435718, 1.45774209),
    )


@compared("CLIP's loss", GOLDEN, clip_loss, fp64=1e-8)
def _(draw: Draw) -> Sides:
    return Sides(lambda: clip_loss(wave(4, 8), wave(4, 8, phase=0.5), 1 / 0.07), lambda: 1.36494888)


@compared("the loss of hidden patches, and patches", GOLDEN, masked_pixel_loss, patchify, fp64=1e-7)
def _(draw: Draw) -> Sides:
    images, said, mask = wave(2, 3, 8, 8, c=0.37), wave(2, 4, 48, c=0.11), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])

    def ours() -> list[Tensor]:
        losses = [masked_pixel_loss(said, images, mask, 4, normed) for normed in (True, False)]
        return [torch.stack(losses), patchify(images, 4)[0, 1, :6]]

    first = numbers(0.99588084, 0.02725540, -0.98946051, 0.96127520, 0.38689204, -0.87013809)
    return Sides(ours, lambda: [numbers(1.49852178, 1.02068374), first])


@compared(
    "DINO's loss, and its centre", GOLDEN, cross_view_entropy, center_and_sharpen, update_center, linear, fp64=1e-6
)
def _(draw: Draw) -> Sides:
    student, teacher, center = 2 * wave(4, 3, 16), 2 * wave(2, 3, 16, c=0.9, phase=0.2), 0.1 * wave(1, 16, c=0.3)

    def ours() -> list[Tensor]:
        target = center_and_sharpen(teacher, center, linear(0.04, 0.07, 1 / 2))  # the second of three epochs
        moved = update_center(center, teacher, 0.9)
        return [cross_view_entropy(student, target, 0.1), moved[0, :4], moved.sum()]

    return Sides(ours, lambda: [20.42619324, numbers(0.02952958, 0.04329170, 0.04204365, 0.04289632), 0.36289691])


@compared("iBOT's two losses, and its patches' centre", GOLDEN, cross_view_entropy, masked_patch_entropy, update_center,
          fp64=1e-6)  # fmt: skip
def _(draw: Draw) -> Sides:
    student, patches, local = 2 * wave(4, 16), 2 * wave(4, 4, 16, c=0.6), 2 * wave(2, 16, c=1.1)
    teacher, seen = 2 * wave(4, 16, c=0.9, phase=0.2), 2 * wave(4, 4, 16, c=0.8, phase=0.3)
    masks = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)

    def ours() -> list[Tensor]:
        zero = torch.zeros(1, 16, dtype=torch.float64)
        target = center_and_sharpen(teacher, zero, 0.04).unflatten(0, (2, 2))
        image = cross_view_entropy(torch.cat([student, local]).unflatten(0, (3, 2)), target)
        patch = masked_patch_entropy(patches[masks], center_and_sharpen(seen, zero, 0.07)[masks], masks)
        return [image, patch, image + patch, update_center(zero, seen)[0, :3]]

    first = numbers(0.09086393, 0.02925309, -0.05010228)
    return Sides(ours, lambda: [20.69134857, 12.20627368, 32.89762225, first])


@compared("schedules: a warm-up and a cosine, both ways to count", GOLDEN, warmup_cosine, cosine, fp64=1e-5)
def _(draw: Draw) -> Sides:
    """DINO and DINOv2 leave the end to the step after the last; DINOv3 reaches it."""

    def ours() -> list[Tensor]:
        first = [warmup_cosine(0.0, 1.0, 0.1, i / 10, 0.2) for i in range(2, 11)]
        rise = [cosine(0.0, 1.25, i / 3) for i in range(5)]  # of the Gram loss's weight
        return [numbers(*first), numbers(*[cosine(1.0, 0.1, i / 7) for i in range(8)]), numbers(*rise)]

    first = numbers(1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254, 0.1)
    second = numbers(1, 0.955436, 0.83057, 0.650134, 0.449866, 0.26943, 0.144564, 0.1)
    return Sides(ours, lambda: [first, second, numbers(0, 0.3125, 0.9375, 1.25, 1.25)])


@compared("Sinkhorn-Knopp", GOLDEN, sinkhorn_knopp, fp64=1e-4)
def _(draw: Draw) -> Sides:
    """The sums of the columns stand for the whole; of the first row, what is not nearly 0."""
    row = numbers(0.33337560, 0.66656083)
    columns = numbers(0.67647, 0.66177, 0.66677, 0.81802, 0.87459, 0.85606, 0.77187, 0.67445)
    small = numbers(1.7152e-5, 2.4700e-5, 2.1704e-5)
    return Sides(
        lambda: [balanced()[0, 1:3], balanced().sum(0), balanced().sum(1), balanced()[0, [0, 3, 7]]],
        lambda: [row, columns, torch.ones(6), small],
    )


@compared("DINOv2's and DINOv3's loss of class tokens", GOLDEN, cross_view_entropy, fp64=1e-6)
def _(draw: Draw) -> Sides:
    """Ours leaves out pairs of a crop with itself; as small crops, behind two others, all pairs count."""

    def mean_of_all(crops: Tensor) -> Tensor:
        views, target = torch.cat([wave(2, 3, 8), crops]), balanced().view(2, 3, 8)
        small = cross_view_entropy(views, target) - cross_view_entropy(views, target, local_weight=0.0)
        return small * (2 * len(views) - 2) / (2 * len(crops))

    def ours() -> list[Tensor]:
        sum_of_four = 4 * mean_of_all(torch.stack([wave(3, 8), wave(3, 8, phase=0.4)]))
        pairs = [mean_of_all(wave(2, 3, 8)), mean_of_all(wave(4, 3, 8))]
        return [sum_of_four, cross_view_entropy(wave(2, 3, 8), balanced().view(2, 3, 8)), *pairs]

    return Sides(ours, lambda: [35.91656800, 9.09590816, 9.38280010, 9.69242668])


@compared("the loss of hidden patches, in DINOv2's form", GOLDEN, masked_patch_entropy, fp64=1e-6)
def _(draw: Draw) -> Sides:
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)

    def ours() -> Tensor:
        return masked_patch_entropy(wave(5, 8), sinkhorn_knopp(wave(5, 8, c=0.9, phase=0.2), 0.07), masks)

    return Sides(ours, lambda: 6.98835330)


@compared("KoLeo, and of two that are one", GOLDEN, koleo, fp64=1e-7)
def _(draw: Draw) -> Sides:
    return Sides(lambda: [koleo(wave(5, 8)), koleo(wave(1, 8).expand(2, 8))], lambda: [0.42841986, 17.0782267])


@compared("Gram loss, four ways, by image and whole", GOLDEN, gram_loss, fp64=1e-6)
def _(draw: Draw) -> Sides:
    student, anchor = wave(2, 5, 8), wave(2, 5, 8, c=0.9, phase=0.2)
    ways = [{}, {"negatives": "drop"}, {"negatives": "drop anchor's"}, {"normalize": False}]
    whole = student.view(1, 10, 8), anchor.view(1, 10, 8)

    def theirs() -> list[Tensor]:
        by_image = numbers(0.09403699, 0.02033243, 0.12645595, 1.68827450)
        return [by_image, numbers(0.35115761, 0.12131894, 0.43801993, 5.83778334)]

    return Sides(
        lambda: [torch.stack([gram_loss(*pair, **way) for way in ways]) for pair in ((student, anchor), whole)], theirs
    )


@compared("rotary positions", GOLDEN, coordinates, turn, rotate, fp64=1e-6)
def _(draw: Draw) -> Sides:
    def ours() -> list[Tensor]:
        found = turn(coordinates((2, 3)), 8)
        turned = rotate(wave(8).expand(1, 1, 6, 8), found)[0, 0, 1]
        return [found.sin[1, :4], found.cos[1, :4], turned, coordinates((2, 4)).T]

    def theirs() -> list[Tensor]:
        turned = numbers(0, 0.50428945, 0.98544973, 0.86320937, -0.33498815, -0.53268886, -0.87157577, -0.98245263)
        places = numbers(*[-0.5] * 4, *[0.5] * 4, *[-0.75, -0.25, 0.25, 0.75] * 2).view(2, 8)
        return [numbers(0, -0.30901700, 0, 0), numbers(-1, 0.95105654, 1, 1), turned, places]

    return Sides(ours, theirs)


@compared("rotary positions, periods of a head of 64", GOLDEN, turn, fp64=1e-4)
def _(draw: Draw) -> Sides:
    """Given with five digits; the cosines they make at the edge of the image."""
    periods = numbers(1, 1.33352, 1.77828, 2.37137, 3.16228, 74.98942)
    return Sides(
        lambda: turn(numbers(1, 0)[None], 64).cos[0, [0, 1, 2, 3, 4, 15]], lambda: (2 * torch.pi / periods).cos()
    )


@compared("how many patches are hidden, means of 1,000 draws", GOLDEN, block_masks, fp64=5e-4)
def _(draw: Draw) -> Sides:
    """By DINOv2's rectangles, on four grids; by chance some hundredths of a patch apart, of 128."""
    sides, targets = (16, 16, 16, 8, 8, 7, 4, 4), (25, 76, 128, 6, 32, 24, 1, 8)

    def ours() -> list[Tensor]:
        each = [block_masks(1000, (n, n), (t + 0.01) / n**2, random.Random(0)) for n, t in zip(sides, targets)]
        counts = [masks.flatten(1).sum(dim=1).double() for masks in each]
        return [torch.stack([c.mean() for c in counts]), torch.stack([c.max() for c in counts])]

    return Sides(ours, lambda: [numbers(24.90, 75.92, 127.92, 5.98, 31.95, 23.97, 0.71, 7.99), numbers(*targets)])


@compared("maps at another size, three ways", GOLDEN, resample, bring_down, fp64=2e-5)
def _(draw: Draw) -> Sides:
    """By DINO's step, by the size as in DINOv3, and antialiased."""
    grid = wave(4, 4, c=1.3)
    learned = torch.cat([torch.ones(1, 1, 1), grid.float().view(1, 16, 1)], dim=1)

    def ours() -> list[Tensor]:
        found = [bring_down(grid[None, :, :, None], (size, size)).flatten()[:4] for size in (2, 6)]
        for antialias in (False, True):
            found += [resample(learned, size, size, antialias)[0, 1:5, 0] for size in (2, 6)]
        return found

    def theirs() -> list[Tensor]:
        by_size = [numbers(0.10478, 0.29437, -0.72011, 0.43022), numbers(-0.00594, 0.60464, 1.05318, 0.67814)]
        by_step = [numbers(0.09102, 0.42134, -0.77079, 0.42508), numbers(-0.00603, 0.58688, 1.05354, 0.71875)]
        smooth = [numbers(0.08342, 0.39519, -0.58809, 0.29357), numbers(-0.00469, 0.53850, 1.01869, 0.63008)]
        return by_size + by_step + smooth

    return Sides(ours, theirs)


@compared("attention that holds most of the mass", GOLDEN, evaluate.mass_mask)
def _(draw: Draw) -> Sides:
    attention = numbers(0.05, 0.30, 0.10, 0.25, 0.20, 0.10).view(1, 6)
    return Sides(lambda: evaluate.mass_mask(attention)[0].double(), lambda: numbers(0, 1, 0, 1, 1, 0))


@compared("labels handed on, four recipes", GOLDEN, evaluate.propagate, fp64=1e-5)
def _(draw: Draw) -> Sides:
    current, context = F.normalize(wave(3, 3, 4), dim=-1), F.normalize(wave(2, 3, 3, 4, c=0.65, phase=0.1), dim=-1)
    ones = torch.tensor([[[0, 0, 1], [0, 1, 1], [0, 0, 1]], [[0, 1, 1], [0, 1, 1], [0, 0, 0]]])
    labels = F.one_hot(ones).double()
    recipes = [(1, 3, 0.2, "circle"), (1, 3, 0.2, "square"), (12, 5, 0.2, "circle"), (1, 3, 0.1, "square")]

    def theirs() -> list[Tensor]:
        return [
            numbers(0.111371, 0.522698, 1, 0.602799, 0.875020, 0.891218, 0, 0.030197, 0.026956),
            numbers(0.111371, 0.522698, 1, 0.494790, 0.722317, 1, 0.519948, 0.418502, 0.440738),
            numbers(0.167665, 0.401768, 0.359964, 0.649809, 0.698631, 0.358684, 0.492384, 0.535119, 0.485406),
            numbers(0.030445, 0.399246, 1, 0.654529, 0.775233, 1, 0.590081, 0.507472, 0.331916),
        ]

    return Sides(
        lambda: [evaluate.propagate(current, context, labels, *how)[..., 1].flatten() for how in recipes], theirs
    )
