"""DINOv3: dense features that stay sharp however long the training is.

Siméoni et al., DINOv3, 2025 (arXiv:2508.10104). The longer a DINOv2 trains, the better its class token and, from some
time on, the worse its patches: what one of them says leaks into the others. Gram anchoring holds what was good about
them: the cosines of an image's patches with each other stay those that an earlier teacher had. What the patches say may
go on changing; who is like whom may not.

Beside it: rotary positions (`positions`), constant schedules, two heads with plain last layers, and a last phase in
which crops of several sizes are mixed. Shapes: B images, 2 large crops of each, N patches, width D.
"""

import random
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.method import Batch
from minissl.methods.dino import DINOHead
from minissl.methods.dinov2 import DINOv2
from minissl.teacher import Teacher, copy_buffers, cosine
from minissl.views import anchored_crop


def gram_loss(
    student: Tensor,
    anchor: Tensor,
    negatives: Literal["keep", "drop", "drop anchor's"] = "keep",
    normalize: bool = True,
) -> Tensor:
    """How far the patches' likeness to each other is from the anchor's (section 4.2).

    Args:
        student: (B, N, D) patches of B images, each compared within itself; of (1, B N, D), all with all.
        anchor: (B, N, D'), the same patches in the eyes of the anchor; no gradient goes there.
        negatives: cosines below 0 may count as 0, on both sides or in the anchor alone.
        normalize: False compares products instead of cosines.

    Returns:
        The mean squared difference of the two matrices (N, N), over all their entries and all images.
    """
    with torch.autocast(student.device.type, enabled=False):
        grams = []
        for x in (student, anchor.detach()):
            x = x.float() if x.dtype != torch.float64 else x
            x = F.normalize(x, dim=-1) if normalize else x
            grams.append(x @ x.mT)  # (B, N, N)
        ours, theirs = grams
        ours = ours.clamp_min(0) if negatives == "drop" else ours
        theirs = theirs if negatives == "keep" else theirs.clamp_min(0)
        return F.mse_loss(ours, theirs)


