"""k-NN after the same CPU minutes on a folder of small photographs: lightly's recipes with our encoder, measured alike.

SimCLR as lightly's documented benchmark on CIFAR-10 has it: its transform on PIL images, half the colour jitter and no
blur, SGD at 6e-2 per 128 images with momentum and a cosine, temperature 0.5. DINO with that benchmark's views (two
crops of 32 pixels, none smaller, no blur), head (2,048 prototypes, batch norm) and teacher (momentum 0.99), and with
Adam at 1e-3 as in lightly's example, since SGD does not suit ViTs. The minutes are one thread's, pictures loaded in it,
so that they do not depend on what else runs. The same minutes of ours:

    python -m tests.benchmarks.against_lightly --folder FOLDER --method dino --minutes 15 --seeds 0 1 2
    python -m tests.benchmarks.scoreboard --data folder:FOLDER --rows DINO --minutes 15 --seeds 0 1 2
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import DINOTransform, SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from minissl import checkpoint
from minissl.data import load
from minissl.encoders import make_encoder
from minissl.scores import watch

TRANSFORMS = {
    "simclr": lambda: SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0),
    "dino": lambda: DINOTransform(32, n_local_views=0, gaussian_blur=(0.0, 0.0, 0.0)),
}


def simclr(make: Callable[[], nn.Module]) -> tuple[dict[str, nn.Module], Callable]:
    """What can be measured, and what a step of its training is: (views, epoch, progress) -> loss."""
    encoder, criterion = make(), NTXentLoss(temperature=0.5)
    head = SimCLRProjectionHead(encoder.dim, encoder.dim, 128)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=6e-2, momentum=0.9, weight_decay=5e-4)

    def step(views: list[Tensor], epoch: int, progress: float) -> Tensor:
        optimizer.param_groups[0]["lr"] = 6e-2 * 0.5 * (1 + math.cos(math.pi * progress))
        loss = criterion(*(head(encoder(view).cls) for view in views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return {"encoder": encoder}, step


def dino(make: Callable[[], nn.Module]) -> tuple[dict[str, nn.Module], Callable]:
    """As `simclr`; lightly's benchmark measures the student, the paper the teacher."""
    encoder, teacher = make(), make()
    teacher.load_state_dict(encoder.state_dict())
    head, teachers = (DINOProjectionHead(encoder.dim, 2048, 256, 2048, True, frozen) for frozen in (1, -1))
    teachers.load_state_dict(head.state_dict())
    criterion = DINOLoss(2048, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)

    def step(views: list[Tensor], epoch: int, progress: float) -> Tensor:
        update_momentum(encoder, teacher, 0.99)
        update_momentum(head, teachers, 0.99)
        with torch.no_grad():
            targets = [teachers(teacher(view).cls) for view in views]
        loss = criterion(targets, [head(encoder(view).cls) for view in views], epoch=epoch)
        optimizer.zero_grad()
        loss.backward()
        head.cancel_last_layer_gradients(epoch)
        optimizer.step()
        return loss

    return {"student": encoder, "teacher": teacher}, step


def until(loader: DataLoader, seconds: float) -> Iterator[tuple[list[Tensor], int, float]]:
    """(views, epoch, progress) until the process has used its time."""
    start, epoch = time.process_time(), 0
    while True:
        for views, _ in loader:
            progress = (time.process_time() - start) / seconds
            if progress >= 1:
                return
            yield views, epoch, progress
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with train and test folders of class folders")
    parser.add_argument("--method", default="simclr", choices=TRANSFORMS)
    parser.add_argument("--encoder", default="nano")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/against_lightly.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageFolder(asked.folder / "train", TRANSFORMS[asked.method]())
    train, test = (load(f"folder:{asked.folder}", split, 32) for split in ("train", "test"))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for seed in asked.seeds:
        torch.manual_seed(seed)
        loader = DataLoader(data, 128, shuffle=True, drop_last=True)
        encoders, step = {"simclr": simclr, "dino": dino}[asked.method](
            lambda: make_encoder(asked.encoder, 8, 32, stem="conv", init_std=0.088)
        )
        losses = [float(step(*given).detach()) for given in until(loader, 60 * asked.minutes)]
        parts = train.some(20_000), test.some(5_000), 32
        scores = {name: watch(encoder.eval(), *parts)["knn"] for name, encoder in encoders.items()}
        found[str(seed)] = {"knn": scores, "images": 128 * len(losses), "loss": losses[:: max(1, len(losses) // 20)]}
        checkpoint.write_json(asked.out, {"method": asked.method, "minutes": asked.minutes, "seeds": found})
        print(f"lightly's {asked.method}, seed {seed}: {128 * len(losses)} images, {scores}", flush=True)


if __name__ == "__main__":
    main()
