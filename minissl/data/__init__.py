"""Images and what is known of them: the embedded world, real data sets, folders."""

from minissl.data.scenes import Scenes
from minissl.data.sources import Images, load

__all__ = ["Images", "Scenes", "load"]
