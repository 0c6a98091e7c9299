"""Patches, their positions, and maps of them at another size, beside Pillow, transformers and loops."""

import torch
from torch import Tensor

from minissl.methods.dinov3 import bring_down
from minissl.methods.pretext import masked_pixel_loss, rotate_four
from minissl.patches import patchify, unpatchify
from minissl.positions import Stretch, coordinates, resample, rotate, stretch, turn
from tests.parity.ledger import Draw, Sides, compared


def keys(target: int, source: int, step: float) -> Tensor:
    """(target, source) weights of Keys' cubic, a = -0.75, at the four pixels around; beyond an edge is the edge."""
    found = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        middle = (i + 0.5) * step - 0.5
        first = int(middle // 1) - 1
        for tap in range(first, first + 4):
            x = abs(middle - tap)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
            found[i, min(max(tap, 0), source - 1)] += near if x <= 1 else far
    return found


def along_both(rows: Tensor, maps: Tensor, columns: Tensor) -> Tensor:
    return torch.einsum("i y, j x, b y x d -> b i j d", rows.to(maps), columns.to(maps), maps)


@compared("the anchor's map brought down, bicubic", "a loop", bring_down, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    high, wide, d = draw.whole(4, 8), draw.whole(4, 8), draw.whole(1, 3)
    grid, patches = (draw.whole(2, high - 1), draw.whole(2, wide - 1)), draw.normal(1, high, wide, d)

    def theirs() -> Tensor:
        return along_both(keys(grid[0], high, high / grid[0]), patches.double(), keys(grid[1], wide, wide / grid[1]))

    return Sides(lambda: bring_down(patches, grid), theirs)


@compared("learned positions for another grid", "a loop", resample, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """DINO asks for a tenth of a patch more than there is, and that is the step it takes.

    The same grid is not asked for: the ViT leaves it as it is, and torch's gradient there ignores the step.
    """
    side, h, d = draw.whole(3, 7), draw.whole(2, 9), draw.whole(1, 5)
    w = side + draw.one_of(-1, 1, 2)
    positions = draw.free(1, 1 + side**2, d)

    def theirs() -> Tensor:
        grid = positions[:, 1:].unflatten(1, (side, side))
        found = along_both(keys(h, side, side / (h + 0.1)), grid, keys(w, side, side / (w + 0.1)))
        return torch.cat([positions[:, :1], found.flatten(1, 2)], dim=1)

    return Sides(lambda: resample(positions, h, w, antialias=False), theirs, [positions])


@compared("learned positions for another grid, antialiased", "pillow", resample, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    import numpy as np
    from PIL import Image

    side, h, w, d = draw.whole(3, 7), draw.whole(2, 9), draw.whole(2, 9), draw.whole(1, 5)
    positions = draw.normal(1, 1 + side**2, d)

    def theirs() -> Tensor:
        pictures = [Image.fromarray(x.reshape(side, side).numpy()) for x in positions[0, 1:].T]
        sized = [np.array(picture.resize((w, h), Image.Resampling.BICUBIC)).ravel() for picture in pictures]
        return torch.cat([positions[0, :1], torch.from_numpy(np.stack(sized, axis=-1))])[None]

    return Sides(lambda: resample(positions, h, w, antialias=True), theirs)


@compared("rotary positions", "a loop", coordinates, turn, rotate, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Two numbers, half a head apart, are one complex number, which is turned by a complex factor."""
    h, w, quarter, extra = draw.whole(1, 4), draw.whole(2, 4), draw.whole(1, 3), draw.whole(0, 2)
    d, x = 4 * quarter, draw.free(2, draw.whole(1, 2), extra + h * w, 4 * quarter)

    def turned(row: Tensor, y: float, across: float) -> Tensor:
        for i in range(2 * quarter):
            period = 100 ** ((i % quarter) / quarter)
            angle = torch.tensor(2 * torch.pi * (y if i < quarter else across) / period, dtype=torch.float64)
            pair = torch.complex(row[..., i], row[..., i + d // 2]) * torch.polar(torch.ones_like(angle), angle)
            parts = {i: pair.real, i + d // 2: pair.imag}
            row = torch.stack([parts.get(j, row[..., j]) for j in range(d)], dim=-1).to(x.dtype)
        return row

    def theirs() -> Tensor:
        places = [((n // w + 0.5) * 2 / h - 1, (n % w + 0.5) * 2 / w - 1) for n in range(h * w)]
        rows = [turned(x[:, :, extra + n], *place) for n, place in enumerate(places)]
        return torch.cat([x[:, :, :extra], torch.stack(rows, dim=2)], dim=2)

    return Sides(lambda: rotate(x, turn(coordinates((h, w)), d)), theirs, [x])


@compared("stretched coordinates", "the formula", stretch, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    points, by = draw.normal(draw.whole(2, 9), 2), Stretch(draw.real(0.1, 1), draw.real(1.1, 3), draw.real(1.1, 3))

    def found() -> Tensor:
        torch.manual_seed(draw.seed)
        return stretch(points, by)

    def theirs() -> Tensor:
        torch.manual_seed(draw.seed)
        shift, jitter, rescale = (torch.rand(n) * 2 - 1 for n in (2, 2, 1))
        return (points + shift * by.shift) * by.jitter**jitter * by.rescale**rescale

    return Sides(found, theirs)


@compared("the loss of hidden patches", "a loop", masked_pixel_loss, patchify, fp32=1e-5)
def _(draw: Draw) -> Sides:
    b, p, h, w = draw.whole(1, 3), draw.whole(2, 4), draw.whole(1, 3), draw.whole(2, 3)
    images, normed = draw.normal(b, 3, h * p, w * p), draw.one_of(True, False)
    prediction, mask = draw.free(b, h * w, p * p * 3), draw.mask(b, h * w)
    mask[0, 0] = True

    def theirs() -> Tensor:
        errors = []
        for i, n in mask.nonzero().tolist():
            y, x = n // w * p, n % w * p
            pixels = images[i, :, y : y + p, x : x + p].permute(1, 2, 0).flatten()
            if normed:
                middle = sum(pixels) / len(pixels)
                variance = sum((pixel - middle) ** 2 for pixel in pixels) / (len(pixels) - 1)
                pixels = (pixels - middle) / (variance + 1e-6) ** 0.5
            errors.append(sum((prediction[i, n] - pixels) ** 2) / len(pixels))
        return sum(errors) / len(errors)

    return Sides(lambda: masked_pixel_loss(prediction, images, mask, p, normed), theirs, [prediction])


@compared("patches, cut and put together", "transformers", patchify, unpatchify, slow=True)
def _(draw: Draw) -> Sides:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    p, side = draw.whole(2, 4), draw.whole(2, 4)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    small |= {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**small, image_size=p * side, patch_size=p))
    images, cut = draw.normal(2, 3, p * side, p * side), draw.normal(2, side**2, p * p * 3)
    return Sides(
        lambda: [patchify(images, p), unpatchify(cut, p, (side, side))],
        lambda: [theirs.patchify(images), theirs.unpatchify(cut)],
    )


@compared("pictures turned four ways", "numpy", rotate_four)
def _(draw: Draw) -> Sides:
    import numpy as np

    images = draw.normal(draw.whole(1, 4), draw.whole(1, 3), *[draw.whole(2, 9)] * 2)

    def theirs() -> list[Tensor]:
        turned = [np.rot90(image.numpy(), turns, axes=(1, 2)).copy() for turns in range(4) for image in images]
        return [torch.from_numpy(np.stack(turned)), torch.arange(4 * len(images)) // len(images)]

    return Sides(lambda: rotate_four(images), theirs)
