"""What a method promises.

A method is an `nn.Module` that holds its networks, draws its own views from a batch, and says what its loss is. It does
not know the loop, the data set or the device. Adding a method is adding a file to `minissl/methods/` with one class in
it that keeps this promise; the command line, the contract test and the scoreboard find it by the folder.

Shapes: B images of H x W pixels, D the encoder's width, (h, w) its grid of patches.
"""

import importlib
import pkgutil
from inspect import Parameter, signature
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from minissl.errors import InputError


class Tokens(NamedTuple):
    """What every encoder makes of images (B, 3, H, W), float, normalised by `augment.normalize`."""

    cls: Tensor  # (B, D)        one vector for the image
    patches: Tensor  # (B, h, w, D)  one vector per patch, on its grid


def class_token(encoder: nn.Module, images: Tensor) -> Tensor:
    """The class tokens (B, D) of images as above, and no more than they need where the encoder can leave that out.

    A ViT's can: the patches of its last block are nobody's concern then, an eighth of the work of six blocks.
    """
    return (encoder(images, alone=True) if getattr(encoder, "spares", False) else encoder(images)).cls


class Batch(NamedTuple):
    """Images as they are stored, and whatever the data set knows of them; all on the device already."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor | None = None  # (B,) int64
    captions: list[tuple[str, ...]] | None = None  # B images, each with all of its captions
    factors: dict[str, Tensor] | None = None  # what else is known, each (B,) int64


class Method(Protocol):
    """The promise. The constructor takes the encoder first; every option is a keyword argument with a default.

    `presets` holds, for "cpu" and for "gpu", the values that differ from the defaults of the method's constructor, of
    `encoders.make_encoder` (as "encoder.NAME") and of `train.TrainConfig`, each with its reason in a comment.

    A method may also have `needs`, the names of what it needs of a `Batch` besides images; `prepare(data)`, a look at
    the training data (`data.Images`) before the first step; what it learns there belongs into its state; `reads`, what
    its features are, for `evaluate.extract`, if they are not the class token alone; `frozen`, True where the encoder is
    given and stays as it is; `apart`, True where the loss is a mean over images, each by itself, so that a batch can be
    computed in parts; and `guesses(batch_size)`, from how many answers a term of the loss has to choose: as long as it
    stays at the logarithm of that, nothing is learnt.
    """

    presets: ClassVar[dict[str, dict[str, Any]]]
    encoder: nn.Module  # images -> Tokens; what is kept, evaluated and exported

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Scalars on the device: "loss", which is minimised, and named terms to watch. `progress` is in [0, 1]."""
        ...

    def after_step(self, progress: float) -> None:
        """Move what moves by itself, after each step of the optimiser: an EMA teacher, a Gram anchor."""
        ...


def options(kind: type[nn.Module]) -> dict[str, Parameter]:
    """The options of a method by name, those it hands on to the method it extends (as **options) among them."""
    found: dict[str, Parameter] = {}
    for ancestor in kind.__mro__:
        own = list(signature(vars(ancestor)["__init__"]).parameters.values())[2:]  # after self and encoder
        found = {p.name: p for p in own if p.kind is not Parameter.VAR_KEYWORD} | found
        if not any(p.kind is Parameter.VAR_KEYWORD for p in own):
            return found
    return found


def available() -> list[str]:
    """The names of all methods: the files of `minissl/methods/`."""
    folder = importlib.import_module("minissl.methods")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def find(name: str) -> type[nn.Module]:
    """The class a method's file defines (its one class with a `loss`). Raises InputError for an unknown name."""
    if name not in available():
        raise InputError(f"There is no method {name!r}; choose one of {', '.join(available())}.")
    module = importlib.import_module(f"minissl.methods.{name}")
    found = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    (method,) = [c for c in found if hasattr(c, "loss")]
    return method
