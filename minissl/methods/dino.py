"""DINO: train a student to predict the outputs of its EMA teacher, with no labels and no negatives.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021 (arXiv:2104.14294). The student sees one
view of an image and is trained to predict the teacher's output distribution for another view. The teacher is the
student's EMA. Three mechanisms prevent collapse. No gradient flows into the teacher; its logits are centered, so that
no prototype dominates for all images; and its distributions are sharpened, so that they do not become uniform.

Shapes: B images, G = 2 global and L local crops, V = G + L views, stored view by view: row = view * B + image; K
prototypes, D the encoder's width.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from minissl.data.transforms.multi_view import multi_crop
from minissl.distributed import mean_rows
from minissl.errors import InputError
from minissl.methods.base import Batch, Method
from minissl.methods.losses import koleo_loss, sinkhorn_knopp
from minissl.models.ema import EMATeacher
from minissl.models.heads import DINOHead
from minissl.models.outputs import Encoder
from minissl.training.schedules import cosine, linear


def center_and_sharpen(logits: Tensor, center: Tensor, temperature: float, stop_gradient: bool = True) -> Tensor:
    """Compute the teacher's target probabilities, softmax((t - c) / T) (section 3.1).

    Args:
        logits: t, (..., K).
        center: c, broadcastable to the logits.
        temperature: T.
        stop_gradient: False keeps the gradient, to demonstrate that the student then collapses by moving its targets.

    Returns:
        (..., K), which sum to 1 over K.
    """
    logits = logits.detach() if stop_gradient else logits
    return ((logits - center) / temperature).softmax(dim=-1)


def update_center(center: Tensor, logits: Tensor, momentum: float = 0.9) -> Tensor:
    """Return m c + (1 - m) mean(t), over the rows of the teacher's logits t (..., K) of all processes (equation 4)."""
    mean = mean_rows(logits.flatten(0, -2)).view_as(center)
    return center * momentum + mean * (1 - momentum)


def dino_loss(
    student_logits: Tensor, teacher_probs: Tensor, temperature: float = 0.1, local_loss_weight: float = 1.0
) -> Tensor:
    """Compute the cross-entropy between teacher and student, averaged over all pairs of different views (equation 3).

    For each teacher view g, each student view v other than g, each image b: add the cross-entropy of v under g. The sum
    is divided by the number of terms, B G (V - 1), whatever `local_loss_weight` is.

    Args:
        student_logits: (V, B, K), not divided by a temperature; the first G views are those of the teacher.
        teacher_probs: (G, B, K), which sum to 1 over K.
        temperature: of the student, 0.1 in the paper.
        local_loss_weight: weight of the pairs with a local crop; DINOv3 ends with 0.5.

    Returns:
        A scalar in nats; ln K for a student with uniform outputs, if all pairs have weight 1.
    """
    num_views, num_targets = len(student_logits), len(teacher_probs)
    with torch.autocast(student_logits.device.type, enabled=False):  # bf16 keeps two digits of a number near ln K
        log_probs = (student_logits / temperature).log_softmax(dim=-1)  # (V, B, K)
        pairs = -torch.einsum("g b k, v b k -> g v", teacher_probs, log_probs) / student_logits.shape[1]  # (G, V)
    same_view = torch.eye(num_targets, num_views, dtype=torch.bool, device=pairs.device)
    pairs = pairs.masked_fill(same_view, 0)
    global_sum, local_sum = pairs[:, :num_targets].sum(), pairs[:, num_targets:].sum()
    return (global_sum + local_loss_weight * local_sum) / (num_targets * num_views - num_targets)


def update_teacher(teacher: nn.ModuleDict, student: nn.ModuleDict, momentum: float) -> None:
    """Update all networks of an EMA teacher, in place: weights <- m weights + (1 - m) student weights."""
    for name, network in student.items():
        cast(EMATeacher, teacher[name]).update(network, momentum)


