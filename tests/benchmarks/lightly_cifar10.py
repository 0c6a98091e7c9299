"""Train lightly's recipes with minissl's encoder for a CPU budget, and evaluate them by minissl's k-NN.

The data set is a folder of small photographs, such as CIFAR-10. SimCLR follows lightly's documented benchmark on
CIFAR-10: its transform of PIL images with half the color jitter and no blur, SGD at 6e-2 per 128 images with momentum
and a cosine schedule, temperature 0.5. DINO has the views of that benchmark (two crops of 32 pixels, no local crops, no
blur), its head (2,048 prototypes, batch norm) and its teacher (momentum 0.99), and Adam at 1e-3 as in lightly's
example, because SGD does not suit ViTs. The budget is the CPU time of one thread, which also loads the images, so that
other processes do not change it. minissl with the same budget:

    python -m tests.benchmarks.lightly_cifar10 --folder FOLDER --method dino --minutes 15 --seeds 0 1 2
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
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from minissl.data import load_dataset
from minissl.evaluation.benchmark import quick_evaluation
from minissl.models.factory import create_encoder
from minissl.models.outputs import Encoder
from minissl.training import checkpoint

Step = Callable[[list[Tensor], int, float], Tensor]  # (views, epoch, progress) -> loss

TRANSFORMS = {
    "simclr": lambda: SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0),
    "dino": lambda: DINOTransform(32, n_local_views=0, gaussian_blur=(0.0, 0.0, 0.0)),
}


def create_simclr(new_encoder: Callable[[], Encoder]) -> tuple[dict[str, Encoder], Step]:
    """Return the encoders to evaluate by name, and the function that takes a training step."""
    encoder, criterion = new_encoder(), NTXentLoss(temperature=0.5)
    head = SimCLRProjectionHead(encoder.embed_dim, encoder.embed_dim, 128)
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


def create_dino(new_encoder: Callable[[], Encoder]) -> tuple[dict[str, Encoder], Step]:
    """As `create_simclr`. lightly's benchmark evaluates the student, the paper the teacher."""
    student, teacher = new_encoder(), new_encoder()
    teacher.load_state_dict(student.state_dict())
    dim = student.embed_dim
    student_head, teacher_head = (DINOProjectionHead(dim, 2048, 256, 2048, True, frozen) for frozen in (1, -1))
    teacher_head.load_state_dict(student_head.state_dict())
    criterion = DINOLoss(2048, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.Adam([*student.parameters(), *student_head.parameters()], lr=1e-3)

    def step(views: list[Tensor], epoch: int, progress: float) -> Tensor:
        update_momentum(student, teacher, 0.99)
        update_momentum(student_head, teacher_head, 0.99)
        with torch.no_grad():
            targets = [teacher_head(teacher(view).cls) for view in views]
        loss = criterion(targets, [student_head(student(view).cls) for view in views], epoch=epoch)
        optimizer.zero_grad()
        loss.backward()
        student_head.cancel_last_layer_gradients(epoch)
        optimizer.step()
        return loss

    return {"student": student, "teacher": teacher}, step


METHODS = {"simclr": create_simclr, "dino": create_dino}


def iterate_until(loader: DataLoader, seconds: float) -> Iterator[tuple[list[Tensor], int, float]]:
    """Yield (views, epoch, progress) until the process has used its CPU time."""
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
    parser.add_argument("--out", type=Path, default=Path("runs/lightly_cifar10.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = ImageFolder(options.folder / "train", TRANSFORMS[options.method]())
    train_set, test_set = (load_dataset(f"folder:{options.folder}", split, 32) for split in ("train", "test"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in options.seeds:
        torch.manual_seed(seed)
        loader = DataLoader(dataset, 128, shuffle=True, drop_last=True)
        encoders, step = METHODS[options.method](
            lambda: create_encoder(options.encoder, 8, 32, stem="conv", init_std=0.088)
        )
        losses = [float(step(*batch).detach()) for batch in iterate_until(loader, 60 * options.minutes)]
        subsets = train_set.subsample(20_000), test_set.subsample(5_000), 32
        knn = {name: quick_evaluation(encoder.eval(), *subsets)["knn"] for name, encoder in encoders.items()}
        curve = losses[:: max(1, len(losses) // 20)]
        results[str(seed)] = {"knn": knn, "images": 128 * len(losses), "loss": curve}
        checkpoint.write_json(options.out, {"method": options.method, "minutes": options.minutes, "seeds": results})
        print(f"lightly's {options.method}, seed {seed}: {128 * len(losses)} images, k-NN {knn}", flush=True)


if __name__ == "__main__":
    main()
