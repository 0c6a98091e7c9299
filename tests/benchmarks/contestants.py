"""Who trains against whom: minissl, lightly's documented recipes, and a plain reading of the DINO paper.

Each is an endless iterator of whole steps, views included, from the same uint8 images in memory; each brings its own
views, data loading, loss and optimiser, as its users would have them. The encoders are alike.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from minissl import train
from minissl.data import Images
from minissl.encoders import make_encoder
from minissl.heads import DINOHead
from minissl.machine import choose_precision, compile_encoders
from minissl.methods.dino import DINO
from minissl.methods.dinov2 import DINOv2
from minissl.methods.simclr import SimCLR
from minissl.vit import ViT
from tests.benchmarks.views import SixViews


@dataclass(frozen=True)
class Setting:
    """What all contestants train: a ViT, its crops, on which device."""

    batch: int = 128
    size: int = 32
    local: int = 16
    locals: int = 4
    prototypes: int = 2048
    width: int = 192
    depth: int = 6
    patch: int = 4
    device: str = "cpu"
    workers: int = 2  # of a DataLoader
    compile: bool = False  # ours

    @property
    def crops(self) -> dict[str, int]:
        return {"size": self.size, "local_size": self.local, "local_crops": self.locals}

    def autocast(self):
        """What a GPU's user adds to a documented recipe; on a CPU the recipes are in fp32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()


class Pictures(Dataset):
    """PIL images from memory, through a transform."""

    def __init__(self, images: Tensor, transform: Callable):
        self.pictures, self.transform = [to_pil_image(image) for image in images], transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(self.pictures[i])


def loaded(images: Tensor, transform: Callable, at: Setting) -> Iterator[list[Tensor]]:
    """Endless batches of views on the device, from worker processes."""
    loader = DataLoader(
        Pictures(images, transform), at.batch, shuffle=True, drop_last=True, num_workers=at.workers,
        persistent_workers=True, pin_memory=at.device == "cuda",
    )  # fmt: skip
    while True:
        for views in loader:
            yield [view.to(at.device, non_blocking=True) for view in views]


def ours(method: nn.Module, images: Tensor, at: Setting) -> Iterator[None]:
    """Our loop, a step at a time."""
    device = torch.device(at.device)
    config = train.TrainConfig(batch_size=at.batch, precision=choose_precision("auto", device))
    method.to(device)
    optimizer = train.make_optimizer(method, config)
    if at.compile:
        compile_encoders(method)
    for step, batch in enumerate(train.batches(Images(images.to(device)), at.batch, 0)):
        train.seed_step(0, step)
        train.training_step(method, optimizer, batch, 0.5, config)
        yield


