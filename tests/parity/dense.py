"""Patch features and attention maps, compared with scikit-learn, Pillow and loops.

One is added to labels and fractions, which may all be 0: a tensor of zeros proves nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl import evaluation
from minissl.evaluation.features import pool_tokens
from minissl.evaluation.segmentation import IGNORE_INDEX
from minissl.models.factory import wrap_encoder
from minissl.models.outputs import Encoder, Tokens
from tests.parity.ledger import RandomInputs, Sides, comparison


class MeanColors(Encoder):
    """Encoder whose patches are their mean colors; its attention is the exponential of red and of green."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, 3
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tokens:
        patches = self.scale * F.avg_pool2d(images, self.patch_size).permute(0, 2, 3, 1)
        return Tokens(patches.square().mean(dim=(1, 2)), patches)

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        return F.avg_pool2d(images, self.patch_size).exp()[:, :2]


def normalize_bytes(images: np.ndarray) -> Tensor:
    """Normalize uint8 values (..., 3, H, W) with the ImageNet mean and standard deviation."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((images / 255 - mean[:, None, None]) / std[:, None, None]).float()


def mean_of_cells(images: Tensor, h: int, w: int, p: int) -> Tensor:
    """Average (N, 3, h p, w p) over patches, to (N, 3, h, w)."""
    return images.unflatten(3, (w, p)).unflatten(2, (h, p)).mean(dim=(3, 5))


@comparison("features of a data set", "numpy", evaluation.extract_features, pool_tokens, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    p, h, w = rng.integer(2, 4), rng.integer(1, 4), rng.integer(2, 4)
    images, pooling = rng.pixels(rng.integer(3, 9), 3, h * p, w * p), rng.choice("cls", "both")
    batch_size = rng.integer(1, 9)

    def actual() -> Tensor:
        return evaluation.extract_features(MeanColors(p), images, batch_size=batch_size, pooling=pooling)

    def expected() -> Tensor:
        cells = mean_of_cells(normalize_bytes(images.numpy()).double(), h, w, p)
        parts = [(cells**2).mean(dim=(2, 3)), cells.mean(dim=(2, 3))]
        return torch.cat(parts if pooling == "both" else parts[:1], dim=1)

    return Sides(actual, expected)


@comparison("patch features of frames at another size, and the patch size", "pillow", evaluation.frame_patch_features,
            wrap_encoder, fp64=None, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    from PIL import Image

    p, frames = rng.integer(2, 4), rng.pixels(rng.integer(1, 3), 3, rng.integer(9, 16), rng.integer(9, 16))
    h, w = rng.integer(2, 4), rng.integer(2, 4)

    def resize(channel: np.ndarray) -> np.ndarray:
        image = Image.fromarray(channel.astype(np.float32)).resize((w * p, h * p), Image.Resampling.BICUBIC)
        return np.array(image).clip(0, 255)

    def actual() -> list[Tensor]:
        encoder = wrap_encoder(nn.AvgPool2d(p), image_size=4 * p)  # reads the patch size from a trial pass
        features = evaluation.frame_patch_features(MeanColors(p), frames, (h * p, w * p))
        return [torch.tensor(encoder.patch_size * 1.0), *features]

    def expected() -> list[Tensor]:
        images = np.stack([[resize(channel) for channel in frame] for frame in frames.numpy()])
        cells = mean_of_cells(normalize_bytes(images), h, w, p)
        return [torch.tensor(p), *cells.permute(0, 2, 3, 1)]

    return Sides(actual, expected)


@comparison("dense patches and dense attention", "numpy", evaluation.dense_patches, evaluation.dense_attention,
            fp64=None, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    """A feature is of the square around its center; attention at a pixel is the mean of all squares that cover it."""
    p, n = rng.choice(2, 4), rng.integer(2, 4)
    stride = rng.choice(*[s for s in (1, 2, 4) if p % s == 0])
    size = n * p
    images, half = rng.pixels(2, 3, size, size), p // 2

    def square_mean(padded: Tensor, top: int, left: int) -> Tensor:
        return padded[:, :, top : top + p, left : left + p].mean(dim=(2, 3))

    def expected() -> list[Tensor]:
        pad = ((0, 0), (0, 0), (half, half), (half, half))
        padded = normalize_bytes(np.pad(images.numpy(), pad, "edge")).double()
        starts = [i * stride + stride // 2 for i in range(size // stride)]
        dense = torch.stack([torch.stack([square_mean(padded, y, x) for x in starts], 1) for y in starts], 1)
        attention, count = torch.zeros(2, 2, *padded.shape[2:]).double(), torch.zeros(padded.shape[2:])
        corners = [s + p * i for s in range(half % stride, p, stride) for i in range(n)]
        for top in corners:
            for left in corners:
                rows, columns = slice(top, top + p), slice(left, left + p)
                attention[:, :, rows, columns] += square_mean(padded, top, left)[:, :2, None, None].exp()
                count[rows, columns] += 1
        attention = (attention / count.clamp_min(1))[:, :, half : half + size, half : half + size]
        return [dense, attention / attention.sum(dim=(2, 3), keepdim=True)]

    def actual() -> list[Tensor]:
        encoder = MeanColors(p)
        return [
            evaluation.dense_patches(encoder, images, size, stride),
            evaluation.dense_attention(encoder, images, size, stride),
        ]

    return Sides(actual, expected)


def random_attention(rng: RandomInputs) -> tuple[Tensor, Tensor]:
    """Sample attention (B, heads, h, w) and masks (B, h k, w l); k and l are odd: a patch has a center pixel."""
    b, heads, h, w = rng.integer(1, 3), rng.integer(1, 3), rng.integer(2, 5), rng.integer(2, 5)
    height, width = 3, rng.choice(3, 5)  # of a patch in pixels
    masks = rng.integers(b, h * height, w * width, below=3)
    masks[:, 0, 0] = 1
    return rng.uniform(b, heads, h, w) ** 2, masks


@comparison("attention mass mask, and its IoU with the object", "sklearn", evaluation.attention_mass_mask,
            evaluation.attention_iou, fp64=1e-6, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    from sklearn.metrics import jaccard_score

    (attention, masks), mass = random_attention(rng), rng.number(0.3, 0.9)

    def mass_mask(head: Tensor) -> np.ndarray:
        """Return the smallest set with the mass: the largest values first, until their sum suffices."""
        fractions, selected, total = (head / head.sum()).flatten().tolist(), np.zeros(head.numel(), bool), 0.0
        for i in sorted(range(len(fractions)), key=lambda i: -fractions[i]):
            if total < mass:
                selected[i], total = True, total + fractions[i]
        return selected.reshape(head.shape)

    def actual() -> list[Tensor]:
        mask = evaluation.attention_mass_mask(attention, mass).double()
        return [mask, evaluation.attention_iou(attention, masks, mass)]

    def expected() -> list[Tensor]:
        sets = [[mass_mask(head) for head in image] for image in attention]
        height, width = (m // a for m, a in zip(masks.shape[-2:], attention.shape[-2:]))
        ious = [
            [jaccard_score(mask.numpy().ravel() > 0, one.repeat(height, 0).repeat(width, 1).ravel()) for one in image]
            for image, mask in zip(sets, masks)
        ]
        return [torch.from_numpy(np.array(sets)).double(), torch.tensor(ious, dtype=torch.float64)]

    return Sides(actual, expected)


@comparison("attention fraction on the object, and pointing game", "explicit loop", evaluation.attention_fraction,
            evaluation.pointing_game, fp64=1e-6, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    attention, masks = random_attention(rng)
    height, width = (m // a for m, a in zip(masks.shape[-2:], attention.shape[-2:]))

    def object_fraction(i: int, y: int, x: int) -> float:
        box = masks[i, y * height : (y + 1) * height, x * width : (x + 1) * width]
        return float((box > 0).double().mean())

    def actual() -> list[Tensor]:
        hits = evaluation.pointing_game(attention, masks).double()
        return [evaluation.attention_fraction(attention, masks), 1.0 + hits]

    def expected() -> list[Tensor]:
        fractions, hits = torch.zeros(2, *attention.shape[:2], dtype=torch.float64)
        for i, image in enumerate(attention.tolist()):
            for j, head in enumerate(image):
                flat = [(value, y, x) for y, row in enumerate(head) for x, value in enumerate(row)]
                on_object = sum(value * object_fraction(i, y, x) for value, y, x in flat)
                fractions[i, j] = on_object / sum(value for value, _, _ in flat)
                _, y, x = max(flat)
                hits[i, j] = 1 + float(masks[i, y * height + height // 2, x * width + width // 2] > 0)
        return [fractions, hits]

    return Sides(actual, expected)


@comparison("segmentation of patches by k-NN, and mean IoU", "sklearn", evaluation.labels_at_patch_centers,
            evaluation.segment_patches, evaluation.mean_iou, fp64=1e-6, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    from sklearn.metrics import jaccard_score
    from sklearn.neighbors import KNeighborsClassifier

    h, w, k, d, c = rng.integer(2, 4), rng.integer(2, 4), rng.choice(1, 3), rng.integer(2, 6), rng.integer(2, 4)
    train_masks = rng.integers(4, h * k, w * k, below=c)
    test_masks = rng.integers(2, h * k, w * k, below=c)
    train_masks[0, 0, 0] = test_masks[0, 0, 0] = IGNORE_INDEX
    class_means = rng.normal(c + 1, d, scale=2)
    centers = slice(k // 2, None, k)
    train, test = (class_means[m[:, centers, centers]] + rng.normal(len(m), h, w, d) for m in (train_masks, test_masks))

    def actual() -> list[Tensor]:
        predictions = evaluation.segment_patches(train, train_masks, test, "knn")
        iou = torch.tensor(1 + evaluation.mean_iou(predictions, test_masks), dtype=torch.float64)
        return [1 + evaluation.labels_at_patch_centers(train_masks, (h, w)), 1 + predictions, iou]

    def expected() -> list[Tensor]:
        at_centers = train_masks[:, centers, centers]
        labels, x = at_centers.flatten().numpy(), train.flatten(0, 2).numpy()
        known = labels != IGNORE_INDEX
        weights = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
        classifier = KNeighborsClassifier(min(20, known.sum()), weights=weights, metric="cosine")
        predictions = classifier.fit(x[known], labels[known]).predict(test.flatten(0, 2).numpy()).reshape(2, h, w)
        pixels, truth = predictions.repeat(k, 1).repeat(k, 2).ravel(), test_masks.flatten().numpy()
        counted = truth != IGNORE_INDEX
        classes = np.unique(truth[counted])
        iou = jaccard_score(truth[counted], pixels[counted], labels=classes, average="macro", zero_division=0)
        return [1 + at_centers, 1 + torch.from_numpy(predictions), torch.tensor(1 + iou)]

    return Sides(actual, expected)
