"""Evaluate frozen encoders and features. No function depends on a method."""

from minissl.evaluation.attention import (
    attention_fraction,
    attention_iou,
    attention_mass_mask,
    dense_attention,
    pointing_game,
)
from minissl.evaluation.augmentation_probe import probe_augmentations
from minissl.evaluation.benchmark import (
    accuracy,
    evaluate_attention,
    evaluate_encoder,
    evaluate_patches,
    evaluate_zero_shot,
    image_embeddings,
    image_text_similarity,
    pixel_labels,
    quick_evaluation,
)
from minissl.evaluation.classification import knn, linear_probe
from minissl.evaluation.collapse import collapse_type, measure_collapse
from minissl.evaluation.features import dense_patches, extract_features, frame_patch_features, rank_me
from minissl.evaluation.few_shot import few_shot_accuracy, sample_per_class
from minissl.evaluation.label_propagation import propagate_frame, propagate_labels, propagate_stream
from minissl.evaluation.representation import alignment, feature_std, uniformity
from minissl.evaluation.segmentation import (
    classify_patches_by_text,
    correspondence_accuracy,
    labels_at_patch_centers,
    mean_iou,
    mutual_nearest_neighbors,
    segment_patches,
)
from minissl.evaluation.video_metrics import half_clip_retrieval, j_and_f, segment_clip, temporal_coherence
from minissl.evaluation.zero_shot import (
    class_embeddings,
    fill_templates,
    prompt_embeddings,
    retrieval_recall,
    zero_shot_classify,
    zero_shot_classify_sum,
)

__all__ = [
    "accuracy",
    "alignment",
    "attention_fraction",
    "attention_iou",
    "attention_mass_mask",
    "class_embeddings",
    "classify_patches_by_text",
    "collapse_type",
    "correspondence_accuracy",
    "dense_attention",
    "dense_patches",
    "evaluate_attention",
    "evaluate_encoder",
    "evaluate_patches",
    "evaluate_zero_shot",
    "extract_features",
    "feature_std",
    "few_shot_accuracy",
    "fill_templates",
    "frame_patch_features",
    "half_clip_retrieval",
    "image_embeddings",
    "image_text_similarity",
    "j_and_f",
    "knn",
    "labels_at_patch_centers",
    "linear_probe",
    "mean_iou",
    "measure_collapse",
    "mutual_nearest_neighbors",
    "pixel_labels",
    "pointing_game",
    "probe_augmentations",
    "prompt_embeddings",
    "propagate_frame",
    "propagate_labels",
    "propagate_stream",
    "quick_evaluation",
    "rank_me",
    "retrieval_recall",
    "sample_per_class",
    "segment_clip",
    "segment_patches",
    "temporal_coherence",
    "uniformity",
    "zero_shot_classify",
    "zero_shot_classify_sum",
]
