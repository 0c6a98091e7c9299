"""minissl: a course on self-supervised vision and, in the same code, its reference implementation.

    encoder = minissl.create_encoder("vit_small", patch_size=16, image_size=224)
    method = minissl.create_method("dino", encoder, num_prototypes=4096)
    run = minissl.train(method, dataset, minissl.TrainConfig(minutes=8), output_dir="runs/a")
    metrics = minissl.evaluate(run.encoder, train_set, test_set)

Packages, each of which imports only those above it:

    models/         encoders: vision transformers, convolutional networks, text encoder, heads, EMA teacher
    data/           data sets, the synthetic data set Scenes, and transforms/: augmentations, views, masks
    methods/        one file per paper: its losses as functions and one class that uses them
    evaluation/     metrics of encoders, features and tensors; visualization/: figures of them
    hub/            pretrained weights in, exported weights out
    training/       the training loop, its configuration, checkpoints, run directories
    reports/        reports on folders of images and on finished runs
    notebook/       helpers of the course notebooks
    cli             the command `minissl`, also `python -m minissl`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from minissl.data.adapter import from_dataset
    from minissl.data.registry import list_datasets, load_dataset
    from minissl.errors import InputError
    from minissl.evaluation.benchmark import evaluate_encoder as evaluate
    from minissl.evaluation.features import extract_features
    from minissl.hub.pretrained import load_encoder
    from minissl.methods import list_methods
    from minissl.methods.base import Batch, Method
    from minissl.methods.registry import create_method
    from minissl.models.factory import create_encoder, list_encoders, wrap_encoder
    from minissl.models.outputs import Encoder, Tokens
    from minissl.training.config import TrainConfig
    from minissl.training.run import Run, train

_API = {  # name: where it is defined; modules are imported at the first use
    "Batch": "methods.base",
    "Encoder": "models.outputs",
    "InputError": "errors",
    "Method": "methods.base",
    "Run": "training.run",
    "Tokens": "models.outputs",
    "TrainConfig": "training.config",
    "create_encoder": "models.factory",
    "create_method": "methods.registry",
    "evaluate": "evaluation.benchmark:evaluate_encoder",
    "extract_features": "evaluation.features",
    "from_dataset": "data.adapter",
    "list_datasets": "data.registry",
    "list_encoders": "models.factory",
    "list_methods": "methods",
    "load_dataset": "data.registry",
    "load_encoder": "hub.pretrained",
    "train": "training.run",
    "wrap_encoder": "models.factory",
}

__all__ = [
    "Batch",
    "Encoder",
    "InputError",
    "Method",
    "Run",
    "Tokens",
    "TrainConfig",
    "__version__",
    "create_encoder",
    "create_method",
    "evaluate",
    "extract_features",
    "from_dataset",
    "list_datasets",
    "list_encoders",
    "list_methods",
    "load_dataset",
    "load_encoder",
    "train",
    "wrap_encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'minissl' has no attribute {name!r}")
    module, _, attribute = _API[name].partition(":")
    value = getattr(import_module(f"minissl.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
