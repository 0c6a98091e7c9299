"""DINOv2: DINO for the image and, where patches are hidden from the student, for every patch as well.

Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023 (arXiv:2304.07193), which joins DINO
with iBOT (Zhou et al., 2021, arXiv:2111.07832), balances the targets by Sinkhorn-Knopp in place of the centre, and
keeps the class tokens of a batch apart by KoLeo.

Shapes: B images, G = 2 global and L local crops, V = G + L views, stored crop by crop; a grid (h, w) of N patches, M of
which are hidden in the 2B global crops; K prototypes, D the encoder's width.
"""

import random
from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minissl.balance import koleo, sinkhorn_knopp
from minissl.errors import InputError
from minissl.masking import block_masks as block_masks  # also known by this name
from minissl.masking import hide_in_some
from minissl.method import Batch, Tokens, class_token
from minissl.methods.dino import DINOHead, center_and_sharpen, cross_view_entropy, update_center
from minissl.teacher import Teacher, cosine, linear
from minissl.transformer import layer_rates
from minissl.views import multi_crop

MASKED = 0.5  # of the global crops have hidden patches


def masked_patch_entropy(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """The cross-entropy of hidden patches under the teacher's targets, which sees them.

    iBOT, eq. 2: the mean over the hidden patches of a crop, then over all crops, those without a hidden patch, which
    add nothing, included.

    Args:
        student: logits (M, K) of the hidden patches, in the order in which `mask` has them.
        teacher: probabilities (M, K).
        mask: bool (B, N), M of them True.
        temperature: the student's.
    """
    with torch.autocast(student.device.type, enabled=False):
        scores = (student / temperature).log_softmax(dim=-1)
        losses = -(teacher * scores).sum(dim=-1)  # (M,)
        # The order of `mask[mask]`, without asking a GPU how many there are.
        rows = mask.flatten().byte().argsort(descending=True, stable=True)[: len(losses)]
        weights = 1 / mask.sum(dim=1).clamp_min(1)  # (B,)
        return (losses * weights[rows // mask.shape[1]]).sum() / len(mask)


def check_hides(encoder: nn.Module, ibot: float) -> None:
    """Raises InputError for an encoder that cannot hide patches, if the weight of their loss is not 0."""
    if ibot and "masks" not in signature(encoder.forward).parameters:
        raise InputError("This encoder has no patches to hide; give a ViT, as --encoder.name nano, or --ibot 0.")


class DINOv2(nn.Module):
    """Self-distillation of images and of hidden patches.

    Args:
        encoder: the student's, a ViT, images -> Tokens; the teacher's copy is what is kept.
        size: pixels of a global crop.
        local_size: pixels of a local crop; it must suit the encoder's patches.
        local_crops: how many small crops the student has to explain.
        global_scale: share of the image's area of a global crop.
        local_scale: share of the image's area of a local crop.
        prototypes: K, of the class token's head.
        patch_prototypes: of the patches' own head; 0 lets them share the class token's.
        hidden: width of the heads' hidden layers.
        bottleneck: dimensions of the sphere the prototypes lie on.
        batch_norm: in the heads, after each of their layers.
        teacher_temperature: of the teacher's, at the end of its warm-up; lower is sharper.
        warmup_temperature: of the teacher's, at the start.
        temperature_warmup: share of the run over which it moves from one to the other.
        sinkhorn: iterations of Sinkhorn-Knopp; 0 centres, as DINO does.
        koleo: weight of the term that keeps the class tokens of a crop apart.
        ibot: weight of the patches' loss; 0 hides nothing and leaves it out.
        ibot_until: share of the run from which on nothing is hidden any more and whole images teach alone.
        mask_ratio: in one half of the global crops, from which to which share of the patches are hidden.
        momentum: of the teacher at the start; it ends at 1, along a cosine.
        freeze_last: share of the run in which the prototypes stay as they were drawn.
        slower: factors on the learning rate: of each block against the next one, and of the patch embedding besides.

    Raises:
        InputError: for an encoder that cannot hide patches.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # DINO's preset, and hidden patches.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",
            "encoder.init_std": 0.088,
            "image_size": 64,
            "size": 32,
            "local_size": 16,
            "local_crops": 0,
            "global_scale": (0.5, 1.0),
            "local_scale": (0.25, 0.6),
            "prototypes": 256,
            "hidden": 256,
            "bottleneck": 64,
            "batch_norm": True,
            "teacher_temperature": 0.02,
            "warmup_temperature": 0.02,
            "koleo": 0.3,
            "ibot": 0.2,  # 1 in the paper; with it the patches' mIoU was 16.6, so 21.1 (val, one seed each)
            "momentum": 0.95,
            "slower": (1.0, 1.0),
            "batch_size": 64,
            "lr": 2e-3,
            "minutes": 8.0,
        },
        # ViT-S by the authors' short recipe (ImageNet-1k, 32 GPUs) on one GPU, with the registers that came later.
        "gpu": {
            "encoder.name": "small",
            "encoder.drop_path": 0.1,  # 0.3 in the paper, of a ViT-L
            "encoder.registers": 4,
            "encoder.layer_scale": 1e-5,
            "image_size": 256,
            "prototypes": 8192,  # 65,536 in the paper, for 1.3 million images
            "batch_size": 256,  # 2,048 in the paper
            "lr": 2e-3,  # the paper's rule, 4e-3 * sqrt(batch size / 1024)
            "compile": True,
        },
    }

    make_head: ClassVar[Callable[..., nn.Module]] = DINOHead
    hides = True  # from the student the patches that it is asked about

    def __init__(
        self,
        encoder: nn.Module,
        *,
        size: int = 224,
        local_size: int = 96,
        local_crops: int = 8,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        prototypes: int = 65_536,
        patch_prototypes: int = 0,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        teacher_temperature: float = 0.07,
        warmup_temperature: float = 0.04,
        temperature_warmup: float = 0.3,
        sinkhorn: int = 3,
        koleo: float = 0.1,
        ibot: float = 1.0,
        ibot_until: float = 1.0,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        momentum: float = 0.992,
        freeze_last: float = 0.01,
        slower: tuple[float, float] = (0.9, 0.2),
    ):
        super().__init__()
        check_hides(encoder, ibot)
        kinds = {"head": prototypes} | ({"patch_head": patch_prototypes} if ibot and patch_prototypes else {})
        heads = {name: self.make_head(encoder.dim, k, hidden, bottleneck, batch_norm) for name, k in kinds.items()}
        self.student = nn.ModuleDict({"encoder": encoder} | heads)
        self.teacher = nn.ModuleDict({name: Teacher(part) for name, part in self.student.items()})
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.dim))  # in the place of a hidden patch
        for name, k in {"center": prototypes, "patch_center": patch_prototypes or prototypes}.items():
            self.register_buffer(name, torch.zeros(1, k))
        self.crops = {"size": size, "local_size": local_size, "local_crops": local_crops}
        self.crops |= {"global_scale": global_scale, "local_scale": local_scale}
        self.temperatures = {"start": warmup_temperature, "end": teacher_temperature, "until": temperature_warmup}
        self.sinkhorn, self.koleo, self.ibot, self.ibot_until = sinkhorn, koleo, ibot, ibot_until
        self.mask_ratio, self.momentum, self.freeze_last, self.slower = mask_ratio, momentum, freeze_last, slower

    @property
    def encoder(self) -> nn.Module:
        return self.teacher["encoder"].network

    def rates(self) -> dict[str, float]:
        decay, patches = self.slower
        rates = layer_rates(self.student["encoder"], decay, "student.encoder.", above=1)
        rates["mask_token"] = rates.get("student.encoder.cls_token", 1.0)
        return {name: rate * (patches if ".patch_embed." in name else 1) for name, rate in rates.items()}

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return self.compare(*multi_crop(batch.images, **self.crops), progress)[0]

    def compare(
        self, large: Tensor, small: Tensor, progress: float, local_weight: float = 1.0
    ) -> tuple[dict[str, Tensor], Tokens]:
        """The terms of the loss of large crops (2B, 3, S, S) and small ones, and the student's tokens of the large."""
        n, frozen = len(large) // 2, progress < self.freeze_last
        ibot = 0.0 if self.ibot_until <= progress and self.ibot_until < 1 else self.ibot  # 1: to the very end
        temperature = linear(**self.temperatures, progress=progress)
        seen = self.teacher["encoder"](large)
        masks, hidden = self.hide(seen.patches) if ibot else (None, None)
        tokens = self.student["encoder"](large, *((masks, self.mask_token) if ibot and self.hides else ()))
        cls = [tokens.cls, *([class_token(self.student["encoder"], small)] if len(small) else [])]
        scores = self.student["head"](torch.cat(cls), frozen).float().unflatten(0, (-1, n))  # (V, B, K)
        target = self.targets("head", seen.cls, self.center, temperature)  # (2B, K)
        terms = {"teacher_entropy": torch.special.entr(target).sum(-1).mean()}
        loss = cross_view_entropy(scores, target.unflatten(0, (2, n)), local_weight=local_weight)
        if self.koleo:
            terms["koleo"] = sum(koleo(crop) for crop in tokens.cls.split(n))
            loss = loss + self.koleo * terms["koleo"]
        if ibot:
            patches, asked = (x.patches.flatten(0, 2)[hidden] for x in (tokens, seen))  # (M, D)
            head = "patch_head" if "patch_head" in self.student else "head"
            target = self.targets(head, asked, self.patch_center, temperature)  # (M, K)
            scores = self.student[head](patches, frozen).float()
            terms["ibot"] = masked_patch_entropy(scores, target, masks.flatten(1))
            loss = loss + ibot * terms["ibot"]
        return {"loss": loss} | terms, tokens

    def hide(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (2B, h, w) for global crops with such patches (2B, h, w, D), and where they are True, (M,)."""
        chance = random.Random(random.getrandbits(62))
        found = hide_in_some(len(patches), patches.shape[1:3], MASKED, self.mask_ratio, chance, views=2)
        return tuple(part.to(patches.device, non_blocking=True) for part in found)

    def targets(self, head: str, x: Tensor, center: Tensor, temperature: float) -> Tensor:
        """What the teacher says of its class tokens or patches (N, D), as probabilities (N, K)."""
        logits = self.teacher[head](x).float()
        if self.sinkhorn:
            return sinkhorn_knopp(logits, temperature, self.sinkhorn)
        found = center_and_sharpen(logits, center, temperature)
        center.copy_(update_center(center, logits))
        return found

    def guesses(self, batch_size: int) -> dict[str, int]:
        return {"teacher_entropy": self.center.shape[-1]}

    def after_step(self, progress: float) -> None:
        momentum = cosine(self.momentum, 1.0, progress)
        for name, part in self.student.items():
            self.teacher[name].follow(part, momentum)
