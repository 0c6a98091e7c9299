"""DAVIS's measures are their plain descriptions, and what is said of patches over time is true where it is known."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from minissl.encoders import Pixels
from minissl.errors import InputError
from minissl.evaluate import coherence, halves, j_and_f, segment_clip
from minissl.evaluate.video import outline

T, H, W = 5, 40, 150  # a diagonal of 155.2: two pixels of tolerance


def slow_outline(mask):
    out = np.zeros_like(mask)
    for i in range(H):
        for j in range(W):
            next_to = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            out[i, j] = any(mask[min(k, H - 1), min(l, W - 1)] != mask[i, j] for k, l in next_to)  # noqa: E741
    return out


def slow_contour(found, true):
    """With a dilation by a disk."""
    reach = math.ceil(0.008 * math.sqrt(H * H + W * W))
    rows, columns = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    a, b = slow_outline(found), slow_outline(true)
    near_a, near_b = (binary_dilation(x, rows**2 + columns**2 <= reach**2) for x in (a, b))
    if not a.any() or not b.any():
        return 1.0 if a.any() == b.any() else 0.0
    precision, recall = (a & near_b).sum() / a.sum(), (b & near_a).sum() / b.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def blobs():
    """Two objects that touch an edge, a third that comes later, void, and an answer that is nearly right."""
    rows, columns = np.ogrid[:H, :W]
    truth, found = np.zeros((2, T, H, W), dtype=np.int64)
    for t in range(T):
        for masks, shift in ((truth, 0), (found, t)):
            masks[t, 10:30, : 20 + 3 * t + shift] = 1
            masks[t][(rows - 20) ** 2 + (columns - 90 + 2 * shift) ** 2 < (14 - t) ** 2] = 7
        truth[t, 5:9, 15:60] = 255
        found[t, 5:9, 10:60] = 1
    truth[3:, :5, 130:] = 2
    found[2, 12:20, 85:95] = 1
    truth[3][truth[3] == 7] = found[3][found[3] == 7] = 0  # both say that it is hidden
    found[1][found[1] == 7] = 0  # and here it is not found
    return torch.from_numpy(found), torch.from_numpy(truth)


def test_j_and_f_are_the_plain_descriptions():
    found, truth = blobs()
    measured = j_and_f(found.byte(), truth)
    assert list(measured["objects"]) == [1, 7]
    for number, of in measured["objects"].items():
        j, f = [], []
        for t in range(1, T - 1):
            asked = truth[t] != 255
            a, b = ((found[t] == number) & asked).numpy(), ((truth[t] == number) & asked).numpy()
            j.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
            f.append(slow_contour(a, b))
        assert of["J"] == pytest.approx(np.mean(j))
        assert of["F"] == pytest.approx(np.mean(f))
        assert of["J&F"] == pytest.approx((np.mean(j) + np.mean(f)) / 2)
        assert 0.2 < of["F"] < 0.95
    for name in ("J", "F", "J&F"):
        assert measured[name] == pytest.approx(sum(of[name] for of in measured["objects"].values()) / 2)


def test_the_first_and_the_last_frame_and_void_are_not_counted():
    found, truth = blobs()
    found = torch.where(truth == 255, 7, truth)
    found[0], found[-1] = 0, 7
    measured = j_and_f(found, truth)
    assert measured["J"] == measured["F"] == measured["J&F"] == 1.0


def test_the_outline_is_where_the_next_pixel_differs():
    noise = np.random.default_rng(0).random((H, W)) < 0.5
    assert np.array_equal(outline(noise), slow_outline(noise))


@pytest.mark.parametrize(
    ("predicted", "truth", "says"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 5), r"\(3, 4, 5\)"),
        (torch.zeros(2, 4, 4), torch.ones(2, 4, 4), "2 frames"),
        (torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255), "no object"),
    ],
)
def test_masks_that_cannot_be_compared_are_said(predicted, truth, says):
    with pytest.raises(InputError, match=says):
        j_and_f(predicted, truth)


def test_coherence_is_one_where_nothing_changes_and_zero_for_noise():
    torch.manual_seed(0)
    still, noise = torch.rand(1, 3, 16, 16).repeat(8, 1, 1, 1), torch.rand(8, 3, 16, 16)
    masks = torch.zeros(8, 64, 64, dtype=torch.long)
    assert coherence(still, masks) == pytest.approx(1.0)
    assert coherence(noise, masks) == pytest.approx(0.0, abs=0.05)
    assert 0.3 < coherence(still + noise, masks) < 0.7  # half of the variance stays
    masks[1::2, :, :32] = 1
    changes = still.clone()
    changes[1::2, :, :, :8] = noise[1::2, :, :, :8]
    assert coherence(changes, masks) == pytest.approx(1.0)  # what shows something else may change
    with pytest.raises(InputError, match="two frames"):
        coherence(still[:1], masks[:1])


@pytest.mark.parametrize("way", ["knn", "linear"])
def test_one_labelled_frame_segments_a_clip(way):
    torch.manual_seed(0)
    numbers = torch.tensor([0, 5])[torch.randint(0, 2, (4, 8, 8))]
    features = torch.eye(6)[numbers] + 0.1 * torch.randn(4, 8, 8, 6)
    masks = numbers.repeat_interleave(4, 1).repeat_interleave(4, 2)
    first = masks[0].clone()
    first[:4] = 255
    found = segment_clip(features, first.byte(), way)
    assert found.dtype == torch.int64
    assert torch.equal(found[0], first)
    assert torch.equal(found[1:], masks[1:])
    alone = segment_clip(features, torch.full((32, 32), 3), way)
    assert (alone == 3).all()


def test_a_clip_that_cannot_be_segmented_is_said():
    with pytest.raises(InputError, match="'svm'; choose knn or linear"):
        segment_clip(torch.ones(2, 4, 4, 3), torch.ones(8, 8), "svm")
    with pytest.raises(InputError, match="void"):
        segment_clip(torch.ones(2, 4, 4, 3), torch.full((8, 8), 255))


def test_halves_find_each_other():
    torch.manual_seed(0)
    clips = [torch.randn(16) + 0.5 * torch.randn(5 + i % 2, 3, 4, 16) for i in range(10)]
    assert halves(clips) == 1.0
    swapped = [torch.cat([clip[:3], other[:3]]) for clip, other in zip(clips, clips[1:] + clips[:1])]
    assert halves(swapped) == 0.0
    for bad in ([], [torch.ones(1, 2, 2, 3)]):
        with pytest.raises(InputError, match="two frames or more"):
            halves(bad)


def test_patches_of_pixels_are_the_pixels():
    images = torch.randn(2, 3, 8, 12)
    cls, patches = Pixels(4)(images)
    assert patches.shape == (2, 2, 3, 48)
    assert torch.equal(patches[1, 1, 2].view(4, 4, 3), images[1, :, 4:, 8:].permute(1, 2, 0))
    assert torch.allclose(cls, patches.mean(dim=(1, 2)))
