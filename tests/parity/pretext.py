"""The pretext tasks and dino.txt's head, on encoders that say what they are told, beside loops and libraries.

Their losses are of float32, in any precision of the rest, so in fp64 there is nothing to compare.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.color import annealed_mean, gamut, lab_to_rgb, nearest_bins, rarity, rgb_to_lab
from minissl.method import Tokens
from minissl.methods.dinotxt import DINOtxt
from minissl.methods.pretext import Colorization, Hole, Rotation
from tests.parity.ledger import Draw, Sides, compared
from tests.parity.losses import log_share
from tests.parity.networks import lend

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def normal(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(x, dtype=images.dtype).view(3, 1, 1) for x in (MEAN, DEVIATION))
    return (images - mean) / deviation


class Told(nn.Module):
    """An encoder whose patches are given."""

    def __init__(self, patches: Tensor):
        super().__init__()
        self.dim, self.given = patches.shape[-1], patches

    def forward(self, images: Tensor) -> Tokens:
        return Tokens(self.given.mean(dim=(1, 2)), self.given)


def lab(images: Tensor) -> Tensor:
    """scikit-image's, of (..., 3, H, W)."""
    from skimage.color import rgb2lab

    return torch.from_numpy(rgb2lab(images.double().numpy(), channel_axis=-3))


