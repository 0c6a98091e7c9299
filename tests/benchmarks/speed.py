"""How fast one trains, views included: by minissl, by lightly's documented recipe, by a plain reading of the paper.

The same ViT (width 192, 6 blocks, patches of 4 pixels, images of 32, two large crops and four of 16), head and batch of
128; every contestant in a process of its own, with as many threads as there are cores. They take turns, a few steps
each, so that what else the machine does falls on all alike; what a DataLoader had ready from before a turn is used up
before its time is taken. Then what a step is made of, how it grows, and k-NN.

    python -m tests.benchmarks.speed [--turns 5] [--steps 6] [--only dino simclr dinov2] [--out runs/speed.json]
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import to_pil_image

from minissl import checkpoint, train
from minissl.data import Images, load
from minissl.encoders import make_encoder
from minissl.evaluate import knn
from minissl.machine import choose_precision
from minissl.methods.dino import DINO
from minissl.methods.dinov2 import DINOv2
from minissl.methods.simclr import SimCLR
from minissl.vit import ViT
from tests.benchmarks.views import SixViews

BATCH, SIZE, LOCAL, LOCALS, PROTOTYPES, WIDTH, DEPTH, PATCH = 128, 32, 16, 4, 2048, 192, 6, 4
CROPS = {"size": SIZE, "local_size": LOCAL, "local_crops": LOCALS}


def our_vit(depth: int = DEPTH, size: int = SIZE) -> ViT:
    return ViT(WIDTH, depth, 3, PATCH, size)


def timms_vit() -> nn.Module:
    import timm

    return timm.models.VisionTransformer(
        SIZE, PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=3, num_classes=0, dynamic_img_size=True
    )


class Pictures(Dataset):
    """PIL images from memory, through a transform."""

    def __init__(self, images: torch.Tensor, transform: Callable):
        self.pictures, self.transform = [to_pil_image(image) for image in images], transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return self.transform(self.pictures[i])


def loaded(images: torch.Tensor, transform: Callable) -> Iterator[list[torch.Tensor]]:
    """Endless batches of views, from as many worker processes as there are cores."""
    data = Pictures(images, transform)
    loader = DataLoader(
        data, BATCH, shuffle=True, drop_last=True, num_workers=torch.get_num_threads(), persistent_workers=True
    )
    while True:
        yield from loader


def ours(method: nn.Module, images: torch.Tensor, batch_size: int = BATCH) -> Iterator[None]:
    """Our loop, a step at a time."""
    config = train.TrainConfig(batch_size=batch_size, precision=choose_precision("auto", torch.device("cpu")))
    optimizer = train.make_optimizer(method, config)
    for step, batch in enumerate(train.batches(Images(images), batch_size, 0)):
        train.seed_step(0, step)
        train.training_step(method, optimizer, batch, 0.5, config)
        yield


def our_dino(images: torch.Tensor) -> Iterator[None]:
    return ours(DINO(our_vit(), **CROPS, prototypes=PROTOTYPES), images)


def our_dinov2(images: torch.Tensor) -> Iterator[None]:
    return ours(DINOv2(our_vit(), **CROPS, prototypes=PROTOTYPES), images)


def our_simclr(images: torch.Tensor) -> Iterator[None]:
    return ours(SimCLR(make_encoder("resnet18", img_size=SIZE), size=SIZE, strength=0.5, blur=0.0), images)


def student_and_teacher(vit: Callable, head: Callable) -> tuple[nn.Sequential, nn.Sequential]:
    student, teacher = (nn.Sequential(vit(), head()) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def stepping(loss: torch.Tensor, optimizer: torch.optim.Optimizer, student: nn.Module, teacher: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for mean, new in zip(teacher.parameters(), student.parameters()):
        mean.data.lerp_(new.data, 0.004)


def lightlys_dino(images: torch.Tensor) -> Iterator[None]:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.transforms import DINOTransform

    head = partial(DINOProjectionHead, WIDTH, 2048, 256, PROTOTYPES, freeze_last_layer=1)
    student, teacher = student_and_teacher(timms_vit, head)
    criterion = DINOLoss(PROTOTYPES, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    transform = DINOTransform(global_crop_size=SIZE, local_crop_size=LOCAL, n_local_views=LOCALS)
    for views in loaded(images, transform):
        with torch.no_grad():
            targets = [teacher(view) for view in views[:2]]
        loss = criterion(targets, [student(view) for view in views], epoch=0)
        stepping(loss, optimizer, student, teacher)
        yield


def plain_dino(images: torch.Tensor) -> Iterator[None]:
    """Section 3.1 line by line: crop after crop, pair after pair, in fp32."""
    from minissl.heads import DINOHead

    student, teacher = student_and_teacher(timms_vit, partial(DINOHead, WIDTH, PROTOTYPES))
    optimizer, center = torch.optim.AdamW(student.parameters(), lr=5e-4), torch.zeros(PROTOTYPES)
    for views in loaded(images, SixViews()):
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


def lightlys_simclr(images: torch.Tensor) -> Iterator[None]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    encoder = make_encoder("resnet18", img_size=SIZE)
    head, criterion = SimCLRProjectionHead(encoder.dim, encoder.dim, 128), NTXentLoss(0.5)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.06, momentum=0.9, weight_decay=5e-4)
    for a, b in loaded(images, SimCLRTransform(input_size=SIZE, cj_strength=0.5, gaussian_blur=0.0)):
        optimizer.zero_grad()
        criterion(head(encoder(a).cls), head(encoder(b).cls)).backward()
        optimizer.step()
        yield


def lightlys_dinov2(images: torch.Tensor) -> Iterator[None]:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask
    from lightly.transforms import DINOTransform

    side = SIZE // PATCH
    head = partial(DINOProjectionHead, WIDTH, 2048, 256, PROTOTYPES)
    student, teacher = student_and_teacher(lambda: MaskedVisionTransformerTIMM(timms_vit()), head)
    of_views, of_patches, apart = DINOLoss(PROTOTYPES), IBOTPatchLoss(PROTOTYPES), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for views in loaded(images, DINOTransform(global_crop_size=SIZE, local_crop_size=LOCAL, n_local_views=LOCALS)):
        large = torch.cat(views[:2])
        mask = random_block_mask((len(large), side, side))
        with torch.no_grad():
            seen = teacher[0].encode(large)
            targets, hidden = teacher[1](seen[:, 0]), teacher[1](seen[:, 1:].flatten(0, 1)[mask.flatten()])
        tokens = student[0].encode(large, mask=F.pad(mask.flatten(1), (1, 0)))
        small = [student[0].encode(view)[:, 0] for view in views[2:]]
        said = student[1](torch.cat([tokens[:, 0], *small]))
        loss = of_views(list(targets.chunk(2)), list(said.chunk(2 + LOCALS)))
        loss = loss + of_patches(hidden, student[1](tokens[:, 1:].flatten(0, 1)[mask.flatten()]), mask)
        loss = loss + 0.1 * sum(apart(x) for x in tokens[:, 0].chunk(2))
        stepping(loss, optimizer, student, teacher)
        yield


CONTESTS = {
    "dino": {"minissl": our_dino, "lightly": lightlys_dino, "plain": plain_dino},
    "simclr": {"minissl": our_simclr, "lightly": lightlys_simclr},
    "dinov2": {"minissl": our_dinov2, "lightly": lightlys_dinov2},
}


def serve(contestant: Callable, images: torch.Tensor, line) -> None:
    """Take as many steps as the line asks for; answer with seconds and bytes, worker processes included."""
    torch.manual_seed(0)
    steps = contestant(images)
    while (count := line.recv()) > 0:
        start = time.perf_counter()
        for _ in range(count):
            next(steps)
        seconds, me = time.perf_counter() - start, psutil.Process()
        line.send((seconds, sum(p.memory_info().rss for p in [me, *me.children(recursive=True)])))


def contest(contestants: dict[str, Callable], images: torch.Tensor, turns: int, steps: int) -> dict[str, dict]:
    """Images a second of each in each turn, and its memory at the end."""
    there, context = {}, multiprocessing.get_context("spawn")
    for name, contestant in contestants.items():
        line, other = context.Pipe()
        context.Process(target=serve, args=(contestant, images, other)).start()
        other.close()
        there[name] = line
    found = {name: {"images_per_second": [], "memory": 0} for name in there}
    for turn in range(-1, turns):  # the first only warms up
        for name, line in there.items():
            line.send(2 * torch.get_num_threads() + 1)  # what a DataLoader has ready
            line.recv()
            line.send(steps)
            seconds, found[name]["memory"] = line.recv()
            if turn >= 0:
                found[name]["images_per_second"].append(steps * BATCH / seconds)
    for line in there.values():
        line.send(0)
    return found


def seconds(do: Callable[[], object], times: int = 5) -> float:
    """The median of some times, after one to warm up."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        do()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def rates(n: int = 2048) -> dict[str, float]:
    """Multiplications and additions a second of large matrix products, the most that can be had of this machine."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(n, n, dtype=dtype)
        found[name] = 2 * n**3 / seconds(lambda a=a: a @ a)
    return found


def reached(images: torch.Tensor) -> dict[str, float]:
    """What a step of our DINO multiplies, and its share of what the machine could in that time."""
    steps, best = our_dino(images), rates()
    next(steps)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    each = seconds(lambda: next(steps))
    precision = choose_precision("auto", torch.device("cpu"))
    counted = counter.get_total_flops()
    return {"operations": counted, "seconds": each, "share": counted / each / best[precision], **best}


def growth(images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Seconds a step of our DINO, one thing changed at a time."""

    def step(batch: int = BATCH, size: int = SIZE, depth: int = DEPTH, prototypes: int = PROTOTYPES) -> float:
        method = DINO(our_vit(depth, size), **CROPS | {"size": size}, prototypes=prototypes)
        steps = ours(method, images, batch)
        return seconds(lambda: next(steps), 3)

    return {
        "batch": {str(n): step(batch=n) for n in (32, 64, 128, 256)},
        "size": {str(n): step(size=n) for n in (16, 32, 48, 64)},
        "depth": {str(n): step(depth=n) for n in (1, 3, 6, 12)},
        "prototypes": {str(n): step(prototypes=n) for n in (256, 2048, 16384, 65536)},
    }


