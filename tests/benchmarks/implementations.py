"""Implementations that `speed` measures: minissl, lightly's documented recipes, and an explicit loop over DINO's paper.

Each is an endless iterator of whole training steps, views included, from the same uint8 images in memory. Each has its
own views, data loading, loss and optimizer, as its users would have them. The encoders are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from minissl.data import Images
from minissl.methods.base import Method
from minissl.methods.dino import DINO
from minissl.methods.dinov2 import DINOv2
from minissl.methods.simclr import SimCLR
from minissl.models.factory import create_encoder
from minissl.models.heads import DINOHead
from minissl.models.vit import ViT
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.device import choose_precision, compile_encoders
from minissl.training.sampler import iterate_batches, seed_step
from tests.benchmarks.views import TorchvisionMultiCrop


@dataclass(frozen=True)
class Setting:
    """Sizes that all implementations share. Image sizes are sides in pixels."""

    batch_size: int = 128
    image_size: int = 32
    local_crop_size: int = 16
    num_local_crops: int = 4
    num_prototypes: int = 2048
    width: int = 192
    depth: int = 6
    patch_size: int = 4
    device: str = "cpu"
    num_workers: int = 2  # of a DataLoader
    compile: bool = False  # the encoders of minissl

    @property
    def crops(self) -> dict[str, int]:
        """Options of minissl's multi-crop."""
        sizes = {"crop_size": self.image_size, "local_crop_size": self.local_crop_size}
        return sizes | {"num_local_crops": self.num_local_crops}

    def autocast(self) -> AbstractContextManager[Any]:
        """Return bf16 autocast on a GPU, which users add to a documented recipe; on a CPU the recipes run in fp32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()


class PILImages(Dataset):
    """PIL images in memory, with a transform."""

    def __init__(self, images: Tensor, transform: Callable[[Any], list[Tensor]]):
        self.images, self.transform = [to_pil_image(image) for image in images], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(self.images[i])


def load_views(images: Tensor, transform: Callable[[Any], list[Tensor]], setting: Setting) -> Iterator[list[Tensor]]:
    """Yield batches of views on the device, without end, from worker processes."""
    loader = DataLoader(
        PILImages(images, transform), setting.batch_size, shuffle=True, drop_last=True,
        num_workers=setting.num_workers, persistent_workers=True, pin_memory=setting.device == "cuda",
    )  # fmt: skip
    while True:
        for views in loader:
            yield [view.to(setting.device, non_blocking=True) for view in views]


def minissl_steps(method: Method, images: Tensor, setting: Setting) -> Iterator[None]:
    """Train a method of minissl, one step per item."""
    device = torch.device(setting.device)
    config = TrainConfig(batch_size=setting.batch_size, precision=choose_precision("auto", device))
    method.to(device)
    optimizer = trainer.create_optimizer(method, config)
    if setting.compile:
        compile_encoders(method)
    for step, batch in enumerate(iterate_batches(Images(images.to(device)), setting.batch_size, 0)):
        seed_step(0, step)
        trainer.training_step(method, optimizer, batch, 0.5, config)
        yield


def minissl_vit(setting: Setting) -> ViT:
    return ViT(setting.width, setting.depth, setting.width // 64, setting.patch_size, setting.image_size)


def minissl_dino(images: Tensor, setting: Setting) -> Iterator[None]:
    method = DINO(minissl_vit(setting), **setting.crops, num_prototypes=setting.num_prototypes)
    return minissl_steps(method, images, setting)


def minissl_dinov2(images: Tensor, setting: Setting) -> Iterator[None]:
    method = DINOv2(minissl_vit(setting), **setting.crops, num_prototypes=setting.num_prototypes)
    return minissl_steps(method, images, setting)


def minissl_simclr(images: Tensor, setting: Setting) -> Iterator[None]:
    encoder = create_encoder("resnet18", image_size=setting.image_size)
    method = SimCLR(encoder, crop_size=setting.image_size, jitter_strength=0.5, blur_prob=0.0)
    return minissl_steps(method, images, setting)


def timm_vit(setting: Setting) -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        setting.image_size, setting.patch_size, embed_dim=setting.width, depth=setting.depth,
        num_heads=setting.width // 64, num_classes=0, dynamic_img_size=True,
    )  # fmt: skip


def create_student_and_teacher(
    create_vit: Callable[[], nn.Module], create_head: Callable[[], nn.Module], setting: Setting
) -> tuple[nn.Sequential, nn.Sequential]:
    student, teacher = (nn.Sequential(create_vit(), create_head()).to(setting.device) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def update_student_and_teacher(
    loss: Tensor, optimizer: torch.optim.Optimizer, student: nn.Module, teacher: nn.Module
) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for teacher_parameter, student_parameter in zip(teacher.parameters(), student.parameters()):
        teacher_parameter.data.lerp_(student_parameter.data, 0.004)


def lightly_dino(images: Tensor, setting: Setting) -> Iterator[None]:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.transforms import DINOTransform

    create_head = partial(DINOProjectionHead, setting.width, 2048, 256, setting.num_prototypes, freeze_last_layer=1)
    student, teacher = create_student_and_teacher(partial(timm_vit, setting), create_head, setting)
    criterion = DINOLoss(setting.num_prototypes, warmup_teacher_temp_epochs=5).to(setting.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    transform = DINOTransform(
        global_crop_size=setting.image_size, local_crop_size=setting.local_crop_size,
        n_local_views=setting.num_local_crops,
    )  # fmt: skip
    for views in load_views(images, transform, setting):
        with torch.no_grad(), setting.autocast():
            targets = [teacher(view) for view in views[:2]]
        with setting.autocast():
            loss = criterion(targets, [student(view) for view in views], epoch=0)
        update_student_and_teacher(loss, optimizer, student, teacher)
        yield


def loop_dino(images: Tensor, setting: Setting) -> Iterator[None]:
    """Implement section 3.1 of the paper literally: crop by crop, pair by pair, in fp32."""
    create_head = partial(DINOHead, setting.width, setting.num_prototypes)
    student, teacher = create_student_and_teacher(partial(timm_vit, setting), create_head, setting)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    center = torch.zeros(setting.num_prototypes, device=setting.device)
    transform = TorchvisionMultiCrop(setting.image_size, setting.local_crop_size, setting.num_local_crops)
    for views in load_views(images, transform, setting):
        with torch.no_grad():
            teacher_logits = [teacher(view) for view in views[:2]]
        student_logits, loss = [student(view) for view in views], 0.0
        for g, target_logits in enumerate(teacher_logits):
            for v, logits in enumerate(student_logits):
                if v != g:
                    target = ((target_logits - center) / 0.04).softmax(dim=-1)
                    loss = loss - (target * (logits / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
        center = 0.9 * center + 0.1 * torch.cat(teacher_logits).mean(dim=0)
        update_student_and_teacher(loss, optimizer, student, teacher)
        yield


def lightly_simclr(images: Tensor, setting: Setting) -> Iterator[None]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    encoder = create_encoder("resnet18", image_size=setting.image_size).to(setting.device)
    head = SimCLRProjectionHead(encoder.embed_dim, encoder.embed_dim, 128).to(setting.device)
    criterion = NTXentLoss(0.5)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4)
    transform = SimCLRTransform(input_size=setting.image_size, cj_strength=0.5, gaussian_blur=0.0)
    for a, b in load_views(images, transform, setting):
        optimizer.zero_grad()
        with setting.autocast():
            loss = criterion(head(encoder(a).cls), head(encoder(b).cls))
        loss.backward()
        optimizer.step()
        yield


def lightly_dinov2(images: Tensor, setting: Setting) -> Iterator[None]:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask
    from lightly.transforms import DINOTransform

    side = setting.image_size // setting.patch_size
    create_head = partial(DINOProjectionHead, setting.width, 2048, 256, setting.num_prototypes)
    student, teacher = create_student_and_teacher(
        lambda: MaskedVisionTransformerTIMM(timm_vit(setting)), create_head, setting
    )
    dino_loss = DINOLoss(setting.num_prototypes).to(setting.device)
    ibot_loss, koleo_loss = IBOTPatchLoss(setting.num_prototypes).to(setting.device), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    transform = DINOTransform(
        global_crop_size=setting.image_size, local_crop_size=setting.local_crop_size,
        n_local_views=setting.num_local_crops,
    )  # fmt: skip
    for views in load_views(images, transform, setting):
        crops = torch.cat(views[:2])
        mask = random_block_mask((len(crops), side, side), device=setting.device)
        with setting.autocast():
            with torch.no_grad():
                teacher_tokens = teacher[0].encode(crops)
                targets = teacher[1](teacher_tokens[:, 0])
                patch_targets = teacher[1](teacher_tokens[:, 1:].flatten(0, 1)[mask.flatten()])
            tokens = student[0].encode(crops, mask=F.pad(mask.flatten(1), (1, 0)))
            local = [student[0].encode(view)[:, 0] for view in views[2:]]
            logits = student[1](torch.cat([tokens[:, 0], *local]))
            patch_logits = student[1](tokens[:, 1:].flatten(0, 1)[mask.flatten()])
            loss = dino_loss(list(targets.chunk(2)), list(logits.chunk(2 + setting.num_local_crops)))
            loss = loss + ibot_loss(patch_targets, patch_logits, mask)
            loss = loss + 0.1 * sum(koleo_loss(x) for x in tokens[:, 0].chunk(2))
        update_student_and_teacher(loss, optimizer, student, teacher)
        yield


IMPLEMENTATIONS = {  # method: name: images (N, 3, H, W) uint8, setting -> iterator of steps
    "dino": {"minissl": minissl_dino, "lightly": lightly_dino, "explicit loop": loop_dino},
    "simclr": {"minissl": minissl_simclr, "lightly": lightly_simclr},
    "dinov2": {"minissl": minissl_dinov2, "lightly": lightly_dinov2},
}


def gpu_setting(setting: Setting) -> Setting:
    """Return ViT-S/16 with the paper's crops, on a GPU."""
    return replace(
        setting, batch_size=256, image_size=224, local_crop_size=96, num_local_crops=8, num_prototypes=8192, width=384,
        depth=12, patch_size=16, device="cuda",
    )  # fmt: skip
