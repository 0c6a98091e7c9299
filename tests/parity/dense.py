"""What patches show, and where the class token looks, beside scikit-learn, Pillow and loops.

One is added to labels and shares: all of them may be 0, and a tensor that is 0 throughout shows nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl import evaluate
from minissl.evaluate.features import pooled
from minissl.evaluate.segment import IGNORED
from minissl.method import Tokens
from tests.parity.ledger import Draw, Sides, compared


class Means(nn.Module):
    """An encoder whose patches are their mean colours; it looks at the brightest."""

    def __init__(self, patch: int):
        super().__init__()
        self.patch_size, self.scale = patch, nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tokens:
        patches = self.scale * F.avg_pool2d(images, self.patch_size).permute(0, 2, 3, 1)
        return Tokens(patches.square().mean(dim=(1, 2)), patches)

    def attention(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, self.patch_size).exp()[:, :2]


def normal(images: np.ndarray) -> Tensor:
    """ImageNet's mean and deviation, of bytes (..., 3, H, W)."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((images / 255 - mean[:, None, None]) / deviation[:, None, None]).float()


@compared("features of a data set", "numpy", evaluate.extract, pooled, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    p, h, w = draw.whole(2, 4), draw.whole(1, 4), draw.whole(2, 4)
    images, pool = draw.bytes(draw.whole(3, 9), 3, h * p, w * p), draw.one_of("cls", "both")
    at_a_time = draw.whole(1, 9)

    def theirs() -> Tensor:
        cells = (
            normal(images.numpy()).double().unflatten(3, (w, p)).unflatten(2, (h, p)).mean(dim=(3, 5))
        )  # (N, 3, h, w)
        parts = [(cells**2).mean(dim=(2, 3)), cells.mean(dim=(2, 3))]
        return torch.cat(parts if pool == "both" else parts[:1], dim=1)

    return Sides(lambda: evaluate.extract(Means(p), images, batch_size=at_a_time, pool=pool), theirs)


@compared(
    "patches of a clip, brought to a size", "pillow", evaluate.frame_patches, evaluate.patch_of, fp64=None, fp32=1e-5
)
def _(draw: Draw) -> Sides:
    from PIL import Image

    p, frames = draw.whole(2, 4), draw.bytes(draw.whole(1, 3), 3, draw.whole(9, 16), draw.whole(9, 16))
    h, w = draw.whole(2, 4), draw.whole(2, 4)

    def sized(channel: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(channel.astype(np.float32)).resize((w * p, h * p), Image.Resampling.BICUBIC)
        return np.array(picture).clip(0, 255)

    def theirs() -> list[Tensor]:
        pictures = np.stack([[sized(channel) for channel in frame] for frame in frames.numpy()])
        cells = normal(pictures).unflatten(3, (w, p)).unflatten(2, (h, p)).mean(dim=(3, 5))
        return [torch.tensor(p), *cells.permute(0, 2, 3, 1)]

    encoder = Means(p)
    size = (h * p, w * p)
    return Sides(lambda: [evaluate.patch_of(encoder) * 1.0, *evaluate.frame_patches(encoder, frames, size)], theirs)


@compared("patches and attention finer than the patches", "numpy", evaluate.fine_patches, evaluate.fine_attention,
          fp64=None, fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    """A vector is of the square around its middle; attention, of all squares that hold the pixel, their mean."""
    p, n = draw.one_of(2, 4), draw.whole(2, 4)
    stride = draw.one_of(*[s for s in (1, 2, 4) if p % s == 0])
    size = n * p
    images, half = draw.bytes(2, 3, size, size), p // 2

    def square(wide: Tensor, top: int, left: int) -> Tensor:
        return wide[:, :, top : top + p, left : left + p].mean(dim=(2, 3))

    def theirs() -> list[Tensor]:
        wide = normal(np.pad(images.numpy(), ((0, 0), (0, 0), (half, half), (half, half)), "edge")).double()
        middles = [i * stride + stride // 2 for i in range(size // stride)]
        fine = torch.stack([torch.stack([square(wide, y, x) for x in middles], 1) for y in middles], 1)
        starts, looks, seen = range(half % stride, p, stride), torch.zeros(2, 2, *wide.shape[2:]).double(), 0
        seen = torch.zeros(wide.shape[2:])
        for down in [s + p * i for s in starts for i in range(n)]:
            for right in [s + p * i for s in starts for i in range(n)]:
                box = (slice(down, down + p), slice(right, right + p))
                looks[:, :, box[0], box[1]] += square(wide, down, right)[:, :2, None, None].exp()
                seen[box] += 1
        looks = (looks / seen.clamp_min(1))[:, :, half : half + size, half : half + size]
        return [fine, looks / looks.sum(dim=(2, 3), keepdim=True)]

    def ours() -> list[Tensor]:
        encoder = Means(p)
        return [
            evaluate.fine_patches(encoder, images, size, stride),
            evaluate.fine_attention(encoder, images, size, stride),
        ]

    return Sides(ours, theirs)


def looks(draw: Draw) -> tuple[Tensor, Tensor]:
    """Attention (B, heads, h, w) and masks (B, h k, w l), k and l odd, so that a patch has a middle pixel."""
    b, heads, h, w, k, l = draw.whole(1, 3), draw.whole(1, 3), draw.whole(2, 5), draw.whole(2, 5), 3, draw.one_of(3, 5)  # noqa: E741
    masks = draw.numbers(b, h * k, w * l, below=3)
    masks[:, 0, 0] = 1
    return draw.uniform(b, heads, h, w) ** 2, masks


@compared("attention that holds most of the mass, on the object", "sklearn", evaluate.mass_mask, evaluate.attention_iou,
          fp64=1e-6, fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    from sklearn.metrics import jaccard_score

    (attention, masks), mass = looks(draw), draw.real(0.3, 0.9)

    def held(head: Tensor) -> np.ndarray:
        """The smallest set: the largest first, until it is enough."""
        shares, kept, total = (head / head.sum()).flatten().tolist(), np.zeros(head.numel(), bool), 0.0
        for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
            if total < mass:
                kept[i], total = True, total + shares[i]
        return kept.reshape(head.shape)

    def theirs() -> list[Tensor]:
        sets = [[held(head) for head in image] for image in attention]
        k, l = (m // a for m, a in zip(masks.shape[-2:], attention.shape[-2:]))  # noqa: E741
        scores = [
            [jaccard_score(mask.numpy().ravel() > 0, one.repeat(k, 0).repeat(l, 1).ravel()) for one in image]
            for image, mask in zip(sets, masks)
        ]
        return [torch.from_numpy(np.array(sets)).double(), torch.tensor(scores, dtype=torch.float64)]

    return Sides(
        lambda: [evaluate.mass_mask(attention, mass).double(), evaluate.attention_iou(attention, masks, mass)], theirs
    )


@compared("attention's share of the object, and the pointing game", "a loop", evaluate.attention_share,
          evaluate.pointing, fp64=1e-6, fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    attention, masks = looks(draw)
    k, l = (m // a for m, a in zip(masks.shape[-2:], attention.shape[-2:]))  # noqa: E741

    def theirs() -> list[Tensor]:
        shares, points = torch.zeros(2, *attention.shape[:2], dtype=torch.float64)
        for i, image in enumerate(attention.tolist()):
            for j, head in enumerate(image):
                flat = [(value, y, x) for y, row in enumerate(head) for x, value in enumerate(row)]
                on = [float((masks[i, y * k : y * k + k, x * l : x * l + l] > 0).double().mean()) for _, y, x in flat]
                shares[i, j] = sum(v * part for (v, _, _), part in zip(flat, on)) / sum(v for v, _, _ in flat)
                _, y, x = max(flat)
                points[i, j] = 1 + float(masks[i, y * k + k // 2, x * l + l // 2] > 0)
        return [shares, points]

    return Sides(
        lambda: [evaluate.attention_share(attention, masks), 1.0 + evaluate.pointing(attention, masks).double()], theirs
    )


@compared("classes of patches, by neighbours, and their mean IoU", "sklearn", evaluate.at_patches, evaluate.segment,
          evaluate.mean_iou, fp64=1e-6, fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    from sklearn.metrics import jaccard_score
    from sklearn.neighbors import KNeighborsClassifier

    h, w, k, d, c = draw.whole(2, 4), draw.whole(2, 4), draw.one_of(1, 3), draw.whole(2, 6), draw.whole(2, 4)
    masks, asked_masks = draw.numbers(4, h * k, w * k, below=c), draw.numbers(2, h * k, w * k, below=c)
    masks[0, 0, 0] = asked_masks[0, 0, 0] = IGNORED
    looks_of = draw.normal(c + 1, d, scale=2)
    middle = slice(k // 2, None, k)
    known, asked = (looks_of[m[:, middle, middle]] + draw.normal(len(m), h, w, d) for m in (masks, asked_masks))

    def theirs() -> list[Tensor]:
        shown = masks[:, middle, middle]
        truth, x = shown.flatten().numpy(), known.flatten(0, 2).numpy()
        told = truth != IGNORED
        vote = KNeighborsClassifier(min(20, told.sum()), weights=lambda a: np.exp((1 - a) / 0.07), metric="cosine")
        said = vote.fit(x[told], truth[told]).predict(asked.flatten(0, 2).numpy()).reshape(2, h, w)
        whole, right = said.repeat(k, 1).repeat(k, 2).ravel(), asked_masks.flatten().numpy()
        counted = right != IGNORED
        labels = np.unique(right[counted])
        score = jaccard_score(right[counted], whole[counted], labels=labels, average="macro", zero_division=0)
        return [1 + shown, 1 + torch.from_numpy(said), torch.tensor(1 + score)]

    def ours() -> list[Tensor]:
        found = evaluate.segment(known, masks, asked, "knn")
        score = torch.tensor(1 + evaluate.mean_iou(found, asked_masks), dtype=torch.float64)
        return [1 + evaluate.at_patches(masks, (h, w)), 1 + found, score]

    return Sides(ours, theirs)