class DINO(Method):
    """Train a student to predict the output distributions of its EMA teacher.

    Args:
        encoder: the student's, maps normalized images to Tokens; the teacher's copy is evaluated and exported.
        crop_size: side of a global crop in pixels.
        local_crop_size: side of a local crop in pixels, a multiple of the encoder's patch size.
        num_local_crops: L of each image; 0 trains on the global crops alone.
        global_crops_scale: range of a global crop's area, as a fraction of the image's.
        local_crops_scale: range of a local crop's area.
        num_prototypes: K; 65,536 for ImageNet, thousands for thousands of images.
        hidden_dim: width of the head's hidden layers.
        bottleneck_dim: dimension of the head's normalized bottleneck.
        student_temp: temperature of the student's softmax.
        teacher_temp: temperature of the teacher's softmax after warm-up; lower is sharper.
        warmup_teacher_temp: temperature of the teacher's softmax at the start.
        warmup_teacher_temp_fraction: fraction of the training over which it changes linearly to `teacher_temp`.
        center_momentum: momentum of the center.
        sinkhorn_iterations: iterations of Sinkhorn-Knopp in place of centering; 0, as in the paper, uses centering.
        teacher_momentum: momentum of the EMA teacher at the start; it rises to 1 along a cosine.
        freeze_last_layer_fraction: fraction of the training, at its start, in which the prototypes get no gradient.
        use_bn_in_head: apply batch norm after each layer of the head.
        koleo_loss_weight: weight of the student's KoLeo regularizer, summed over both global crops; 0 in the paper.
        stop_gradient: False lets the gradient flow through the teacher into the student's weights, to demonstrate
            collapse; not with Sinkhorn-Knopp.

    Raises:
        InputError: for Sinkhorn-Knopp without `stop_gradient`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Trains in minutes on two CPU cores; chosen by k-NN on Scenes and CIFAR-10. The paper had ImageNet and 8 GPUs.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",  # a linear patch embedding learns next to nothing in this time
            "encoder.init_std": 0.088,  # 1 / sqrt(128): with 0.02 the class token hardly attends to patches at first
            "image_size": 64,
            "crop_size": 32,  # 16 patches
            "local_crop_size": 16,  # 4 patches
            "num_local_crops": 0,  # 8 in the paper: here each costs a fifth of the time, without a measured gain
            "global_crops_scale": (0.5, 1.0),  # from 0.4 in the paper
            "local_crops_scale": (0.25, 0.6),  # from 0.05 in the paper: so small a part of 32 pixels shows no object
            "num_prototypes": 256,  # 65,536 in the paper
            "hidden_dim": 256,  # 2048 in the paper
            "bottleneck_dim": 64,  # 256 in the paper
            "use_bn_in_head": True,  # off in the paper: without it, the young teacher's outputs soon become constant
            "koleo_loss_weight": 0.3,  # not in the paper: without it only the color is learned
            "sinkhorn_iterations": 3,  # the paper's alternative to its center, which lags behind so fast a teacher
            "teacher_temp": 0.02,  # 0.04 in the paper: hundreds of steps must sharpen what took 100,000
            "warmup_teacher_temp": 0.02,
            "teacher_momentum": 0.95,  # 0.996 in the paper: in few steps the teacher must move faster
            "batch_size": 64,  # in so few minutes, many steps seem to help more than large batches
            "lr": 2e-3,
            "minutes": 8.0,
        },
        # The paper's ViT-S/16 on one GPU.
        "gpu": {
            "encoder.name": "small",
            "encoder.drop_path": 0.1,  # the paper's
            "image_size": 256,
            "num_prototypes": 8192,  # 65,536 in the paper, for 1.3 million images
            "teacher_momentum": 0.9995,  # the authors' advice for batches of 256; 0.996 for 1,024
            "batch_size": 256,  # 1,024 in the paper (64 on each of 16 GPUs)
            "lr": 5e-4,  # the paper's rule, 5e-4 * batch size / 256
            "compile": True,
        },
    }

    center: Tensor  # (1, K)

    def __init__(
        self,
        encoder: Encoder,
        *,
        crop_size: int = 224,
        local_crop_size: int = 96,
        num_local_crops: int = 8,
        global_crops_scale: tuple[float, float] = (0.4, 1.0),
        local_crops_scale: tuple[float, float] = (0.05, 0.4),
        num_prototypes: int = 65_536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_fraction: float = 0.3,
        center_momentum: float = 0.9,
        sinkhorn_iterations: int = 0,
        teacher_momentum: float = 0.996,
        freeze_last_layer_fraction: float = 0.01,
        use_bn_in_head: bool = False,
        koleo_loss_weight: float = 0.0,
        stop_gradient: bool = True,
    ):
        super().__init__()
        if sinkhorn_iterations and not stop_gradient:
            raise InputError("Sinkhorn-Knopp has no gradient; give --sinkhorn_iterations 0, or --stop_gradient true.")
        head = DINOHead(encoder.embed_dim, num_prototypes, hidden_dim, bottleneck_dim, use_bn_in_head)
        self.student = nn.ModuleDict({"encoder": encoder, "head": head})
        self.teacher = nn.ModuleDict({name: EMATeacher(network) for name, network in self.student.items()})
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.crop_size, self.local_crop_size, self.num_local_crops = crop_size, local_crop_size, num_local_crops
        self.global_crops_scale, self.local_crops_scale = global_crops_scale, local_crops_scale
        self.student_temp, self.teacher_temp, self.warmup_teacher_temp = student_temp, teacher_temp, warmup_teacher_temp
        self.warmup_teacher_temp_fraction, self.center_momentum = warmup_teacher_temp_fraction, center_momentum
        self.sinkhorn_iterations, self.teacher_momentum = sinkhorn_iterations, teacher_momentum
        self.freeze_last_layer_fraction, self.koleo_loss_weight = freeze_last_layer_fraction, koleo_loss_weight
        self.stop_gradient = stop_gradient

    @property
    def encoder(self) -> Encoder:
        """Return the teacher's encoder."""
        return cast(Encoder, self.teacher["encoder"].network)

    def sample_views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Sample normalized global crops (2B, 3, S, S) and local crops (L B, 3, s, s) of images (B, 3, H, W) uint8."""
        sizes = (self.crop_size, self.local_crop_size, self.num_local_crops)
        return multi_crop(images, *sizes, self.global_crops_scale, self.local_crops_scale)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute the loss of a batch, and update the center.

        Returns:
            "loss"; "teacher_entropy", the mean entropy of the targets in nats; "koleo", summed over both global crops,
            without its weight.
        """
        n, frozen = len(batch.images), progress < self.freeze_last_layer_fraction
        temperature = linear(self.warmup_teacher_temp, self.teacher_temp, progress, self.warmup_teacher_temp_fraction)
        global_crops, local_crops = self.sample_views(batch.images)
        teacher_logits = self.teacher_logits(global_crops).float().unflatten(0, (-1, n))  # (2, B, K)
        student = cast(Encoder, self.student["encoder"])
        cls = torch.cat([student.cls_tokens(crops) for crops in (global_crops, local_crops)])  # (V B, D)
        student_logits = self.student["head"](cls, freeze_last_layer=frozen).float().unflatten(0, (-1, n))  # (V, B, K)
        if self.sinkhorn_iterations:
            probs = sinkhorn_knopp(teacher_logits.flatten(0, 1), temperature, self.sinkhorn_iterations)
            probs = probs.view_as(teacher_logits)
        else:
            probs = center_and_sharpen(teacher_logits, self.center, temperature, self.stop_gradient)
        self.center.copy_(update_center(self.center, teacher_logits, self.center_momentum))  # for the next step
        loss = dino_loss(student_logits, probs, self.student_temp)
        terms = {"loss": loss, "teacher_entropy": torch.special.entr(probs).sum(-1).mean()}
        if self.koleo_loss_weight:
            first, second = cls[: 2 * n].split(n)  # KoLeo compares images within a crop
            terms["koleo"] = koleo_loss(first) + koleo_loss(second)
            terms["loss"] = loss + self.koleo_loss_weight * terms["koleo"]
        return terms

    def teacher_logits(self, views: Tensor) -> Tensor:
        """Compute the teacher's logits (N, K) of normalized views (N, 3, S, S)."""
        encoder, head = cast(EMATeacher, self.teacher["encoder"]), cast(EMATeacher, self.teacher["head"])
        if self.stop_gradient:
            return head(encoder.cls_tokens(views))
        tokens = encoder.forward_with_gradient(self.student["encoder"], views)
        return head.forward_with_gradient(self.student["head"], tokens.cls)

    def target_probs(self, features: Tensor) -> Tensor:
        """Return softmax((t - c) / `teacher_temp`), (N, K), for features (N, D) with logits t; c is 0 with Sinkhorn."""
        center = torch.zeros_like(self.center) if self.sinkhorn_iterations else self.center
        return center_and_sharpen(self.teacher["head"](features), center, self.teacher_temp)

    def num_candidates(self, batch_size: int) -> dict[str, int]:
        return {"teacher_entropy": self.center.shape[-1]}

    def after_step(self, progress: float) -> None:
        update_teacher(self.teacher, self.student, cosine(self.teacher_momentum, 1.0, progress))
