"""Does the class token look at the object?

Caron et al., DINO, 2021 (arXiv:2104.14294), section 4.2 and figure 4: the patches that hold 60 % of a head's attention,
against the true mask. Shapes: B images, an attention map (h, w) per head, masks of H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The smallest set of patches that holds `mass` of the attention: (..., h, w) to bool (..., h, w)."""
    flat = attention.flatten(-2)
    values, order = flat.sort(dim=-1)  # ascending, as in the authors' script
    keep = (values / values.sum(-1, keepdim=True)).cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(keep).scatter(-1, order, keep).unflatten(-1, attention.shape[-2:])


def attention_iou(attention: Tensor, masks: Tensor, mass: float = 0.6) -> Tensor:
    """Overlap of each head's thresholded attention with the object.

    Args:
        attention: (B, heads, h, w).
        masks: (B, H, W), not 0 where the object is.
        mass: share of the attention that is kept.

    Returns:
        (B, heads) intersection over union, in pixels of the mask, 0 to 1.
    """
    truth = (masks > 0)[:, None]  # (B, 1, H, W)
    found = F.interpolate(mass_mask(attention, mass).float(), size=masks.shape[-2:], mode="nearest") > 0.5
    both, either = (found & truth).sum((-2, -1)), (found | truth).sum((-2, -1))
    return both / either.clamp_min(1)
