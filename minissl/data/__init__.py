"""Data sets: synthetic scenes, downloaded photographs, folders of images, and data sets of other libraries."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minissl.data.adapter import from_dataset as from_dataset
    from minissl.data.images import ImageDataset as ImageDataset
    from minissl.data.images import Images as Images
    from minissl.data.registry import list_datasets as list_datasets
    from minissl.data.registry import load_dataset as load_dataset
    from minissl.data.synthetic.scenes import Scenes as Scenes

MODULES = {
    "ImageDataset": "images",
    "Images": "images",
    "Scenes": "synthetic.scenes",
    "from_dataset": "adapter",
    "list_datasets": "registry",
    "load_dataset": "registry",
}
__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
