"""Tests of segmentation and correspondence by patch features."""

import pytest
import torch
from sklearn.metrics import jaccard_score

from minissl.evaluation import (
    classify_patches_by_text,
    correspondence_accuracy,
    labels_at_patch_centers,
    mean_iou,
    mutual_nearest_neighbors,
    segment_patches,
)
from minissl.evaluation.segmentation import IGNORE_INDEX


def test_labels_at_patch_centers():
    masks = torch.arange(64).view(1, 8, 8)
    assert labels_at_patch_centers(masks, (2, 2))[0].tolist() == [[18, 22], [50, 54]]
    assert torch.equal(labels_at_patch_centers(masks, (8, 8)), masks)


def test_mean_iou_equals_scikit_learn():
    torch.manual_seed(0)
    predictions, truth = torch.randint(0, 5, (3, 6, 8)), torch.randint(0, 4, (3, 6, 8))
    truth[0, :2] = IGNORE_INDEX
    used = truth != IGNORE_INDEX
    expected = jaccard_score(truth[used], predictions[used], average=None, labels=[0, 1, 2, 3]).mean()
    assert mean_iou(predictions, truth) == pytest.approx(expected, abs=1e-6)


def test_mean_iou_resizes_predictions():
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    truth[:, :, 4:] = 1
    assert mean_iou(torch.tensor([[[0, 1], [0, 1]]]), truth) == 1.0
    assert mean_iou(torch.tensor([[[0, 0], [0, 0]]]), truth) == pytest.approx(0.25)


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_segment_patches_predicts_separable_classes(classifier):
    torch.manual_seed(0)
    masks = torch.randint(0, 3, (12, 4, 4))
    features = torch.eye(3)[masks] + 0.1 * torch.randn(12, 4, 4, 3)
    train_masks = masks[:8].clone()
    train_masks[0] = IGNORE_INDEX
    assert torch.equal(segment_patches(features[:8], train_masks, features[8:], classifier), masks[8:])
    predictions = segment_patches(features[:8], train_masks, features[8:], classifier, max_patches=60)
    assert (predictions == masks[8:]).float().mean() > 0.9


def test_correspondence_accuracy_counts_parts_that_are_in_both_images():
    parts_a = torch.tensor([[[1, 2], [0, 3]]])
    parts_b = torch.tensor([[[2, 1], [1, 0]]])
    a, b = torch.eye(4)[parts_a], torch.eye(4)[parts_b]
    assert correspondence_accuracy(a, b, parts_a, parts_b) == 1.0  # part 3 is not in b and does not count
    b[0, 0, 0] = -torch.eye(4)[2]  # now no patch of b is similar to part 2
    assert correspondence_accuracy(a, b, parts_a, parts_b) == 0.5


def test_mutual_nearest_neighbors_equal_loops():
    torch.manual_seed(0)
    a, b = torch.randn(12, 4), torch.randn(9, 4)
    cosines = [[float(torch.cosine_similarity(x, y, dim=0)) for y in b] for x in a]
    expected = []
    for i, row in enumerate(cosines):
        j = row.index(max(row))
        if row[j] == max(other[j] for other in cosines):
            expected.append((-row[j], [i, j]))
    assert len(expected) > 2
    assert mutual_nearest_neighbors(a, b).tolist() == [pair for _, pair in sorted(expected)]


def test_patches_are_classified_by_the_nearest_text():
    texts = torch.eye(3)
    indices = torch.tensor([[[0, 2], [1, 1]]])
    assert torch.equal(classify_patches_by_text(5 * texts[indices] + 0.1, texts), indices)
