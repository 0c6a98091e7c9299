"""Pictures. Everything here takes an encoder, features or numbers and returns a matplotlib figure; it knows no method."""

from minissl.visualize.attention import attention_figure
from minissl.visualize.curves import collapse_figure, curves_figure
from minissl.visualize.pca import pca_figure, pca_rgb

__all__ = ["attention_figure", "collapse_figure", "curves_figure", "pca_figure", "pca_rgb"]
