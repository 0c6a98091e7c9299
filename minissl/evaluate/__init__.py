"""How good are the features? Everything here takes an encoder, features or tensors, and knows no method."""

from minissl.evaluate.attention import attention_iou, attention_share, fine_attention, mass_mask
from minissl.evaluate.classify import knn, linear_probe
from minissl.evaluate.destroy import what_survives
from minissl.evaluate.features import extract, rank_me

__all__ = [
    "attention_iou",
    "attention_share",
    "extract",
    "fine_attention",
    "knn",
    "linear_probe",
    "mass_mask",
    "rank_me",
    "what_survives",
]
