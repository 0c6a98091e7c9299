"""Draw patch tokens in color by their first three principal components.

Oquab et al., DINOv2, 2023 (arXiv:2304.07193), figure 1, without its threshold on the first component.

Shapes: B images of H x W pixels, a grid (h, w) of patches, D the encoder's width.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minissl.data.transforms.functional import normalize
from minissl.models.outputs import Encoder
from minissl.visualization.grid import enlarge, image_grid


def pca_rgb(patches: Tensor) -> Tensor:
    """Map patch tokens (B, h, w, D) of all images together to colors (B, 3, h, w) in [0, 1] by one PCA.

    The components are whitened and squashed to sigmoid(2 x), as in DINOv3's notebook. The sign of a component is that
    of its third moment, because the decomposition's own sign is arbitrary.
    """
    flat = patches.flatten(0, 2).float()
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    components = flat @ directions[:3].mT  # (B h w, 3)
    components = components / components.std(dim=0).clamp_min(1e-9)
    components = components * (components**3).sum(dim=0).sign()
    return torch.sigmoid(2 * components).unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)


@torch.no_grad()
def pca_figure(encoder: Encoder, images: Tensor, image_size: int) -> Figure:
    """Draw images, and their patch tokens' first three principal components as red, green and blue.

    Args:
        encoder: in evaluation mode, on the device of the images.
        images: (B, 3, H, W), uint8 or float in [0, 1].
        image_size: side in pixels of the encoder's input; a multiple of its patch size.
    """
    inputs = enlarge(images, image_size)
    colors = pca_rgb(encoder(normalize(inputs)).patches)
    half = (len(images) + 1) // 2
    columns: list[tuple[str, Tensor]] = [("image", inputs[:half]), ("PCA", colors[:half])]
    if half < len(images):
        columns += [("image", inputs[half : 2 * half]), ("PCA", colors[half : 2 * half])]
    return image_grid(columns, "Principal components 1, 2, 3 of the patch tokens\nas red, green, blue")