@compared("Lab", "skimage", rgb_to_lab, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Dark pictures too, where it is a line."""
    images = draw.uniform(2, 3, draw.whole(2, 9), draw.whole(2, 9)) * torch.tensor([1.0, 0.05]).view(2, 1, 1, 1).to(
        draw.dtype
    )
    return Sides(lambda: rgb_to_lab(images), lambda: lab(images))


@compared("Lab, the way back", "skimage", lab_to_rgb, fp64=1e-6, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Of colours there are."""
    from skimage.color import lab2rgb

    colors = lab(draw.uniform(2, 3, draw.whole(2, 9), draw.whole(2, 9), low=0.05, high=0.95))
    return Sides(
        lambda: lab_to_rgb(colors.to(draw.dtype)), lambda: torch.from_numpy(lab2rgb(colors.numpy(), channel_axis=1))
    )


@compared("the bins of colours that there are", "skimage", gamut, fp64=1e-6)
def _(draw: Draw) -> Sides:
    step = draw.whole(6, 20)

    def theirs() -> Tensor:
        levels = [i / 85 for i in range(86)]
        grid = torch.cartesian_prod(*[torch.tensor(levels, dtype=torch.float64)] * 3)
        grid = grid[((grid == 0) | (grid == 1)).any(dim=1)]
        ab = lab(grid.T[:, :, None])[1:, :, 0].T
        return torch.tensor(sorted({tuple(x) for x in (ab / step).round().mul(step).add(0.0).tolist()}))

    return Sides(lambda: gamut(step), theirs)


@compared("colours as mixtures of bins, and back", "a loop", nearest_bins, annealed_mean, fp32=1e-5)
def _(draw: Draw) -> Sides:
    n, q, most, sigma, t = draw.whole(2, 6), draw.whole(9, 20), draw.whole(1, 6), draw.real(3, 9), draw.real(0.2, 1)
    ab, bins, logits = draw.uniform(n, 2, low=-50, high=50), draw.uniform(q, 2, low=-50, high=50), draw.free(n, q)

    def theirs() -> list[Tensor]:
        numbers, shares, means = [], [], []
        for point, scores in zip(ab, logits):
            away = [float(((point - b) ** 2).sum()) for b in bins]
            near = sorted(range(q), key=away.__getitem__)[:most]
            power = [math.exp((away[near[0]] - away[i]) / (2 * sigma**2)) for i in near]
            numbers.append(near)
            shares.append([p / sum(power) for p in power])
            means.append(sum(log_share(list(scores / t), i).exp() * b for i, b in enumerate(bins)))
        return [torch.tensor(numbers), torch.tensor(shares, dtype=torch.float64), torch.stack(means)]

    return Sides(lambda: [*nearest_bins(ab, bins, most, sigma), annealed_mean(logits, bins, t)], theirs)


@compared("how much rare colours count", "the formula", rarity, fp64=1e-6, fp32=1e-5)
def _(draw: Draw) -> Sides:
    q, mixture = draw.whole(3, 20), draw.real(0.1, 0.9)
    share = draw.uniform(q) * draw.mask(q, share=0.7)
    share[0] = 0.5
    share = share / share.sum()

    def theirs() -> Tensor:
        p = share.tolist()
        weights = [1 / ((1 - mixture) * x + mixture / sum(y > 0 for y in p)) if x else 0.0 for x in p]
        return torch.tensor(weights, dtype=torch.float64) / sum(w * x for w, x in zip(weights, p))

    return Sides(lambda: rarity(share, mixture), theirs)


@compared("colorization, by bins", "skimage", Colorization, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, h, w, d = draw.whole(1, 2), draw.whole(1, 3), draw.whole(1, 3), draw.whole(3, 6)
    patches, images = draw.free(b, h, w, d), draw.uniform(b, 3, 4 * h, 4 * w)
    encoder = Told(patches)
    task = draw.shake(Colorization(encoder, regress=False))
    task.weights.copy_(draw.uniform(len(task.weights), low=0.5, high=2))

    def theirs() -> Tensor:
        total, cells = 0.0, [(i, y, x) for i in range(b) for y in range(2 * h) for x in range(2 * w)]
        for i, y, x in cells:
            pixels = images[i, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(1, 2))
            away = ((lab(pixels[:, None, None])[1:, 0, 0] - task.bins) ** 2).sum(dim=1)
            near = away.argsort()[:5]
            shares = (-away[near] / 50).softmax(dim=0)
            whole = F.linear(patches[i, y // 2, x // 2], task.head.weight, task.head.bias).view(4, -1)
            scores = whole[y % 2 * 2 + x % 2].log_softmax(dim=0)
            total = total - task.weights[near[0]] * (shares.to(scores) * scores[near]).sum()
        return total / len(cells)

    return Sides(lambda: task(encoder, images)["loss"], theirs, [patches, *task.parameters()])


@compared("colorization, by two numbers", "skimage", Colorization, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, h, w, d = draw.whole(1, 3), draw.whole(1, 3), draw.whole(1, 3), draw.whole(3, 6)
    patches, images = draw.free(b, h, w, d), draw.uniform(b, 3, 4 * h, 4 * w)
    encoder = Told(patches)
    task = draw.shake(Colorization(encoder, regress=True))

    def theirs() -> Tensor:
        errors = []
        for i, y, x in [(i, y, x) for i in range(b) for y in range(2 * h) for x in range(2 * w)]:
            pixels = images[i, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(1, 2))
            said = F.linear(patches[i, y // 2, x // 2], task.head.weight, task.head.bias).view(4, 2)
            errors.append(
                (said[y % 2 * 2 + x % 2] - lab(pixels[:, None, None])[1:, 0, 0].to(said) / 110).square().mean()
            )
        return sum(errors) / len(errors)

    return Sides(lambda: task(encoder, images)["loss"], theirs, [patches, *task.parameters()])


@compared("what was in the hole", "a loop", Hole, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, p, d = draw.whole(1, 3), draw.one_of(2, 4, 8), draw.whole(3, 6)
    side = draw.one_of(16, 24)
    grid = side // p
    patches, images = draw.free(b, grid, grid, d), draw.uniform(b, 3, side, side)
    encoder = Told(patches)
    task = draw.shake(Hole(encoder, p))

    def theirs() -> Tensor:
        low, high, total, weights, pixels = side // 4, side - side // 4, 0.0, 0.0, normal(images)
        said = F.linear(patches, task.head[0].weight, task.head[0].bias)
        said = F.linear(F.gelu(said), task.head[2].weight, task.head[2].bias).unflatten(-1, (p, p, 3))
        for y in range(low, high):
            for x in range(low, high):
                weight = 1 if low + 2 <= y < high - 2 and low + 2 <= x < high - 2 else 10
                error = said[:, y // p, x // p, y % p, x % p] - pixels[:, :, y, x]
                total, weights = total + weight * error.square().mean(), weights + weight
        return total / weights

    return Sides(lambda: task(encoder, images)["loss"], theirs, [patches, *task.parameters()])


@compared("which way up", "numpy", Rotation, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Of an encoder that reads some pixels."""
    import numpy as np

    b, side, d = draw.whole(1, 4), draw.whole(3, 6), draw.whole(3, 9)
    images = draw.uniform(b, 3, side, side)
    task = draw.shake(Rotation(SimpleNamespace(dim=d)))

    def read(x: Tensor) -> Tokens:
        return Tokens(x.flatten(1)[:, :d], x)

    def theirs() -> Tensor:
        total = 0.0
        for image in images:
            for turns in range(4):
                turned = normal(torch.from_numpy(np.rot90(image.numpy(), turns, (1, 2)).copy()))
                scores = F.linear(turned.flatten()[:d], task.head.weight, task.head.bias)
                total = total - log_share(list(scores), turns) / (4 * b)
        return total

    return Sides(lambda: task(read, images)["loss"], theirs, list(task.parameters()))


@compared("dino.txt's vectors of pictures and patches", "torch", DINOtxt.embed_images, DINOtxt.embed_patches, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, h, w, d, e = draw.whole(1, 3), draw.whole(1, 3), draw.whole(1, 3), 4 * draw.whole(2, 6), draw.whole(3, 9)
    patches = draw.normal(b, h, w, d)
    text = {"text_width": 8, "text_depth": 1, "text_heads": 1, "length": 4, "vocabulary": 520}
    ours = draw.shake(DINOtxt(Told(patches), head_depth=draw.whole(1, 2), embedding=e, **text))
    layer = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, len(ours.head) - 1, nn.LayerNorm(d), enable_nested_tensor=False).to(
        draw.dtype
    )
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}
    state = {f"layers.{name}": p for name, p in ours.head.named_parameters()}
    ask = lend(theirs, state, names | {f"layers.{len(ours.head) - 1}.": "norm."})
    weight = ours.visual_projection.weight

    def right() -> list[Tensor]:
        x = ask(torch.cat([patches.mean(dim=(1, 2))[:, None], patches.flatten(1, 2)], dim=1))
        first, second = weight.split(d, dim=1)
        return [x[:, 0] @ first.T + x[:, 1:].mean(dim=1) @ second.T, (x[:, 1:] @ second.T).unflatten(1, (h, w))]

    inputs = [weight, *ours.head.parameters()]
    return Sides(lambda: [ours.embed_images(patches), ours.embed_patches(patches)], right, inputs)
