"""Images and what is known of them: the embedded world, real data sets, folders."""

from minissl.data.images import Images
from minissl.data.scenes import Scenes
from minissl.data.sources import load

__all__ = ["Images", "Scenes", "load"]
