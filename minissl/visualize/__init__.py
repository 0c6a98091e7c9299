"""Pictures: from an encoder, features or numbers to a matplotlib figure. Nothing here knows a method."""

from minissl.visualize.attention import attention_figure
from minissl.visualize.curves import collapse_figure, curves_figure
from minissl.visualize.pca import pca_figure, pca_rgb
from minissl.visualize.views import views_figure

__all__ = ["attention_figure", "collapse_figure", "curves_figure", "pca_figure", "pca_rgb", "views_figure"]