def bring_down(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """A finer map of patches (B, H, W, D), as the student's grid (h, w) would see it: (B, h, w, D), bicubic."""
    if patches.shape[1:3] == grid:
        return patches
    found = F.interpolate(patches.permute(0, 3, 1, 2).float(), size=grid, mode="bicubic", align_corners=False)
    return found.permute(0, 2, 3, 1)


class DINOv3(DINOv2):
    """Self-distillation of images and patches, anchored by what its patches once had in common.

    Args:
        encoder: the student's, a ViT, images -> Tokens; the teacher's copy is what is kept.
        patch_prototypes: of the patches' own head.
        gram: weight of the anchor's term; 0 leaves it out.
        gram_from: share of the run at which that term begins.
        gram_rise: share of the run over which it rises to its weight, along a cosine.
        anchor_at: shares of the run at which the anchor becomes what the teacher is then; none keeps the anchor that a
            run started with (--start).
        anchor_scale: how much larger the anchor sees the large crops than the student does.
        local_weight: of the small crops' pairs, at the end of the anchor's rise; 1 before it.
        mixed: crops of other sizes, one kind a step: pixels of the large and the small ones, and how often it comes.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # DINOv2's preset, with schedules that stay constant as in the paper.
        "cpu": DINOv2.presets["cpu"]
        | {
            "encoder.positions": "rotary",
            "encoder.stretch": (0.0, 1.0, 2.0),
            "encoder.registers": 4,
            "patch_prototypes": 256,
            "final_lr": 2e-3,
            "final_weight_decay": 0.04,
            "anchor_at": (0.4,),
            "gram": 10.0,  # 2 in the paper, which soon held no more; with 50 the class token learnt less
            "gram_from": 0.4,
            "gram_rise": 0.01,
        },
        # ViT-S on one GPU by the schedules of the paper's 7 billion parameters, which stay constant; never run so far.
        "gpu": DINOv2.presets["gpu"]
        | {
            "encoder.positions": "rotary",
            "encoder.stretch": (0.0, 1.0, 2.0),
            "patch_prototypes": 8192,
            "size": 256,
            "local_size": 112,
            "image_size": 512,
            "momentum": 0.994,
            "final_lr": 2e-3,
            "final_weight_decay": 0.04,
            "anchor_at": (0.2,),  # an early teacher, whose patches the paper found the best
            "gram_from": 0.8,
        },
    }
    make_head = staticmethod(partial(DINOHead, cosines=False))

    def __init__(
        self,
        encoder: nn.Module,
        *,
        patch_prototypes: int = 65_536,
        gram: float = 2.0,
        gram_from: float = 0.0,
        gram_rise: float = 0.001,
        anchor_at: tuple[float, ...] = (0.0,),
        anchor_scale: float = 2.0,
        local_weight: float = 0.5,
        mixed: tuple[tuple[int, int, float], ...] = (),
        **options: Any,
    ):
        super().__init__(encoder, patch_prototypes=patch_prototypes, **options)
        self.anchor = Teacher(self.student["encoder"])
        self.gram, self.gram_from, self.gram_rise, self.local_weight = gram, gram_from, gram_rise, local_weight
        self.anchor_at, self.anchor_scale, self.mixed = anchor_at, anchor_scale, mixed
        self.passed = -1.0  # the progress of the last step
        self.average: Teacher | None = None

    def learn_from(self, master: DINOv2) -> None:
        """Distil: the targets are a trained method's, which stays as it is; nothing is hidden (section 5.2).

        Patches are compared where they would have been hidden. What is kept is a moving average of the student's
        encoder, which is no one's target.

        Raises:
            InputError: if the two have not the same heads.
        """
        theirs, ours = ({k: p.network.last_layer.out_features for k, p in m.teacher.items() if "head" in k}
                        for m in (master, self))  # fmt: skip
        if theirs != ours:
            raise InputError(f"The teacher's heads have {theirs} prototypes and these {ours}; give as many.")
        self.teacher = nn.ModuleDict({name: Teacher(part.network) for name, part in master.teacher.items()})
        self.average, self.hides = Teacher(self.student["encoder"]), False
        self.mask_token.requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        return (self.average or self.teacher["encoder"]).network

    def train(self, mode: bool = True) -> "DINOv3":
        """As any module; but a frozen teacher's encoder is in evaluation mode always."""
        super().train(mode)
        if self.average is not None:
            self.teacher["encoder"].eval()
        return self

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        risen = min(max((progress - self.gram_from) / max(self.gram_rise, 1e-12), 0.0), 1.0)
        weight, crops = cosine(0.0, self.gram, risen), self.crops
        if self.mixed:
            size, local_size, _ = random.choices(self.mixed, [often for _, _, often in self.mixed])[0]
            crops = crops | {"size": size, "local_size": local_size}
        anchor_size = round(self.anchor_scale * crops["size"]) if weight else 0
        large, small, clean = anchored_crop(batch.images, anchor_size, **crops)
        terms, tokens = self.compare(large, small, progress, cosine(1.0, self.local_weight, risen))
        if weight:
            held = bring_down(self.anchor(clean).patches, tokens.patches.shape[1:3])  # (2B, h, w, D)
            terms["gram"] = gram_loss(tokens.patches.flatten(1, 2), held.flatten(1, 2))
            terms["loss"] = terms["loss"] + weight * terms["gram"]
        return terms

    def after_step(self, progress: float) -> None:
        if self.average is not None:
            self.average.follow(self.student["encoder"], self.momentum)
            copy_buffers(self.average.network, self.student["encoder"])  # it never sees an image itself
        else:
            for name, part in self.student.items():
                self.teacher[name].follow(part, self.momentum)
        before = self.passed if self.passed < progress else -1.0  # a run that starts from another's end begins anew
        if any(before < time <= progress for time in self.anchor_at):
            self.anchor.follow(self.encoder, 0.0)
        self.passed = progress

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.passed, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.passed = float(state)
