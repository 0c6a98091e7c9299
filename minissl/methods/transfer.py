"""Transfer learning: learn one labelled task, keep the features, adapt them to another.

Yosinski et al., How transferable are features in deep neural networks?, 2014 (arXiv:1411.1792). One class covers the
whole chapter: supervised training from nothing; a linear classifier on features that stay as they are; fine-tuning of
all layers, the early ones more slowly (Howard and Ruder, ULMFiT, 2018, arXiv:1801.06146), or of the last blocks only.

Shapes: B images, C classes, D the encoder's width.
"""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from minissl.augment import flip, normalize, random_resized_crop
from minissl.errors import InputError
from minissl.method import Batch, class_token
from minissl.transformer import layer_rates


def freeze(encoder: nn.Module, tune: str, last: int) -> None:
    """Take the gradient from what is not to be tuned; "last" leaves the last blocks and the norm after them."""
    if tune == "all":
        return
    blocks = len(getattr(encoder, "blocks", ()))
    kept = ["norm.", *(f"blocks.{i}." for i in range(max(blocks - last, 0), blocks))] if tune == "last" else []
    if tune == "last" and not blocks:
        raise InputError("This encoder has no blocks to tune the last of; tune all, or the head.")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(kept)) if kept else False)


class Transfer(nn.Module):
    """Classification with labels.

    Args:
        encoder: images -> Tokens, with its width as `dim`; one that has learnt before (--encoder.weights) is adapted.
        size: pixels of the crop that the encoder sees.
        scale: share of the image's area of that crop.
        classes: C, of a head; a data set may have fewer.
        targets: factors to learn, each with a head of its own; none learns the labels.
        tune: all of the encoder, its last blocks, or the head alone.
        last: how many blocks are the last.
        layer_decay: factor on the learning rate from each block to the one before; 1 moves all alike.
        smoothing: of the labels.
    """

    needs: ClassVar[tuple[str, ...]] = ("labels",)
    apart: ClassVar[bool] = True  # the loss is a mean over images
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",  # a linear patch embedding learns next to nothing in this time
            "encoder.init_std": 0.088,  # 1 / sqrt(128): narrow, and so from larger weights
            "image_size": 64,
            "size": 32,
            "scale": (0.6, 1.0),
            "classes": 10,
            "batch_size": 128,
            "lr": 2e-3,
            "final_weight_decay": 0.04,
            "minutes": 1.0,
        },
        # ViT-S/16 from nothing, for hundreds of thousands of images.
        "gpu": {
            "encoder.name": "small",
            "encoder.drop_path": 0.1,
            "image_size": 256,
            "smoothing": 0.1,
            "batch_size": 256,
            "final_weight_decay": 0.04,
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: nn.Module,
        *,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        classes: int = 1000,
        targets: tuple[str, ...] = (),
        tune: Literal["all", "last", "head"] = "all",
        last: int = 1,
        layer_decay: float = 1.0,
        smoothing: float = 0.0,
    ):
        super().__init__()
        freeze(encoder, tune, last)
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.dim, classes) for name in targets or ("labels",)})
        self.size, self.scale, self.classes, self.tune = size, scale, classes, tune
        self.layer_decay, self.smoothing = layer_decay, smoothing

    def prepare(self, data: Any) -> None:
        """Raises InputError if there are more classes than outputs, or a target is not known of the data."""
        for name in self.heads:
            if name != "labels" and name not in data.factors:
                raise InputError(
                    f"These images have no factor {name!r}; choose from {', '.join(data.factors) or 'none'}."
                )
            found = int(data.labels.max() if name == "labels" else data.factors[name].labels.max()) + 1
            if found > self.classes:
                raise InputError(f"There are {found} classes and {self.classes} outputs; give --classes {found}.")

    def rates(self) -> dict[str, float]:
        return layer_rates(self.encoder, self.layer_decay, "encoder.")

    def train(self, mode: bool = True) -> "Transfer":
        super().train(mode)
        if self.tune == "head":
            self.encoder.eval()  # batch norms and dropped paths stay as they are, too
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of each target, from normalised images (B, 3, H, W)."""
        vector = class_token(self.encoder, images)
        return {name: head(vector).float() for name, head in self.heads.items()}

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        logits = self(normalize(flip(random_resized_crop(batch.images, self.size, self.scale))))
        truth = {"labels": batch.labels} | (batch.factors or {})
        terms = {n: F.cross_entropy(x, truth[n], label_smoothing=self.smoothing) for n, x in logits.items()}
        right = sum((x.argmax(1) == truth[n]).float().mean() for n, x in logits.items()) / len(logits)
        named = terms if len(terms) > 1 else {}
        return {"loss": sum(terms.values()), **named, "accuracy": right}

    def guesses(self, batch_size: int) -> dict[str, int]:
        names = self.heads if len(self.heads) > 1 else ["loss"]
        return dict.fromkeys(names, self.classes)

    def after_step(self, progress: float) -> None:
        """Nothing moves by itself."""