def our_vit(at: Setting) -> ViT:
    return ViT(at.width, at.depth, at.width // 64, at.patch, at.size)


def our_dino(images: Tensor, at: Setting) -> Iterator[None]:
    return ours(DINO(our_vit(at), **at.crops, prototypes=at.prototypes), images, at)


def our_dinov2(images: Tensor, at: Setting) -> Iterator[None]:
    return ours(DINOv2(our_vit(at), **at.crops, prototypes=at.prototypes), images, at)


def our_simclr(images: Tensor, at: Setting) -> Iterator[None]:
    encoder = make_encoder("resnet18", img_size=at.size)
    return ours(SimCLR(encoder, size=at.size, strength=0.5, blur=0.0), images, at)


def timms_vit(at: Setting) -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        at.size, at.patch, embed_dim=at.width, depth=at.depth, num_heads=at.width // 64, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip


def student_and_teacher(vit: Callable, head: Callable, at: Setting) -> tuple[nn.Sequential, nn.Sequential]:
    student, teacher = (nn.Sequential(vit(), head()).to(at.device) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def stepping(loss: Tensor, optimizer: torch.optim.Optimizer, student: nn.Module, teacher: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for mean, new in zip(teacher.parameters(), student.parameters()):
        mean.data.lerp_(new.data, 0.004)


def lightlys_dino(images: Tensor, at: Setting) -> Iterator[None]:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.transforms import DINOTransform

    head = partial(DINOProjectionHead, at.width, 2048, 256, at.prototypes, freeze_last_layer=1)
    student, teacher = student_and_teacher(partial(timms_vit, at), head, at)
    criterion = DINOLoss(at.prototypes, warmup_teacher_temp_epochs=5).to(at.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    transform = DINOTransform(global_crop_size=at.size, local_crop_size=at.local, n_local_views=at.locals)
    for views in loaded(images, transform, at):
        with torch.no_grad(), at.autocast():
            targets = [teacher(view) for view in views[:2]]
        with at.autocast():
            loss = criterion(targets, [student(view) for view in views], epoch=0)
        stepping(loss, optimizer, student, teacher)
        yield


def plain_dino(images: Tensor, at: Setting) -> Iterator[None]:
    """Section 3.1 line by line: crop after crop, pair after pair, in fp32."""
    student, teacher = student_and_teacher(partial(timms_vit, at), partial(DINOHead, at.width, at.prototypes), at)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    center = torch.zeros(at.prototypes, device=at.device)
    for views in loaded(images, SixViews(at.size, at.local, at.locals), at):
        with torch.no_grad():
            scores = [teacher(view) for view in views[:2]]
        answers, loss = [student(view) for view in views], 0.0
        for g, target in enumerate(scores):
            for v, answer in enumerate(answers):
                if v != g:
                    wanted = ((target - center) / 0.04).softmax(dim=-1)
                    loss = loss - (wanted * (answer / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
        center = 0.9 * center + 0.1 * torch.cat(scores).mean(dim=0)
        stepping(loss, optimizer, student, teacher)
        yield


def lightlys_simclr(images: Tensor, at: Setting) -> Iterator[None]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    encoder = make_encoder("resnet18", img_size=at.size).to(at.device)
    head = SimCLRProjectionHead(encoder.dim, encoder.dim, 128).to(at.device)
    criterion = NTXentLoss(0.5)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4)
    for a, b in loaded(images, SimCLRTransform(input_size=at.size, cj_strength=0.5, gaussian_blur=0.0), at):
        optimizer.zero_grad()
        with at.autocast():
            loss = criterion(head(encoder(a).cls), head(encoder(b).cls))
        loss.backward()
        optimizer.step()
        yield


def lightlys_dinov2(images: Tensor, at: Setting) -> Iterator[None]:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask
    from lightly.transforms import DINOTransform

    side = at.size // at.patch
    head = partial(DINOProjectionHead, at.width, 2048, 256, at.prototypes)
    student, teacher = student_and_teacher(lambda: MaskedVisionTransformerTIMM(timms_vit(at)), head, at)
    of_views = DINOLoss(at.prototypes).to(at.device)
    of_patches, apart = IBOTPatchLoss(at.prototypes).to(at.device), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    transform = DINOTransform(global_crop_size=at.size, local_crop_size=at.local, n_local_views=at.locals)
    for views in loaded(images, transform, at):
        large = torch.cat(views[:2])
        mask = random_block_mask((len(large), side, side), device=at.device)
        with at.autocast():
            with torch.no_grad():
                seen = teacher[0].encode(large)
                targets, hidden = teacher[1](seen[:, 0]), teacher[1](seen[:, 1:].flatten(0, 1)[mask.flatten()])
            tokens = student[0].encode(large, mask=F.pad(mask.flatten(1), (1, 0)))
            small = [student[0].encode(view)[:, 0] for view in views[2:]]
            said = student[1](torch.cat([tokens[:, 0], *small]))
            loss = of_views(list(targets.chunk(2)), list(said.chunk(2 + at.locals)))
            loss = loss + of_patches(hidden, student[1](tokens[:, 1:].flatten(0, 1)[mask.flatten()]), mask)
            loss = loss + 0.1 * sum(apart(x) for x in tokens[:, 0].chunk(2))
        stepping(loss, optimizer, student, teacher)
        yield


CONTESTS = {
    "dino": {"minissl": our_dino, "lightly": lightlys_dino, "plain": plain_dino},
    "simclr": {"minissl": our_simclr, "lightly": lightlys_simclr},
    "dinov2": {"minissl": our_dinov2, "lightly": lightlys_dinov2},
}


def on_a_gpu(at: Setting) -> Setting:
    """ViT-S/16 at the paper's sizes."""
    return replace(
        at, batch=256, size=224, local=96, locals=8, prototypes=8192, width=384, depth=12, patch=16, device="cuda"
    )
