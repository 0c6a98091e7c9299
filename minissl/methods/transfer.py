"""Transfer learning: train on one labeled task, and reuse the representation for another.

Yosinski et al., How transferable are features in deep neural networks?, 2014 (arXiv:1411.1792). The class covers
supervised training from scratch, a linear classifier on a frozen encoder, and fine-tuning: of all layers, with
layer-wise decayed learning rates (Howard and Ruder, ULMFiT, 2018, arXiv:1801.06146), or of the last blocks only.

Shapes: B images, C classes, D the encoder's width.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize, random_horizontal_flip, random_resized_crop
from minissl.errors import InputError
from minissl.methods.base import Batch, Method
from minissl.models.layers import layer_lr_scales
from minissl.models.outputs import Encoder


def freeze_encoder(encoder: Encoder, tune: str, num_tuned_blocks: int) -> None:
    """Freeze the parameters of an encoder that are not tuned, in place.

    Args:
        encoder: any encoder.
        tune: "all" freezes nothing, "head" freezes all parameters, "last" all but the last blocks and the final norm.
        num_tuned_blocks: number of blocks that "last" tunes.

    Raises:
        InputError: for "last", if the encoder has no blocks.
    """
    if tune == "all":
        return
    names = [name for name, _ in encoder.named_parameters()]
    depth = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
    if tune == "last" and not depth:
        raise InputError("This encoder has no blocks, so --tune last is impossible; use --tune all or --tune head.")
    last = [f"blocks.{i}." for i in range(max(depth - num_tuned_blocks, 0), depth)]
    tuned = ("norm.", *last) if tune == "last" else ()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith(tuned))


class Transfer(Method):
    """Train a supervised classifier, from scratch or from a pretrained encoder (--encoder.weights).

    Args:
        encoder: maps normalized images to Tokens; its class token is classified.
        crop_size: side of the training crops in pixels.
        crop_scale: range of a crop's area, as a fraction of the image's.
        num_classes: C, outputs of each head; a data set may have fewer classes.
        targets: names of the factors to classify, each with its own head; () classifies the labels.
        tune: parts that are trained with the head: "all" of the encoder, its "last" blocks, or only the "head".
        num_tuned_blocks: number of blocks that `tune=last` trains.
        layer_decay: factor on the learning rate from each block to the one below; 1 trains all at the same rate.
        label_smoothing: probability that is spread evenly over all classes, in [0, 1].

    Raises:
        InputError: for tune "last" and an encoder without blocks.
    """

    required_fields: ClassVar[tuple[str, ...]] = ("labels",)
    supports_grad_accumulation: ClassVar[bool] = True  # the loss is a mean over images
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Trains in one minute on two CPU cores.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",  # a linear patch embedding learns next to nothing in this time
            "encoder.init_std": 0.088,  # 1 / sqrt(128): a narrow ViT learns faster from larger weights
            "image_size": 64,
            "crop_size": 32,
            "crop_scale": (0.6, 1.0),  # from 0.08 for ImageNet: a crop of 32 pixels must show the object
            "num_classes": 10,  # those of Scenes and CIFAR-10
            "batch_size": 128,
            "lr": 2e-3,
            "final_weight_decay": 0.04,  # constant; it rises in DINO's schedule
            "minutes": 1.0,
        },
        # ViT-S/16 from scratch, for hundreds of thousands of images.
        "gpu": {
            "encoder.name": "small",
            "encoder.drop_path": 0.1,  # regularization, as in DeiT
            "image_size": 256,
            "label_smoothing": 0.1,  # regularization, as in DeiT
            "batch_size": 256,
            "final_weight_decay": 0.04,  # constant
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: Encoder,
        *,
        crop_size: int = 224,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        num_classes: int = 1000,
        targets: tuple[str, ...] = (),
        tune: Literal["all", "last", "head"] = "all",
        num_tuned_blocks: int = 1,
        layer_decay: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        freeze_encoder(encoder, tune, num_tuned_blocks)
        self.encoder: Encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.embed_dim, num_classes) for name in targets or ("labels",)})
        self.crop_size, self.crop_scale, self.num_classes = crop_size, crop_scale, num_classes
        self.tune, self.layer_decay, self.label_smoothing = tune, layer_decay, label_smoothing

    def prepare(self, dataset: Any) -> None:
        """Check that the data set has every target, and not too many classes.

        Raises:
            InputError: if it lacks one, or has more classes than the heads have outputs.
        """
        for name in self.heads:
            if name != "labels" and name not in dataset.factors:
                known = ", ".join(dataset.factors) or "none"
                raise InputError(f"This data set has no factor {name!r}; choose --targets from {known}.")
            labels = dataset.labels if name == "labels" else dataset.factors[name].labels
            count = int(labels.max()) + 1
            if count > self.num_classes:
                raise InputError(f"{count} classes do not fit {self.num_classes} outputs; give --num_classes {count}.")

    def train(self, mode: bool = True) -> "Transfer":
        """Set the training mode; a frozen encoder stays in evaluation mode, so that its batch norms do not change."""
        super().train(mode)
        if self.tune == "head":
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the logits (B, C) of each target for normalized images (B, 3, H, W)."""
        cls = self.encoder.cls_tokens(images)  # (B, D)
        return {name: head(cls).float() for name, head in self.heads.items()}

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute the sum of the targets' cross-entropies, each of them if there are several, and mean "accuracy"."""
        crops = random_horizontal_flip(random_resized_crop(batch.images, self.crop_size, self.crop_scale))
        logits = self(normalize(crops))  # (B, C) each
        labels: dict[str, Any] = {"labels": batch.labels} | (batch.factors or {})
        terms = {k: F.cross_entropy(x, labels[k], label_smoothing=self.label_smoothing) for k, x in logits.items()}
        accuracies = [(x.argmax(dim=1) == labels[k]).float().mean() for k, x in logits.items()]
        loss = sum(terms.values(), start=torch.zeros((), device=crops.device))
        named_terms = terms if len(terms) > 1 else {}
        return {"loss": loss, **named_terms, "accuracy": torch.stack(accuracies).mean()}

    def num_candidates(self, batch_size: int) -> dict[str, int]:
        names = list(self.heads) if len(self.heads) > 1 else ["loss"]
        return dict.fromkeys(names, self.num_classes)

    def param_lr_scales(self) -> dict[str, float]:
        return layer_lr_scales(self.encoder, self.layer_decay, "encoder.")
