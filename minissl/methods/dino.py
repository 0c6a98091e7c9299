"""DINO: a student matches its own moving average's softmax on another crop of the image, without labels.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021 (arXiv:2104.14294). Nothing keeps the
two from agreeing on nonsense but three things: no gradient flows into the teacher, its outputs are centred (no
prototype may win for all images) and sharpened (no image may take all prototypes).

Shapes: B images, G = 2 global and L local crops, V = G + L views, K prototypes, D the encoder's width. Views are
stored crop by crop: row = view * B + image.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minissl.balance import koleo, sinkhorn_knopp
from minissl.errors import InputError
from minissl.heads import DINOHead as DINOHead  # also known by this name
from minissl.method import Batch, class_token
from minissl.parallel import mean_rows
from minissl.teacher import Teacher, cosine, linear
from minissl.views import multi_crop


def center_and_sharpen(logits: Tensor, center: Tensor, temperature: float, stop_gradient: bool = True) -> Tensor:
    """The teacher's targets: softmax((t - c) / T). Logits (..., K), centre broadcastable (section 3.1).

    Without `stop_gradient` the student may make its task easy by moving the targets; it is here to be seen failing.
    """
    logits = logits.detach() if stop_gradient else logits
    return ((logits - center) / temperature).softmax(dim=-1)


def update_center(center: Tensor, logits: Tensor, momentum: float = 0.9) -> Tensor:
    """c <- m c + (1 - m) mean of the teacher's logits (..., K) over all rows (eq. 4); keeps the centre's shape."""
    mean = mean_rows(logits.flatten(0, -2)).view_as(center)
    return center * momentum + mean * (1 - momentum)


def cross_view_entropy(student: Tensor, teacher: Tensor, temperature: float = 0.1, local_weight: float = 1.0) -> Tensor:
    """For each teacher view g, each other student view v, each image b: the cross-entropy of v under g; the mean.

    Args:
        student: logits (V, B, K); the first G views are the ones the teacher saw.
        teacher: probabilities (G, B, K).
        temperature: the student's, 0.1 in the paper.
        local_weight: of the pairs whose student view is none of the teacher's; DINOv3 has 0.5 in the end.

    Returns:
        A scalar, eq. 3 divided by its number of pairs; ln K when the student knows nothing.
    """
    views, targets = len(student), len(teacher)
    with torch.autocast(student.device.type, enabled=False):  # of numbers near ln K, bf16 keeps two digits
        scores = (student / temperature).log_softmax(dim=-1)  # (V, B, K)
        pairs = -torch.einsum("g b k, v b k -> g v", teacher, scores) / student.shape[1]  # (G, V)
    same = torch.eye(targets, views, dtype=torch.bool, device=pairs.device)
    pairs = pairs.masked_fill(same, 0)
    shared, local = pairs[:, :targets].sum(), pairs[:, targets:].sum()
    return (shared + local_weight * local) / (targets * views - targets)


class DINO(nn.Module):
    """Self-distillation with no labels.

    Args:
        encoder: the student's, images -> Tokens, with its width as `dim`; the teacher's copy is what is kept.
        size: pixels of a global crop.
        local_size: pixels of a local crop; it must suit the encoder's patches.
        local_crops: how many small crops the student has to explain.
        global_scale: share of the image's area of a global crop.
        local_scale: share of the image's area of a local crop.
        prototypes: K, the number of outputs; 65,536 for ImageNet, thousands for thousands of images.
        hidden: width of the head's hidden layers.
        bottleneck: dimensions of the sphere the prototypes lie on.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, at the end of its warm-up; lower is sharper.
        warmup_temperature: of the teacher's, at the start.
        temperature_warmup: share of the run over which it moves from one to the other.
        center_momentum: of the running mean of the teacher's logits.
        sinkhorn: iterations of Sinkhorn-Knopp, in place of the centre; 0, as in the paper, centres.
        momentum: of the teacher at the start; it ends at 1, along a cosine.
        freeze_last: share of the run in which the prototypes stay as they were drawn.
        batch_norm: in the head, after each of its layers.
        koleo: weight of the term that keeps the class tokens of a crop apart; 0, as in the paper, leaves it out.
        stop_gradient: False lets the loss move its targets too, through the teacher into the student's weights, to show
            what happens then; not with sinkhorn.

    Raises:
        InputError: for sinkhorn without stop_gradient.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # What learns in minutes on two cores, by k-NN on Scenes and CIFAR-10; the paper had 1.3 million images, 8 GPUs.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",  # a linear patch embedding learns next to nothing in this time
            "encoder.init_std": 0.088,  # 1 / sqrt(128): with 0.02 the class token hardly sees the patches at first
            "image_size": 64,
            "size": 32,  # 16 patches
            "local_size": 16,  # 4 patches
            "local_crops": 0,  # 8 in the paper: four patches each cost a fifth of the time, and no gain was seen
            "global_scale": (0.5, 1.0),  # from 0.4 in the paper
            "local_scale": (0.25, 0.6),  # from 0.05 in the paper: so little of 32 pixels shows nothing
            "prototypes": 256,  # 65,536 in the paper
            "hidden": 256,  # 2048 in the paper
            "bottleneck": 64,  # 256 in the paper
            "batch_norm": True,  # off in the paper: without it, a teacher this young soon says the same of everything
            "koleo": 0.3,  # not in the paper: without it the colour is learnt and nothing else
            "sinkhorn": 3,  # the paper's alternative to its centre, which cannot follow a teacher that moves so fast
            "teacher_temperature": 0.02,  # 0.04 in the paper: hundreds of steps must sharpen what took them 100,000
            "warmup_temperature": 0.02,
            "momentum": 0.95,  # 0.996 in the paper: as many steps as there are, the teacher must move
            "batch_size": 64,  # in so few minutes many steps seem to count for more than large ones
            "lr": 2e-3,
            "minutes": 8.0,
        },
        # The paper's ViT-S/16 on one GPU.
        "gpu": {
            "encoder.name": "small",
            "encoder.drop_path": 0.1,
            "image_size": 256,
            "prototypes": 8192,  # 65,536 in the paper, for 1.3 million images
            "batch_size": 256,  # 1,024 in the paper (64 on each of 16 GPUs)
            "lr": 5e-4,  # the paper's rule, 5e-4 * batch size / 256
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: nn.Module,
        *,
        size: int = 224,
        local_size: int = 96,
        local_crops: int = 8,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        prototypes: int = 65_536,
        hidden: int = 2048,
        bottleneck: int = 256,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_temperature: float = 0.04,
        temperature_warmup: float = 0.3,
        center_momentum: float = 0.9,
        sinkhorn: int = 0,
        momentum: float = 0.996,
        freeze_last: float = 0.01,
        batch_norm: bool = False,
        koleo: float = 0.0,
        stop_gradient: bool = True,
    ):
        super().__init__()
        if sinkhorn and not stop_gradient:
            raise InputError("Sinkhorn-Knopp lets no gradient through; give --sinkhorn 0, or leave --stop_gradient on.")
        self.student = nn.ModuleDict(
            {"encoder": encoder, "head": DINOHead(encoder.dim, prototypes, hidden, bottleneck, batch_norm)}
        )
        self.teacher = nn.ModuleDict({name: Teacher(part) for name, part in self.student.items()})
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.crops = {"size": size, "local_size": local_size, "local_crops": local_crops}
        self.crops |= {"global_scale": global_scale, "local_scale": local_scale}
        self.student_temperature = student_temperature
        self.temperatures = {"start": warmup_temperature, "end": teacher_temperature, "until": temperature_warmup}
        self.center_momentum, self.momentum, self.freeze_last = center_momentum, momentum, freeze_last
        self.sinkhorn, self.koleo, self.stop_gradient = sinkhorn, koleo, stop_gradient

    @property
    def encoder(self) -> nn.Module:
        return self.teacher["encoder"].network

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        temperature = linear(**self.temperatures, progress=progress)
        large, small = multi_crop(batch.images, **self.crops)
        target = self.ask_teacher(large).float()  # (2B, K)
        cls = torch.cat([class_token(self.student["encoder"], crops) for crops in (large, small)])  # (V B, D)
        scores = self.student["head"](cls, freeze_last=progress < self.freeze_last).float()  # (V B, K)
        n = len(batch.images)
        target, scores = target.unflatten(0, (-1, n)), scores.unflatten(0, (-1, n))  # (2, B, K), (V, B, K)
        if self.sinkhorn:
            probabilities = sinkhorn_knopp(target.flatten(0, 1), temperature, self.sinkhorn).view_as(target)
        else:
            probabilities = center_and_sharpen(target, self.center, temperature, self.stop_gradient)
        self.center.copy_(update_center(self.center, target, self.center_momentum))  # after its use, for the next step
        loss = cross_view_entropy(scores, probabilities, self.student_temperature)
        terms = {"loss": loss, "teacher_entropy": torch.special.entr(probabilities).sum(-1).mean()}
        if self.koleo:
            terms["koleo"] = sum(koleo(crop) for crop in cls[: 2 * n].split(n))
            terms["loss"] = loss + self.koleo * terms["koleo"]
        return terms

    def ask_teacher(self, views: Tensor) -> Tensor:
        """The teacher's logits, (N, K)."""
        encoder, head = self.teacher["encoder"], self.teacher["head"]
        if self.stop_gradient:
            return head(class_token(encoder, views))
        return head.leaking(self.student["head"], encoder.leaking(self.student["encoder"], views).cls)

    def guesses(self, batch_size: int) -> dict[str, int]:
        return {"teacher_entropy": self.center.shape[-1]}

    def after_step(self, progress: float) -> None:
        momentum = cosine(self.momentum, 1.0, progress)
        for name, part in self.student.items():
            self.teacher[name].follow(part, momentum)
