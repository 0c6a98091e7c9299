"""Pretext tasks: hide something of an image that nobody has to write down, and let the network find it.

Rotation: Gidaris et al., 2018 (arXiv:1803.07728). Colorization: Zhang et al., 2016 (arXiv:1603.08511). Inpainting:
Pathak et al., 2016 (arXiv:1604.07379), without its adversary; masked: He et al., MAE, 2021 (arXiv:2111.06377).

Shapes: B images (B, 3, H, W), patches of p x p pixels, a grid (h, w) of N = hw, D the encoder's width, Q colour bins.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.augment import flip, grey, normalize, random_resized_crop
from minissl.color import annealed_mean, gamut, lab_to_rgb, nearest_bins, rarity, rgb_to_lab
from minissl.errors import InputError
from minissl.masking import hide
from minissl.method import Batch, class_token
from minissl.patches import patchify, unpatchify
from minissl.transformer import Block


def rotate_four(images: Tensor) -> tuple[Tensor, Tensor]:
    """Square images (B, C, S, S) of any type by 0, 90, 180 and 270 degrees counter-clockwise, by moving pixels only.

    Returns (4B, C, S, S), turn by turn: row = turn * B + image; and the turns (4B,) int64.
    """
    turned = torch.cat([torch.rot90(images, turn, (-2, -1)) for turn in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


def masked_pixel_loss(
    prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool = True
) -> Tensor:
    """The mean squared error of a prediction (B, N, p p 3) of images (B, 3, H, W), over the pixels of hidden patches.

    Args:
        mask: (B, N), 1 or True where a patch was hidden.
        normalize: compare with each patch's pixels less their mean, divided by their deviation.
    """
    target = patchify(images, patch_size)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (prediction - target).square().mean(-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


class Rotation(nn.Module):
    """Which way up? Four classes."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.head = nn.Linear(encoder.dim, 4)

    def forward(self, encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
        turned, turns = rotate_four(images)
        logits = self.head(class_token(encoder, normalize(turned))).float()  # (4B, 4)
        return {"loss": F.cross_entropy(logits, turns), "accuracy": (logits.argmax(1) == turns).float().mean()}


class Colorization(nn.Module):
    """Which colours did this grey image have? A distribution over bins, or, as the contrast, two numbers (`regress`).

    The answer is given for `cells` x `cells` squares of each patch: 4 x 4 pixels each for patches of 8.
    """

    def __init__(self, encoder: nn.Module, regress: bool, cells: int = 2):
        super().__init__()
        self.cells, self.regress = cells, regress
        self.register_buffer("bins", gamut())  # (Q, 2)
        self.register_buffer("weights", torch.ones(len(self.bins)))
        self.head = nn.Linear(encoder.dim, cells**2 * (2 if regress else len(self.bins)))

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Count the colours of (n, 3, H, W) uint8: rare ones are going to weigh more."""
        small = F.adaptive_avg_pool2d(images.float() / 255, 8).to(self.bins.device)  # the data may be elsewhere
        ab = rgb_to_lab(small)[:, 1:].permute(0, 2, 3, 1).reshape(-1, 2)
        index, share = nearest_bins(ab, self.bins)
        counts = torch.zeros_like(self.weights).index_add(0, index.flatten(), share.flatten())
        self.weights.copy_(rarity(counts / counts.sum()))

    def answer(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Logits, or a and b, (B, 2h, 2w, Q or 2), from the grey of images in [0, 1]."""
        patches = encoder(normalize(grey(images).expand_as(images))).patches  # (B, h, w, D)
        x = self.head(patches).float().unflatten(-1, (self.cells, self.cells, -1))  # (B, h, w, c, c, Q)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def forward(self, encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
        found = self.answer(encoder, images)
        ab = rgb_to_lab(F.adaptive_avg_pool2d(images, found.shape[1:3]))[:, 1:].permute(0, 2, 3, 1)
        if self.regress:
            return {"loss": F.mse_loss(found, ab / 110)}
        index, share = nearest_bins(ab.reshape(-1, 2), self.bins)  # (n, 5)
        scores = found.flatten(0, 2).log_softmax(dim=-1).gather(1, index)
        return {"loss": -(self.weights[index[:, 0]] * (share * scores).sum(1)).mean()}

    @torch.no_grad()
    def paint(self, encoder: nn.Module, images: Tensor, temperature: float = 0.38) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], of which only the lightness is seen, in the colours the network gives them."""
        found = self.answer(encoder, images)
        ab = found * 110 if self.regress else annealed_mean(found, self.bins, temperature)
        ab = F.interpolate(ab.permute(0, 3, 1, 2), size=images.shape[-2:], mode="bilinear")
        return lab_to_rgb(torch.cat([rgb_to_lab(grey(images).expand_as(images))[:, :1], ab], dim=1))


class Hole(nn.Module):
    """What was in the middle? Half the image's side is hidden; a band of the border counts ten times."""

    def __init__(self, encoder: nn.Module, patch_size: int):
        super().__init__()
        self.patch_size, hidden = patch_size, 4 * encoder.dim
        self.head = nn.Sequential(nn.Linear(encoder.dim, hidden), nn.GELU(), nn.Linear(hidden, patch_size**2 * 3))

    def fill(self, encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, S, S) and what is in the hole, (B, 3, S, S): of the first only outside is seen."""
        side, quarter = images.shape[-1], images.shape[-1] // 4
        hole = images.new_zeros(1, 1, side, side)
        hole[..., quarter : side - quarter, quarter : side - quarter] = 1
        patches = encoder(images * (1 - hole)).patches  # 0 is the mean colour
        pixels = self.head(patches).float().flatten(1, 2)  # (B, N, p p 3)
        return unpatchify(pixels, self.patch_size, patches.shape[1:3]), hole

    def forward(self, encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
        images = normalize(images)
        found, hole = self.fill(encoder, images)
        inner = -F.max_pool2d(-hole, 5, 1, 2)  # without two pixels of the border
        weight = inner + 10 * (hole - inner)
        return {"loss": ((found - images).square() * weight).sum() / (3 * len(images) * weight.sum())}


class MaskedAutoencoder(nn.Module):
    """What was in the patches that are gone? The encoder sees only the others; a small decoder fills in.

    Positions are the encoder's learned ones and learned ones of the decoder; they are fixed sines in the paper.
    """

    def __init__(self, encoder: nn.Module, patches: int, ratio: float, normalize: bool, width: int, depth: int):
        super().__init__()
        self.ratio, self.normalize, self.patch_size = ratio, normalize, encoder.patch_size
        self.embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + patches, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.patch_size**2 * 3)

    def fill(self, encoder: nn.Module, images: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """The patches (B, N, p p 3) the network believes in, and the mask (B, N) of those it did not see."""
        p, grid = self.patch_size, tuple(side // self.patch_size for side in images.shape[-2:])
        cut = patchify(images, p)  # (B, N, p p 3)
        kept, mask = hide(len(images), cut.shape[1], ratio, images)
        seen = cut.gather(1, kept[..., None].expand(-1, -1, cut.shape[-1])).unflatten(-1, (p, p, 3))  # (B, n, p, p, 3)
        x = self.embed(encoder.encode(encoder.embed_some(seen.permute(0, 1, 4, 2, 3), kept, grid)))  # (B, 1 + n, width)
        places = kept[..., None].expand(-1, -1, x.shape[-1])
        whole = self.mask_token.to(x.dtype).expand(len(x), cut.shape[1], -1).scatter(1, places, x[:, 1:])
        x = torch.cat([x[:, :1], whole], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x)))[:, 1:].float(), mask

    def forward(self, encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
        images = normalize(images)
        found, mask = self.fill(encoder, images, self.ratio)
        return {"loss": masked_pixel_loss(found, images, mask, self.patch_size, self.normalize)}


class Pretext(nn.Module):
    """One of the pretext tasks.

    Args:
        encoder: images -> Tokens, with its width as `dim`.
        task: "rotation"; "colorization" by bins, or "regression" of colours; "hole" in the middle, or "mae", patches.
        size: pixels of the crop that the encoder sees.
        scale: share of the image's area of that crop.
        ratio: of the patches that "mae" hides.
        normalize_patches: whether "mae" has to find each patch's pixels less their mean, by their deviation.
        decoder_width: of the decoder of "mae".
        decoder_depth: its blocks.
    """

    reads: ClassVar[str] = "both"  # all tasks but rotation train the patches, and the class token hardly
    apart: ClassVar[bool] = True  # the loss is a mean over images
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {  # what learns in minutes on two cores
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            **{"encoder.stem": "conv", "encoder.init_std": 0.088},
            "image_size": 64,
            "size": 32,
            "scale": (0.6, 1.0),
            **{"decoder_width": 128, "decoder_depth": 1},  # 512 and 8 in the paper
            "batch_size": 128,
            "lr": 2e-3,
            "final_weight_decay": 0.04,
            "minutes": 8.0,
        },
        "gpu": {  # ViT-S/16 on one GPU
            "encoder.name": "small",
            "image_size": 256,
            "batch_size": 256,
            **{"weight_decay": 0.05, "final_weight_decay": 0.05},
            "clip": 0.0,
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: nn.Module,
        *,
        task: Literal["rotation", "colorization", "regression", "hole", "mae"] = "rotation",
        size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: float = 0.75,
        normalize_patches: bool = True,
        decoder_width: int = 512,
        decoder_depth: int = 8,
    ):
        super().__init__()
        self.encoder, self.size, self.scale = encoder, size, scale
        if task in ("hole", "mae") and not hasattr(encoder, "patch_size"):
            raise InputError(f"The task {task} needs an encoder of patches; choose a ViT, as --encoder.name nano.")
        if task == "rotation":
            self.task = Rotation(encoder)
        elif task in ("colorization", "regression"):
            self.task = Colorization(encoder, task == "regression")
        elif task == "hole":
            self.task = Hole(encoder, encoder.patch_size)
        else:
            patches = (size // encoder.patch_size) ** 2
            self.task = MaskedAutoencoder(encoder, patches, ratio, normalize_patches, decoder_width, decoder_depth)

    def prepare(self, data: Any) -> None:
        """Colorization counts the colours of the training images."""
        if isinstance(self.task, Colorization):
            self.task.prepare(data.some(2000).images)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return self.task(self.encoder, flip(random_resized_crop(batch.images, self.size, self.scale)))

    def guesses(self, batch_size: int) -> dict[str, int]:
        return {"loss": 4} if isinstance(self.task, Rotation) else {}

    def after_step(self, progress: float) -> None:
        """Nothing moves by itself."""
