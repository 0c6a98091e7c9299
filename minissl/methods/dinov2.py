"""DINOv2: combine DINO on class tokens with masked image modeling on patch tokens.

Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023 (arXiv:2304.07193). It combines DINO
with iBOT (Zhou et al., 2021, arXiv:2111.07832): the student predicts the teacher's distributions for masked patches.
Sinkhorn-Knopp replaces centering, and the KoLeo regularizer spreads the class tokens of a batch.

Shapes: B images, G = 2 global and L local crops, V = G + L views, stored view by view; a grid (h, w) of N patches, M of
all patches of the 2B global crops masked; K prototypes, D the encoder's width.
"""

import random
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from minissl.data.transforms.masking import sample_block_masks
from minissl.data.transforms.multi_view import multi_crop
from minissl.errors import InputError
from minissl.methods.base import Batch, Method
from minissl.methods.dino import DINO, center_and_sharpen, dino_loss, update_center, update_teacher
from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from minissl.models.ema import EMATeacher
from minissl.models.heads import DINOHead
from minissl.models.layers import layer_lr_scales
from minissl.models.outputs import Encoder, Tokens
from minissl.training.schedules import cosine, linear

MASKED_FRACTION = 0.5  # of the global crops; the others stay unmasked, as in the paper


def ibot_patch_loss(student_logits: Tensor, teacher_probs: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the cross-entropy between teacher and student on masked patches (iBOT, equation 2).

    The scalar is a mean over the masked patches of a crop, then over all crops; one without masked patches counts as 0.

    Args:
        student_logits: (M, K) of the masked patches, in the row-major order of `mask`.
        teacher_probs: (M, K) of the same patches, computed from the unmasked crops.
        mask: bool (2B, N), one row for each crop, M entries True.
        temperature: of the student.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        log_probs = (student_logits / temperature).log_softmax(dim=-1)
        losses = -(teacher_probs * log_probs).sum(dim=-1)  # (M,)
        # The crop of each masked patch, without `nonzero`, for which the CPU would wait for a GPU.
        positions = mask.flatten().byte().argsort(descending=True, stable=True)[: len(losses)]  # (M,)
        weights = 1 / mask.sum(dim=1).clamp_min(1)  # (B,)
        return (losses * weights[positions // mask.shape[1]]).sum() / len(mask)


class DINOv2(Method):
    """Train a student by self-distillation of class tokens and masked patch tokens.

    Args:
        encoder: the student's, a ViT; the teacher's copy is evaluated and exported.
        crop_size: side of a global crop in pixels.
        local_crop_size: side of a local crop in pixels, a multiple of the encoder's patch size.
        num_local_crops: L of each image; 0 trains on the global crops alone.
        global_crops_scale: range of a global crop's area, as a fraction of the image's.
        local_crops_scale: range of a local crop's area.
        num_prototypes: K of the class token's head.
        num_patch_prototypes: K of the patch head; 0 ties the heads: patches use the class token's.
        hidden_dim: width of the heads' hidden layers.
        bottleneck_dim: dimension of the heads' normalized bottleneck.
        use_bn_in_head: apply batch norm after each layer of the heads.
        teacher_temp: temperature of the teacher's softmax after warm-up; lower is sharper. The student's is 0.1.
        warmup_teacher_temp: temperature of the teacher's softmax at the start.
        warmup_teacher_temp_fraction: fraction of the training over which it changes linearly to `teacher_temp`.
        sinkhorn_iterations: iterations of Sinkhorn-Knopp; 0 uses centering, as DINO does.
        koleo_loss_weight: weight of the student's KoLeo regularizer on class tokens, summed over both global crops.
        ibot_loss_weight: weight of the loss on masked patches; 0 masks nothing.
        ibot_end_fraction: fraction of the training after which nothing is masked; 1 masks to the end.
        mask_ratio: range of the fraction of masked patches in one half of the global crops; the others are not masked.
        teacher_momentum: momentum of the EMA teacher at the start; it rises to 1 along a cosine.
        freeze_last_layer_fraction: fraction of the training, at its start, in which the prototypes get no gradient.
        layer_decay: factor on the learning rate from each block to the one below.
        patch_embed_lr_mult: further factor on the learning rate of the patch embedding.

    Raises:
        InputError: for an encoder that cannot mask patches, unless `ibot_loss_weight` is 0.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # DINO's CPU preset, with masked patches.
        "cpu": DINO.presets["cpu"]
        | {
            "ibot_loss_weight": 0.2,  # 1 in the paper: patch mIoU 16.6 with 1, 21.1 with 0.2 (val, one seed each)
            "layer_decay": 1.0,  # 0.9 in the paper; nano has one block
            "patch_embed_lr_mult": 1.0,  # 0.2 in the paper; here the patch embedding has to learn in minutes
        },
        # ViT-S by the authors' short recipe (ImageNet-1k, 32 GPUs) on one GPU, with the registers that came later.
        "gpu": {
            "encoder.name": "small",
            "encoder.drop_path": 0.1,  # 0.3 in the paper, for ViT-L
            "encoder.num_registers": 4,  # Darcet et al., 2023 (arXiv:2309.16588)
            "encoder.layer_scale_init": 1e-5,  # the paper's
            "image_size": 256,
            "num_prototypes": 8192,  # 65,536 in the paper, for 1.3 million images
            "sinkhorn_iterations": 0,  # centering, as the authors' short recipe for ImageNet-1k
            "batch_size": 256,  # 2,048 in the paper
            "lr": 2e-3,  # the paper's rule, 4e-3 * sqrt(batch size / 1024)
            "compile": True,
        },
    }

    normalize_prototypes: ClassVar[bool] = True  # logits are cosines, as in DINO
    masks_student = True  # the student does not see the patches it predicts
    center: Tensor  # (1, K)
    patch_center: Tensor  # (1, K)

    def __init__(
        self,
        encoder: Encoder,
        *,
        crop_size: int = 224,
        local_crop_size: int = 96,
        num_local_crops: int = 8,
        global_crops_scale: tuple[float, float] = (0.32, 1.0),
        local_crops_scale: tuple[float, float] = (0.05, 0.32),
        num_prototypes: int = 65_536,
        num_patch_prototypes: int = 0,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn_in_head: bool = False,
        teacher_temp: float = 0.07,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_fraction: float = 0.3,
        sinkhorn_iterations: int = 3,
        koleo_loss_weight: float = 0.1,
        ibot_loss_weight: float = 1.0,
        ibot_end_fraction: float = 1.0,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        teacher_momentum: float = 0.992,
        freeze_last_layer_fraction: float = 0.01,
        layer_decay: float = 0.9,
        patch_embed_lr_mult: float = 0.2,
    ):
        super().__init__()
        self.crop_size, self.local_crop_size, self.num_local_crops = crop_size, local_crop_size, num_local_crops
        self.global_crops_scale, self.local_crops_scale = global_crops_scale, local_crops_scale
        self.teacher_temp, self.warmup_teacher_temp = teacher_temp, warmup_teacher_temp
        self.warmup_teacher_temp_fraction, self.sinkhorn_iterations = warmup_teacher_temp_fraction, sinkhorn_iterations
        self.koleo_loss_weight, self.ibot_loss_weight = koleo_loss_weight, ibot_loss_weight
        self.ibot_end_fraction, self.mask_ratio = ibot_end_fraction, mask_ratio
        self.teacher_momentum, self.freeze_last_layer_fraction = teacher_momentum, freeze_last_layer_fraction
        self.layer_decay, self.patch_embed_lr_mult = layer_decay, patch_embed_lr_mult
        head_options = (hidden_dim, bottleneck_dim, use_bn_in_head, self.normalize_prototypes)
        self._create_networks(encoder, num_prototypes, num_patch_prototypes, head_options)

    def _create_networks(self, encoder: Encoder, k: int, patch_k: int, head_options: tuple[Any, ...]) -> None:
        """Create student, teacher, mask token and centers, with k and patch_k prototypes."""
        if self.ibot_loss_weight and not encoder.supports_masking:
            raise InputError("This encoder cannot mask patches; give --encoder.name nano, or --ibot_loss_weight 0.")
        self.student = nn.ModuleDict({"encoder": encoder, "head": DINOHead(encoder.embed_dim, k, *head_options)})
        if self.ibot_loss_weight and patch_k:
            self.student["patch_head"] = DINOHead(encoder.embed_dim, patch_k, *head_options)
        self.teacher = nn.ModuleDict({name: EMATeacher(network) for name, network in self.student.items()})
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.embed_dim))  # replaces the embedding of a masked patch
        self.register_buffer("center", torch.zeros(1, k))
        self.register_buffer("patch_center", torch.zeros(1, patch_k or k))

    @property
    def encoder(self) -> Encoder:
        """Return the teacher's encoder."""
        return cast(Encoder, self.teacher["encoder"].network)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute the loss of a batch, with the terms of `loss_terms`."""
        sizes = (self.crop_size, self.local_crop_size, self.num_local_crops)
        crops = multi_crop(batch.images, *sizes, self.global_crops_scale, self.local_crops_scale)
        return self.loss_terms(*crops, progress)[0]

    def loss_terms(
        self, global_crops: Tensor, local_crops: Tensor, progress: float, local_loss_weight: float = 1.0
    ) -> tuple[dict[str, Tensor], Tokens]:
        """Compute the terms of the loss, and the student's tokens of the global crops.

        Args:
            global_crops: (2B, 3, S, S), normalized.
            local_crops: (L B, 3, s, s), normalized.
            progress: fraction of the training that is done, in [0, 1].
            local_loss_weight: weight of the pairs with a local crop.

        Returns:
            "loss"; "teacher_entropy", the mean entropy of the class tokens' targets in nats; "koleo", summed over both
            global crops, and "ibot", without their weights. And the tokens of the 2B global crops.
        """
        n, frozen = len(global_crops) // 2, progress < self.freeze_last_layer_fraction
        temperature = linear(self.warmup_teacher_temp, self.teacher_temp, progress, self.warmup_teacher_temp_fraction)
        ended = self.ibot_end_fraction <= progress and self.ibot_end_fraction < 1
        ibot_loss_weight = 0.0 if ended else self.ibot_loss_weight
        student = cast(Encoder, self.student["encoder"])
        teacher_tokens = self.teacher["encoder"](global_crops)
        masks, masked = self.sample_masks(teacher_tokens.patches) if ibot_loss_weight else (None, None)
        masking = (masks, self.mask_token) if masks is not None and self.masks_student else ()
        tokens = student(global_crops, *masking)
        cls = [tokens.cls, *([student.cls_tokens(local_crops)] if len(local_crops) else [])]
        logits = self.student["head"](torch.cat(cls), frozen).float().unflatten(0, (-1, n))  # (V, B, K)
        probs = self.teacher_probs("head", teacher_tokens.cls, self.center, temperature)  # (2B, K)
        terms = {"teacher_entropy": torch.special.entr(probs).sum(-1).mean()}
        loss = dino_loss(logits, probs.unflatten(0, (2, n)), local_loss_weight=local_loss_weight)
        if self.koleo_loss_weight:
            first, second = tokens.cls.split(n)  # KoLeo compares images within a crop
            terms["koleo"] = koleo_loss(first) + koleo_loss(second)
            loss = loss + self.koleo_loss_weight * terms["koleo"]
        if masks is not None:
            patches, teacher_patches = (x.patches.flatten(0, 2)[masked] for x in (tokens, teacher_tokens))  # (M, D)
            head = "patch_head" if "patch_head" in self.student else "head"
            probs = self.teacher_probs(head, teacher_patches, self.patch_center, temperature)  # (M, K)
            logits = self.student[head](patches, frozen).float()  # (M, K)
            terms["ibot"] = ibot_patch_loss(logits, probs, masks.flatten(1))
            loss = loss + ibot_loss_weight * terms["ibot"]
        return {"loss": loss} | terms, tokens

    def sample_masks(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Sample masks (2B, h, w), True if masked, of patches (2B, h, w, D), and flat indices (M,) of masked ones."""
        grid, rng = (patches.shape[1], patches.shape[2]), random.Random(random.getrandbits(62))
        masks, masked = sample_block_masks(len(patches), grid, MASKED_FRACTION, self.mask_ratio, rng, views=2)
        return masks.to(patches.device, non_blocking=True), masked.to(patches.device, non_blocking=True)

    def teacher_probs(self, head: str, tokens: Tensor, center: Tensor, temperature: float) -> Tensor:
        """Compute the teacher's target probabilities (N, K) of tokens (N, D); centering updates `center` in place."""
        logits = self.teacher[head](tokens).float()
        if self.sinkhorn_iterations:
            return sinkhorn_knopp(logits, temperature, self.sinkhorn_iterations)
        probs = center_and_sharpen(logits, center, temperature)
        center.copy_(update_center(center, logits))
        return probs

    def target_probs(self, features: Tensor) -> Tensor | None:
        """Return softmax((t - c) / `teacher_temp`), (N, K), for features (N, D) with logits t; c is 0 with Sinkhorn."""
        center = torch.zeros_like(self.center) if self.sinkhorn_iterations else self.center
        return center_and_sharpen(self.teacher["head"](features), center, self.teacher_temp)

    def num_candidates(self, batch_size: int) -> dict[str, int]:
        return {"teacher_entropy": self.center.shape[-1]}

    def param_lr_scales(self) -> dict[str, float]:
        scales = layer_lr_scales(self.student["encoder"], self.layer_decay, "student.encoder.", layers_above=1)
        scales["mask_token"] = scales.get("student.encoder.cls_token", 1.0)
        return {k: scale * (self.patch_embed_lr_mult if ".patch_embed." in k else 1) for k, scale in scales.items()}

    def ema_momentum(self, progress: float) -> float:
        """Return the momentum of the EMA teacher, which rises to 1 along a cosine."""
        return cosine(self.teacher_momentum, 1.0, progress)

    def after_step(self, progress: float) -> None:
        update_teacher(self.teacher, self.student, self.ema_momentum(progress))
