"""Define the interface between a method and the code around it: training loop, evaluation, reports and export.

A method holds its networks, makes its own views of a batch and computes its loss. It knows neither the training loop
nor the data set. To add a method, write one file with one subclass of `Method`. Put it into `minissl/methods/`, or
train it from any path with `minissl train ./mine.py`.

Shapes: B images, N features, D the encoder's width, K prototypes, E dimensions of the shared embedding space.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from minissl.data.batch import Batch as Batch
from minissl.data.transforms.functional import random_horizontal_flip, random_resized_crop
from minissl.errors import InputError
from minissl.models.outputs import Encoder


class Method(nn.Module, ABC):
    """Base class of all methods. The constructor takes the encoder first; every option is a keyword with a default.

    Attributes:
        presets: for "cpu" and "gpu" the values that differ from the defaults of the constructor, of
            `models.factory.create_encoder` (as "encoder.NAME") and of `training.config.TrainConfig`.
        required_fields: fields of a `Batch` that the loss needs besides images.
        feature_pooling: tokens that make an image's feature: "cls", the class token (D), or "both", it and the mean
            patch token (2D).
        supports_grad_accumulation: whether the loss is a mean over images, so that a batch can be split into parts.
        requires_pretrained_encoder: whether the encoder has to be given trained weights.
        config: name and options with which `create_method` builds it again; None for a method built in another way.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"cpu": {}, "gpu": {}}
    required_fields: ClassVar[tuple[str, ...]] = ()
    feature_pooling: ClassVar[Literal["cls", "both"]] = "cls"
    supports_grad_accumulation: ClassVar[bool] = False
    requires_pretrained_encoder: ClassVar[bool] = False
    config: dict[str, Any] | None = None

    @property
    def encoder(self) -> Encoder:
        """Return the network that is evaluated and exported; by default the submodule called `encoder`."""
        encoder = self._modules["encoder"]
        assert isinstance(encoder, Encoder)
        return encoder

    def prepare(self, dataset: Any) -> None:
        """Check the training set before the first step, and compute from it what the method needs, as a tokenizer.

        What is computed has to be in the state dict, so that checkpoints hold it.

        Args:
            dataset: the training set, an `ImageDataset`.

        Raises:
            InputError: if the method cannot be trained on this data set.
        """
        del dataset

    @abstractmethod
    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: on the method's device; its images are (B, 3, H, W) uint8.
            progress: fraction of the run that is done before this step, in [0, 1].

        Returns:
            Scalars on the device by name: "loss", which is minimized, and further terms to log.
        """

    def after_step(self, progress: float) -> None:
        """Update, after each step, what the optimizer does not: an EMA teacher, a Gram teacher, a parameter's bounds.

        Args:
            progress: as for `loss`.
        """
        del progress

    def num_candidates(self, batch_size: int) -> dict[str, int]:
        """Return the number of classes N of each softmax, by the name of its term in `loss`.

        A cross-entropy is ln N at chance level; an entropy, such as "teacher_entropy", is ln N if it is uniform.

        Args:
            batch_size: images per step, over all processes.
        """
        del batch_size
        return {}

    def param_lr_scales(self) -> dict[str, float]:
        """Return factors on the learning rate by parameter name; parameters without one have 1."""
        return {}

    def target_probs(self, features: Tensor) -> Tensor | None:
        """Return the teacher's target probabilities (N, K) for features (N, D) of `encoder`; None without a teacher."""
        del features
        return None

    def set_distillation_teacher(self, teacher: "Method") -> None:
        """Take the targets from a trained method, which stays frozen.

        Raises:
            InputError: if the method cannot be distilled.
        """
        del teacher
        raise InputError(f"{type(self).__name__} does not support distillation; leave --teacher out, or train dinov3.")


class ImageTextMethod(Method):
    """Base class of methods that embed images and sentences into one space.

    Attributes:
        logit_scale: scalar, natural logarithm of the factor on cosine similarities, the inverse temperature.
    """

    logit_scale: nn.Parameter

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed normalized images (B, 3, H, W) as (B, E), which are not L2-normalized."""

    @abstractmethod
    def embed_text(self, texts: list[str]) -> Tensor:
        """Embed B sentences as (B, E), which are not L2-normalized."""


class PretextMethod(Method):
    """Base class of the pretext tasks: predict, from one crop of an image, what was hidden of it.

    Their presets are alike, so that the tasks can be compared.

    Args:
        encoder: maps normalized images to Tokens.
        crop_size: side of the training crops in pixels.
        crop_scale: range of a crop's area, as a fraction of the image's.
    """

    feature_pooling: ClassVar[Literal["cls", "both"]] = "both"  # most of these losses train the patch tokens alone
    supports_grad_accumulation: ClassVar[bool] = True  # the loss is a mean over images
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Trains in minutes on two CPU cores.
        "cpu": {
            "encoder.name": "nano",
            "encoder.patch_size": 8,
            "encoder.stem": "conv",  # a linear patch embedding learns next to nothing in this time
            "encoder.init_std": 0.088,  # 1 / sqrt(128): a narrow ViT learns faster from larger weights
            "image_size": 64,
            "crop_size": 32,
            "crop_scale": (0.6, 1.0),  # from 0.2 in MAE: a crop of 32 pixels must show the object
            "batch_size": 128,
            "lr": 2e-3,
            "final_weight_decay": 0.04,  # constant
            "minutes": 8.0,
        },
        # ViT-S/16 on one GPU.
        "gpu": {
            "encoder.name": "small",
            "image_size": 256,
            "batch_size": 256,  # 4,096 in MAE
            "weight_decay": 0.05,  # MAE's, constant
            "final_weight_decay": 0.05,
            "clip_grad": 0.0,  # none in MAE
            "compile": True,
        },
    }

    def __init__(self, encoder: Encoder, *, crop_size: int = 224, crop_scale: tuple[float, float] = (0.2, 1.0)):
        super().__init__()
        self.encoder: Encoder = encoder
        self.crop_size, self.crop_scale = crop_size, crop_scale

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        crops = random_resized_crop(batch.images, self.crop_size, self.crop_scale)
        return self.loss_on_crops(random_horizontal_flip(crops))

    @abstractmethod
    def loss_on_crops(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the terms of the loss on images (B, 3, S, S) float in [0, 1], without augmentation."""

    def check_crop_size(self) -> None:
        """Raise InputError if a crop does not divide into the encoder's patches."""
        if self.crop_size % self.encoder.patch_size:
            raise InputError(
                f"Crops of {self.crop_size} pixels do not divide into patches of {self.encoder.patch_size}; "
                "give --crop_size a multiple."
            )
