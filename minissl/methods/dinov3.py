"""DINOv3: extend DINOv2 by Gram anchoring, which keeps dense features from degrading during long training.

Siméoni et al., DINOv3, 2025 (arXiv:2508.10104). The longer DINOv2 trains, the better its class token becomes, and from
some point on the worse its patch tokens. Gram anchoring keeps the cosine similarities between the patches of an image
close to those of an earlier teacher, the Gram teacher. The patch features themselves may change.

Further changes: rotary position embeddings (`encoder.pos_embed`), constant schedules, untied heads with linear last
layers, and a final phase with crops of several resolutions.

Shapes: B images, 2 global crops each, a grid (h, w) of N patches, width D.
"""

import random
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.multi_view import multi_crop_with_gram_crops
from minissl.errors import InputError
from minissl.methods.base import Batch, Method
from minissl.methods.dinov2 import DINOv2
from minissl.models.ema import EMATeacher, copy_buffers
from minissl.models.heads import DINOHead
from minissl.models.outputs import Encoder
from minissl.training.schedules import cosine


def gram_loss(
    student: Tensor,
    anchor: Tensor,
    negatives: Literal["keep", "drop", "drop anchor's"] = "keep",
    normalize: bool = True,
) -> Tensor:
    """Compute the mean squared difference between student and anchor Gram matrices (section 4.2).

    The paper's loss is the squared Frobenius norm of the difference; here it is divided by the number of entries, as in
    the authors' code. It is computed in float32.

    Args:
        student: (B, N, D) patch features, compared within each image; (1, B N, D) compares those of all images.
        anchor: (B, N, D'), the same patches encoded by the Gram teacher; it gets no gradient.
        negatives: whether negative similarities are kept, or set to 0 on both sides, or only in the anchor.
        normalize: L2-normalize the patch features, so that the similarities are cosines.

    Returns:
        A scalar, the mean over all entries (N, N) and all images.
    """
    with torch.autocast(student.device.type, enabled=False):
        grams = []
        for x in (student, anchor.detach()):
            x = x.float() if x.dtype != torch.float64 else x
            x = F.normalize(x, dim=-1) if normalize else x
            grams.append(x @ x.mT)  # (B, N, N)
        student_gram, anchor_gram = grams
        student_gram = student_gram.clamp_min(0) if negatives == "drop" else student_gram
        anchor_gram = anchor_gram if negatives == "keep" else anchor_gram.clamp_min(0)
        return F.mse_loss(student_gram, anchor_gram)


