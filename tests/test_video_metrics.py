"""Tests of J and F, temporal coherence, segmentation of clips and retrieval of their halves."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from minissl.errors import InputError
from minissl.evaluation import half_clip_retrieval, j_and_f, segment_clip, temporal_coherence
from minissl.evaluation.video_metrics import mask_boundary

T, H, W = 5, 40, 150  # a diagonal of 155.2: two pixels of tolerance


def boundary_by_loops(mask):
    out = np.zeros_like(mask)
    for i in range(H):
        for j in range(W):
            neighbors = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            out[i, j] = any(mask[min(y, H - 1), min(x, W - 1)] != mask[i, j] for y, x in neighbors)
    return out


def contour_accuracy_by_dilation(predicted, truth):
    """Compute F with a dilation of each boundary by a disk."""
    reach = math.ceil(0.008 * math.sqrt(H * H + W * W))
    rows, columns = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    a, b = boundary_by_loops(predicted), boundary_by_loops(truth)
    near_a, near_b = (binary_dilation(x, rows**2 + columns**2 <= reach**2) for x in (a, b))
    if not a.any() or not b.any():
        return 1.0 if a.any() == b.any() else 0.0
    precision, recall = (a & near_b).sum() / a.sum(), (b & near_a).sum() / b.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def blobs():
    """Return predicted and true masks: two objects at the border, a third that appears later, void pixels, errors."""
    rows, columns = np.ogrid[:H, :W]
    truth, predicted = np.zeros((2, T, H, W), dtype=np.int64)
    for t in range(T):
        for masks, shift in ((truth, 0), (predicted, t)):
            masks[t, 10:30, : 20 + 3 * t + shift] = 1
            masks[t][(rows - 20) ** 2 + (columns - 90 + 2 * shift) ** 2 < (14 - t) ** 2] = 7
        truth[t, 5:9, 15:60] = 255
        predicted[t, 5:9, 10:60] = 1
    truth[3:, :5, 130:] = 2
    predicted[2, 12:20, 85:95] = 1
    truth[3][truth[3] == 7] = predicted[3][predicted[3] == 7] = 0  # hidden in both
    predicted[1][predicted[1] == 7] = 0  # missed in the prediction
    return torch.from_numpy(predicted), torch.from_numpy(truth)


def test_j_and_f_equal_loops():
    predicted, truth = blobs()
    metrics = j_and_f(predicted.byte(), truth)
    assert list(metrics["objects"]) == [1, 7]
    for number, scores in metrics["objects"].items():
        j, f = [], []
        for t in range(1, T - 1):
            valid = truth[t] != 255
            a, b = ((predicted[t] == number) & valid).numpy(), ((truth[t] == number) & valid).numpy()
            j.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
            f.append(contour_accuracy_by_dilation(a, b))
        assert scores["J"] == pytest.approx(np.mean(j))
        assert scores["F"] == pytest.approx(np.mean(f))
        assert scores["J&F"] == pytest.approx((np.mean(j) + np.mean(f)) / 2)
        assert 0.2 < scores["F"] < 0.95
    for name in ("J", "F", "J&F"):
        assert metrics[name] == pytest.approx(sum(scores[name] for scores in metrics["objects"].values()) / 2)


def test_the_first_and_the_last_frame_and_void_do_not_count():
    _, truth = blobs()
    predicted = torch.where(truth == 255, 7, truth)
    predicted[0], predicted[-1] = 0, 7
    metrics = j_and_f(predicted, truth)
    assert metrics["J"] == metrics["F"] == metrics["J&F"] == 1.0


def test_mask_boundary_equals_loops():
    noise = np.random.default_rng(0).random((H, W)) < 0.5
    assert np.array_equal(mask_boundary(noise), boundary_by_loops(noise))


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 5), r"\(3, 4, 5\)"),
        (torch.zeros(2, 4, 4), torch.ones(2, 4, 4), "2 frames"),
        (torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255), "no object"),
    ],
)
def test_j_and_f_reject_bad_masks(predicted, truth, message):
    with pytest.raises(InputError, match=message):
        j_and_f(predicted, truth)


def test_coherence_is_1_without_change_and_0_for_noise():
    torch.manual_seed(0)
    still, noise = torch.rand(1, 3, 16, 16).repeat(8, 1, 1, 1), torch.rand(8, 3, 16, 16)
    masks = torch.zeros(8, 64, 64, dtype=torch.long)
    assert temporal_coherence(still, masks) == pytest.approx(1.0)
    assert temporal_coherence(noise, masks) == pytest.approx(0.0, abs=0.05)
    assert 0.3 < temporal_coherence(still + noise, masks) < 0.7  # half of the variance does not change
    masks[1::2, :, :32] = 1
    changes = still.clone()
    changes[1::2, :, :, :8] = noise[1::2, :, :, :8]
    assert temporal_coherence(changes, masks) == pytest.approx(1.0)  # patches of another object do not count
    with pytest.raises(InputError, match="1 frame"):
        temporal_coherence(still[:1], masks[:1])


@pytest.mark.parametrize("classifier", ["knn", "linear"])
def test_segment_clip_learns_from_the_first_frame(classifier):
    torch.manual_seed(0)
    object_ids = torch.tensor([0, 5])[torch.randint(0, 2, (4, 8, 8))]
    features = torch.eye(6)[object_ids] + 0.1 * torch.randn(4, 8, 8, 6)
    masks = object_ids.repeat_interleave(4, 1).repeat_interleave(4, 2)
    first = masks[0].clone()
    first[:4] = 255
    predictions = segment_clip(features, first.byte(), classifier)
    assert predictions.dtype == torch.int64
    assert torch.equal(predictions[0], first)
    assert torch.equal(predictions[1:], masks[1:])
    assert (segment_clip(features, torch.full((32, 32), 3), classifier) == 3).all()  # one object only


def test_segment_clip_rejects_bad_input():
    with pytest.raises(InputError, match="'svm'"):
        segment_clip(torch.ones(2, 4, 4, 3), torch.ones(8, 8), "svm")
    with pytest.raises(InputError, match="void"):
        segment_clip(torch.ones(2, 4, 4, 3), torch.full((8, 8), 255))


def test_half_clip_retrieval():
    torch.manual_seed(0)
    clips = [torch.randn(16) + 0.5 * torch.randn(5 + i % 2, 3, 4, 16) for i in range(10)]
    assert half_clip_retrieval(clips) == 1.0
    swapped = [torch.cat([clip[:3], other[:3]]) for clip, other in zip(clips, clips[1:] + clips[:1])]
    assert half_clip_retrieval(swapped) == 0.0


@pytest.mark.parametrize("clips", [[], [torch.ones(1, 2, 2, 3)]])
def test_half_clip_retrieval_rejects_clips_of_one_frame(clips):
    with pytest.raises(InputError, match="2 or more"):
        half_clip_retrieval(clips)
