"""How good are the features? Everything here takes an encoder, features or tensors, and knows no method."""

from minissl.evaluate.attention import attention_iou, attention_share, fine_attention, mass_mask, pointing
from minissl.evaluate.classify import knn, linear_probe
from minissl.evaluate.destroy import what_survives
from minissl.evaluate.features import extract, fine_patches, frame_patches, patch_of, rank_me
from minissl.evaluate.few_labels import few, few_labels, fine_tune
from minissl.evaluate.segment import at_patches, correspondence, mean_iou, mutual, name_patches, segment
from minissl.evaluate.spread import alignment, spread, uniformity
from minissl.evaluate.track import follow, propagate, track
from minissl.evaluate.video import coherence, halves, j_and_f, segment_clip
from minissl.evaluate.zero_shot import (
    class_vectors,
    in_templates,
    retrieval,
    sentence_vectors,
    zero_shot,
    zero_shot_sum,
)

__all__ = [
    "alignment",
    "at_patches",
    "attention_iou",
    "attention_share",
    "class_vectors",
    "coherence",
    "correspondence",
    "extract",
    "few",
    "few_labels",
    "fine_attention",
    "fine_patches",
    "fine_tune",
    "follow",
    "frame_patches",
    "halves",
    "in_templates",
    "j_and_f",
    "knn",
    "linear_probe",
    "mass_mask",
    "mean_iou",
    "mutual",
    "name_patches",
    "patch_of",
    "pointing",
    "propagate",
    "rank_me",
    "retrieval",
    "segment",
    "segment_clip",
    "sentence_vectors",
    "spread",
    "track",
    "uniformity",
    "what_survives",
    "zero_shot",
    "zero_shot_sum",
]
