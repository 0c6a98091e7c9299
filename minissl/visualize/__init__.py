"""Pictures: from an encoder, features or numbers to a matplotlib figure. Nothing here knows a method."""

from minissl.visualize.attention import (
    attention_figure,
    film_figure,
    frame_figure,
    layers_figure,
    masks_figure,
)
from minissl.visualize.charts import (
    answers_figure,
    bars_figure,
    board_figure,
    lines_figure,
    matrices_figure,
    points_figure,
    seeds_figure,
)
from minissl.visualize.collapse import collapse_figure, lab_figure
from minissl.visualize.curves import curves_figure
from minissl.visualize.grid import found_figure, overlay, picture_grid
from minissl.visualize.pca import pca_figure, pca_rgb
from minissl.visualize.similarity import matches_figure, neighbors_figure, similarity, similarity_figure
from minissl.visualize.views import views_figure

__all__ = [
    "answers_figure",
    "attention_figure",
    "bars_figure",
    "board_figure",
    "collapse_figure",
    "curves_figure",
    "film_figure",
    "found_figure",
    "frame_figure",
    "lab_figure",
    "layers_figure",
    "lines_figure",
    "masks_figure",
    "matches_figure",
    "matrices_figure",
    "neighbors_figure",
    "overlay",
    "pca_figure",
    "pca_rgb",
    "picture_grid",
    "points_figure",
    "seeds_figure",
    "similarity",
    "similarity_figure",
    "views_figure",
]