def neighbours(n: int = 50_000, m: int = 10_000) -> dict[str, float]:
    """Seconds for the 20 nearest of n vectors of each of m."""
    from lightly.utils.benchmarking import knn_predict

    torch.manual_seed(0)
    x, labels, y = torch.randn(n, WIDTH), torch.randint(10, (n,)), torch.randn(m, WIDTH)
    bank = F.normalize(x, dim=1).T.contiguous()
    theirs = [
        lambda part=part: knn_predict(F.normalize(part, dim=1), bank, labels, 10, 20, 0.07) for part in y.split(512)
    ]
    return {"minissl": seconds(lambda: knn(x, labels, y), 3), "lightly": seconds(lambda: [do() for do in theirs], 3)}


def table(found: dict[str, dict[str, dict]]) -> str:
    """Medians and ranges over the turns, and how many times as fast we are, turn by turn."""
    lines = ["| | images/s | minissl is faster by | memory, GB |", "|---|---|---|---|"]
    for contest_name, rows in found.items():
        for name, row in rows.items():
            speeds, own = row["images_per_second"], rows["minissl"]["images_per_second"]
            times = [a / b for a, b in zip(own, speeds)]
            said = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
            more = "" if name == "minissl" else f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
            lines.append(f"| {contest_name}, {name} | {said} | {more} | {row['memory'] / 1e9:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each contestant in a turn")
    parser.add_argument("--only", nargs="+", default=list(CONTESTS), choices=CONTESTS)
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    images = F.interpolate(load("scenes", "val", 64).images.float(), size=SIZE, mode="area").byte()
    found = {name: contest(CONTESTS[name], images, asked.turns, asked.steps) for name in asked.only}
    print(table(found), flush=True)
    besides = {"reached": reached(images), "growth": growth(images), "neighbours": neighbours()}
    checkpoint.write_json(asked.out, {"threads": torch.get_num_threads(), "contests": found} | besides)
    print(besides)


if __name__ == "__main__":
    main()
