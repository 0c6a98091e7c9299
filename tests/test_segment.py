"""Patches are told by what they show, and the measures are their plain descriptions."""

import pytest
import torch
from sklearn.metrics import jaccard_score

from minissl.evaluate import at_patches, correspondence, mean_iou, mutual, segment
from minissl.evaluate.segment import IGNORED


def test_a_patch_is_what_its_middle_shows():
    masks = torch.arange(64).view(1, 8, 8)
    assert at_patches(masks, (2, 2))[0].tolist() == [[18, 22], [50, 54]]
    assert torch.equal(at_patches(masks, (8, 8)), masks)


def test_mean_iou_is_scikit_learns():
    torch.manual_seed(0)
    found, truth = torch.randint(0, 5, (3, 6, 8)), torch.randint(0, 4, (3, 6, 8))
    truth[0, :2] = IGNORED
    asked = truth != IGNORED
    right = jaccard_score(truth[asked], found[asked], average=None, labels=[0, 1, 2, 3]).mean()
    assert mean_iou(found, truth) == pytest.approx(right, abs=1e-6)


def test_a_coarse_answer_stands_for_its_pixels():
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    truth[:, :, 4:] = 1
    assert mean_iou(torch.tensor([[[0, 1], [0, 1]]]), truth) == 1.0
    assert mean_iou(torch.tensor([[[0, 0], [0, 0]]]), truth) == pytest.approx(0.25)


@pytest.mark.parametrize("way", ["linear", "knn"])
def test_patches_that_tell_are_told(way):
    torch.manual_seed(0)
    masks = torch.randint(0, 3, (12, 4, 4))
    features = torch.eye(3)[masks] + 0.1 * torch.randn(12, 4, 4, 3)
    known = masks[:8].clone()
    known[0] = IGNORED
    found = segment(features[:8], known, features[8:], way)
    assert torch.equal(found, masks[8:])
    some = segment(features[:8], known, features[8:], way, most=60)
    assert (some == masks[8:]).float().mean() > 0.9


def test_correspondence_counts_parts_that_are_in_both():
    parts_a = torch.tensor([[[1, 2], [0, 3]]])
    parts_b = torch.tensor([[[2, 1], [1, 0]]])
    a, b = torch.eye(4)[parts_a], torch.eye(4)[parts_b]
    assert correspondence(a, b, parts_a, parts_b) == 1.0  # part 3 is not in b, and is not asked for
    b[0, 0, 0] = -torch.eye(4)[2]  # now nothing in b is like part 2
    assert correspondence(a, b, parts_a, parts_b) == 0.5


def test_a_match_is_mutual_and_the_best_comes_first():
    torch.manual_seed(0)
    a, b = torch.randn(12, 4), torch.randn(9, 4)
    cosines = [[float(torch.cosine_similarity(x, y, dim=0)) for y in b] for x in a]
    expected = []
    for i, row in enumerate(cosines):
        j = row.index(max(row))
        if row[j] == max(other[j] for other in cosines):
            expected.append((-row[j], [i, j]))
    assert len(expected) > 2
    assert mutual(a, b).tolist() == [pair for _, pair in sorted(expected)]