def resize_patch_grid(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize patch features (B, H, W, D) to the grid (h, w) by bicubic interpolation: (B, h, w, D) float32.

    Features that have this grid already are returned unchanged.
    """
    if patches.shape[1:3] == grid:
        return patches
    resized = F.interpolate(patches.permute(0, 3, 1, 2).float(), size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


class DINOv3(DINOv2):
    """Train a student by self-distillation of class tokens and masked patch tokens, with Gram anchoring.

    Further options are those of `DINOv2`; the momentum of the EMA teacher is constant here.

    Args:
        encoder: the student's, a ViT; the teacher's copy is evaluated and exported.
        num_patch_prototypes: K of the patch head.
        gram_loss_weight: weight of the Gram loss; 0 leaves it out.
        gram_start_fraction: fraction of the training at which the Gram loss starts.
        gram_warmup_fraction: fraction of the training over which its weight then rises from 0 along a cosine.
        gram_update_at: fractions of the training at which the Gram teacher becomes a copy of the current teacher. ()
            keeps the Gram teacher of the run that the training starts from (--init_from).
        gram_crop_scale: resolution of the Gram teacher's crops, relative to the student's.
        local_loss_weight: weight of the pairs with a local crop after the Gram loss's warm-up; it is 1 before that.
        multi_resolution_crops: entries of (global crop size, local crop size, relative frequency), sizes in pixels; one
            is sampled at each step. () uses `crop_size` and `local_crop_size`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # DINOv2's CPU preset, with constant schedules as in the paper.
        "cpu": DINOv2.presets["cpu"]
        | {
            "encoder.pos_embed": "rope",  # the paper's
            "encoder.rope_augmentation": (0.0, 1.0, 2.0),  # the released models'
            "encoder.num_registers": 4,  # the paper's
            "num_patch_prototypes": 256,  # 98,304 in the paper
            "final_lr": 2e-3,  # constant
            "final_weight_decay": 0.04,  # constant
            "gram_update_at": (0.4,),
            "gram_loss_weight": 10.0,  # 2 in the paper had soon no effect here; with 50 the class token learned less
            "gram_start_fraction": 0.4,
            "gram_warmup_fraction": 0.01,
        },
        # ViT-S on one GPU by the constant schedules of the paper's ViT-7B; not run so far.
        "gpu": DINOv2.presets["gpu"]
        | {
            "encoder.pos_embed": "rope",  # the paper's
            "encoder.rope_augmentation": (0.0, 1.0, 2.0),  # the released models'
            "num_patch_prototypes": 8192,  # 98,304 in the paper
            "crop_size": 256,  # the paper's
            "local_crop_size": 112,  # the paper's
            "image_size": 512,  # Gram crops are 512 pixels
            "sinkhorn_iterations": 3,
            "teacher_momentum": 0.994,
            "layer_decay": 0.98,  # the authors'
            "beta2": 0.99,  # the authors'
            "final_lr": 2e-3,  # constant
            "final_weight_decay": 0.04,  # constant
            "gram_update_at": (0.2,),  # an early teacher, whose patch features the paper found best
            "gram_start_fraction": 0.8,
        },
    }
    normalize_prototypes: ClassVar[bool] = False  # linear last layers

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_patch_prototypes: int = 65_536,
        gram_loss_weight: float = 2.0,
        gram_start_fraction: float = 0.0,
        gram_warmup_fraction: float = 0.001,
        gram_update_at: tuple[float, ...] = (0.0,),
        gram_crop_scale: float = 2.0,
        local_loss_weight: float = 0.5,
        multi_resolution_crops: tuple[tuple[int, int, float], ...] = (),
        **options: Any,
    ):
        super().__init__(encoder, num_patch_prototypes=num_patch_prototypes, **options)
        self.gram_teacher = EMATeacher(self.student["encoder"])
        self.gram_loss_weight, self.gram_start_fraction = gram_loss_weight, gram_start_fraction
        self.gram_warmup_fraction, self.gram_update_at = gram_warmup_fraction, gram_update_at
        self.gram_crop_scale, self.local_loss_weight = gram_crop_scale, local_loss_weight
        self.multi_resolution_crops = multi_resolution_crops
        self.last_progress = -1.0  # of the last step
        self.ema_encoder: EMATeacher | None = None  # with a distillation teacher: the EMA of the student's encoder

    def set_distillation_teacher(self, teacher: Method) -> None:
        """Take the targets from a trained method, which stays frozen (section 5.2).

        The student's crops are not masked; the patch loss is computed where they would have been. The encoder that is
        evaluated is an EMA of the student's, which is not used as a target.

        Raises:
            InputError: if the teacher is neither a DINOv2 nor a DINOv3, or its heads have other numbers of prototypes.
        """
        if not isinstance(teacher, DINOv2):
            raise InputError(f"DINOv3 cannot be distilled from {type(teacher).__name__}; give --teacher a DINOv3 run.")
        given, own = num_prototypes_by_head(teacher), num_prototypes_by_head(self)
        if given != own:
            raise InputError(
                f"The teacher's heads have {given} prototypes and the student's {own}; "
                "give --num_prototypes and --num_patch_prototypes the teacher's values."
            )
        networks = {name: cast(nn.Module, part.network) for name, part in teacher.teacher.items()}
        self.teacher = nn.ModuleDict({name: EMATeacher(network) for name, network in networks.items()})
        self.ema_encoder, self.masks_student = EMATeacher(self.student["encoder"]), False
        self.mask_token.requires_grad_(False)

    @property
    def encoder(self) -> Encoder:
        """Return the teacher's encoder, or with a distillation teacher the EMA of the student's."""
        return cast(Encoder, (self.ema_encoder or self.teacher["encoder"]).network)

    def train(self, mode: bool = True) -> "DINOv3":
        """Set the training mode; a distillation teacher's encoder stays in evaluation mode."""
        super().train(mode)
        if self.ema_encoder is not None:
            self.teacher["encoder"].eval()
        return self

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute the loss of a batch; beyond the terms of `loss_terms` there is "gram", without its weight."""
        risen = (progress - self.gram_start_fraction) / max(self.gram_warmup_fraction, 1e-12)
        risen = min(max(risen, 0.0), 1.0)
        gram_loss_weight = cosine(0.0, self.gram_loss_weight, risen)
        size, local_size = self.crop_size, self.local_crop_size
        if self.multi_resolution_crops:
            frequencies = [frequency for _, _, frequency in self.multi_resolution_crops]
            size, local_size, _ = random.choices(self.multi_resolution_crops, frequencies)[0]
        gram_size = round(self.gram_crop_scale * size) if gram_loss_weight else 0
        sizes, scales = (size, local_size, self.num_local_crops), (self.global_crops_scale, self.local_crops_scale)
        global_crops, local_crops, gram_crops = multi_crop_with_gram_crops(batch.images, gram_size, *sizes, *scales)
        local_loss_weight = cosine(1.0, self.local_loss_weight, risen)
        terms, tokens = self.loss_terms(global_crops, local_crops, progress, local_loss_weight)
        if gram_loss_weight:
            grid = (tokens.patches.shape[1], tokens.patches.shape[2])
            anchor = resize_patch_grid(self.gram_teacher(gram_crops).patches, grid)  # (2B, h, w, D)
            terms["gram"] = gram_loss(tokens.patches.flatten(1, 2), anchor.flatten(1, 2))
            terms["loss"] = terms["loss"] + gram_loss_weight * terms["gram"]
        return terms

    def target_probs(self, features: Tensor) -> Tensor | None:
        """Return targets as DINOv2 does; None with a distillation teacher, whose head does not fit `encoder`."""
        return None if self.ema_encoder is not None else super().target_probs(features)

    def ema_momentum(self, progress: float) -> float:
        """Return the momentum of the EMA teacher, which is constant."""
        return self.teacher_momentum

    def after_step(self, progress: float) -> None:
        """Update the EMA teacher, and at the fractions `gram_update_at` the Gram teacher."""
        if self.ema_encoder is not None:
            self.ema_encoder.update(self.student["encoder"], self.teacher_momentum)
            copy_buffers(self.ema_encoder.network, self.student["encoder"])  # it computes no statistics of its own
        else:
            super().after_step(progress)
        # A training that starts from the weights of a finished one begins again at progress 0.
        previous = self.last_progress if self.last_progress < progress else -1.0
        if any(previous < time <= progress for time in self.gram_update_at):
            self.gram_teacher.update(self.encoder, 0.0)
        self.last_progress = progress

    def get_extra_state(self) -> Tensor:
        """Return the progress of the last step, a float64 scalar (-1 before the first), saved with the weights."""
        return torch.tensor(self.last_progress, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.last_progress = float(state)


def num_prototypes_by_head(method: DINOv2) -> dict[str, int]:
    """Return the number of prototypes K of each head of a method's teacher: "head", and "patch_head" if untied."""
    heads = {name: cast(DINOHead, part.network) for name, part in method.teacher.items() if "head" in name}
    return {name: head.last_layer.out_features for name, head in heads.items()}
