"""Draw encoders' outputs, features and metrics as matplotlib figures. Nothing here knows a method."""

from minissl.visualization.attention import (
    attention_figure,
    attention_frame_figure,
    attention_history_figure,
    attention_layers_figure,
    attention_masks_figure,
)
from minissl.visualization.charts import (
    bars_figure,
    lines_figure,
    matrices_figure,
    points_figure,
    results_table_figure,
    seeds_figure,
    text_ranking_figure,
)
from minissl.visualization.collapse import collapse_figure, collapse_lab_figure
from minissl.visualization.curves import curves_figure
from minissl.visualization.grid import image_grid, overlay_masks, top_images_figure
from minissl.visualization.pca import pca_figure, pca_rgb
from minissl.visualization.similarity import matches_figure, neighbors_figure, patch_similarity, similarity_figure
from minissl.visualization.views import views_figure

__all__ = [
    "attention_figure",
    "attention_frame_figure",
    "attention_history_figure",
    "attention_layers_figure",
    "attention_masks_figure",
    "bars_figure",
    "collapse_figure",
    "collapse_lab_figure",
    "curves_figure",
    "image_grid",
    "lines_figure",
    "matches_figure",
    "matrices_figure",
    "neighbors_figure",
    "overlay_masks",
    "patch_similarity",
    "pca_figure",
    "pca_rgb",
    "points_figure",
    "results_table_figure",
    "seeds_figure",
    "similarity_figure",
    "text_ranking_figure",
    "top_images_figure",
    "views_figure",
]
