"""Tests of label propagation: it equals the authors' functions, and plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from minissl.errors import InputError
from minissl.evaluation import propagate_frame, propagate_labels, propagate_stream
from tests.golden import wave

# Probability of class 1, measured with the authors' functions: radius, topk, temperature, window, the first values.
GOLDEN = [
    (1, 3, 0.2, "circle", [0.111371, 0.522698, 1, 0.602799, 0.875020, 0.891218, 0, 0.030197, 0.026956]),
    (1, 3, 0.2, "square", [0.111371, 0.522698, 1, 0.494790, 0.722317, 1, 0.519948, 0.418502, 0.440738]),
    (12, 5, 0.2, "circle", [0.167665, 0.401768, 0.359964, 0.649809, 0.698631, 0.358684, 0.492384, 0.535119, 0.485406]),
    (1, 3, 0.1, "square", [0.030445, 0.399246, 1, 0.654529, 0.775233, 1, 0.590081, 0.507472, 0.331916]),
]


@pytest.mark.parametrize(("radius", "topk", "temperature", "window", "expected"), GOLDEN)
def test_propagate_frame_equals_the_authors(radius, topk, temperature, window, expected):
    current, context = wave(3, 3, 4), wave(2, 3, 3, 4, c=0.65, phase=0.1)
    ones = torch.tensor([[[0, 0, 1], [0, 1, 1], [0, 0, 1]], [[0, 1, 1], [0, 1, 1], [0, 0, 0]]])
    labels = torch.eye(2, dtype=torch.float64)[ones]
    current, context = F.normalize(current, dim=-1), F.normalize(context, dim=-1)
    probs = propagate_frame(current, context, labels, radius, topk, temperature, window)
    assert probs[..., 1].flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert probs.sum(dim=-1).flatten().tolist() == pytest.approx([1.0] * 9)


def slow_propagate(current, context, labels, radius, topk, temperature, window):
    """Propagate labels patch by patch, as the docstring of `propagate_frame` says."""
    (frames, h, w, _), out = labels.shape, torch.zeros(*labels.shape[1:], dtype=labels.dtype)
    for i in range(h):
        for j in range(w):
            neighbors = []
            for t in range(frames):
                for k in range(h):
                    for l in range(w):  # noqa: E741
                        a, b = abs(i - k), abs(j - l)
                        if math.hypot(a, b) <= radius if window == "circle" else max(a, b) <= radius:
                            neighbors.append((float((current[i, j] * context[t, k, l]).sum()), labels[t, k, l]))
            least = sorted((cosine for cosine, _ in neighbors), reverse=True)[:topk][-1]
            kept = [(math.exp(cosine / temperature), label) for cosine, label in neighbors if cosine >= least]
            out[i, j] = sum(weight * label for weight, label in kept) / sum(weight for weight, _ in kept)
    return out


@pytest.mark.parametrize("window", ["circle", "square"])
@pytest.mark.parametrize(
    ("h", "w", "radius", "topk"),
    [(3, 10, 2, 5), (9, 11, 3, 5), (8, 8, 2, 4), (1, 12, 12, 5), (5, 4, 9, 50), (10, 9, 1, 1), (2, 2, 0, 5)],
)
def test_tiles_equal_plain_loops(h, w, radius, topk, window):
    current, context = F.normalize(wave(h, w, 5), dim=-1), F.normalize(wave(3, h, w, 5, c=0.37, phase=0.2), dim=-1)
    labels = wave(3, h, w, 3, c=1.1).square()
    labels = labels / labels.sum(dim=-1, keepdim=True)
    arguments = (current, context, labels, radius, topk, 0.15, window)
    assert torch.allclose(propagate_frame(*arguments), slow_propagate(*arguments), atol=1e-9)


def test_neighbors_that_tie_with_the_last_are_used():
    """Features along the axes have cosines of 0 and 1 only, so that nearly every patch has ties."""
    torch.manual_seed(0)
    axes = torch.eye(3, dtype=torch.float64)
    current, context = axes[torch.randint(0, 3, (7, 9))], axes[torch.randint(0, 3, (2, 7, 9))]
    labels = axes[torch.randint(0, 3, (2, 7, 9))]
    for topk in (1, 5, 40):
        arguments = (current, context, labels, 3, topk, 0.2, "circle")
        assert torch.allclose(propagate_frame(*arguments), slow_propagate(*arguments), atol=1e-9)


def slow_propagate_labels(features, first_mask, context, radius, topk, temperature, window):
    """Propagate with a queue and upsampled maps, for masks of a whole number of pixels per patch."""
    x, num_labels = F.normalize(features, dim=-1), int(first_mask.max()) + 1
    p = first_mask.shape[0] // x.shape[1]
    first = F.one_hot(first_mask[p // 2 :: p, p // 2 :: p], num_labels).double()
    queue, out = [], [first_mask]
    for current in x[1:]:
        frames = torch.stack([x[0], *(frame for frame, _ in queue)])
        labels = torch.stack([first, *(label for _, label in queue)])
        probs = slow_propagate(current, frames, labels, radius, topk, temperature, window)
        queue = [*queue, (current, probs)][-context:] if context else []
        maps = probs.repeat_interleave(p, 0).repeat_interleave(p, 1)  # (H, W, M)
        for channel in maps.unbind(-1):
            channel -= channel.min()
            if channel.max() > 0:
                channel /= channel.max()
        out.append(maps.argmax(dim=-1))
    return torch.stack(out)


@pytest.mark.parametrize("context", [0, 1, 3])
def test_propagate_labels_equals_the_recipe(context):
    features = wave(6, 4, 5, 3, c=0.9).cumsum(dim=0)
    mask = torch.zeros(8, 10, dtype=torch.long)
    mask[:5, 3:8], mask[6:, 6:] = 1, 3  # no object has id 2
    expected = slow_propagate_labels(features, mask, context, 2, 3, 0.2, "circle")
    masks = propagate_labels(features, mask, context, 2, 3)
    assert masks.dtype == torch.int64
    assert torch.equal(masks, expected)
    assert len(expected.unique()) == 3
    assert torch.equal(torch.stack(list(propagate_stream(iter(features), mask, context, 2, 3))), masks)


def moving_squares():
    """Return features of two squares that move right over a noisy background, one patch per frame, and their masks."""
    torch.manual_seed(0)
    features, truth = torch.randn(1, 12, 20, 16).repeat(6, 1, 1, 1), torch.zeros(6, 12, 20, dtype=torch.long)
    appearance = 3 * torch.randn(2, 3, 3, 16)
    for t in range(6):
        for number, row in ((1, 1), (7, 7)):
            features[t, row : row + 3, 2 + t : 5 + t] = appearance[number // 7]
            truth[t, row : row + 3, 2 + t : 5 + t] = number
    return features + 0.1 * torch.randn_like(features), truth


@pytest.mark.parametrize("recipe", [{}, {"temperature": 0.1, "window": "square", "upsampling": "bilinear"}])
def test_moving_squares_are_followed(recipe):
    features, truth = moving_squares()
    pixels = truth.repeat_interleave(4, 1).repeat_interleave(4, 2)
    masks = propagate_labels(features, pixels[0].byte(), **recipe)
    assert torch.equal(masks[0], pixels[0])
    assert set(masks.unique().tolist()) == {0, 1, 7}
    assert (masks == pixels).float().mean() > 0.97  # all but the background that a square uncovers
    half, scaled = features.half(), 1000 * features.half()
    assert torch.equal(propagate_labels(scaled, pixels[0], **recipe), propagate_labels(half, pixels[0], **recipe))


def test_frames_that_patches_do_not_divide():
    features, truth = moving_squares()
    masks = propagate_labels(features, truth[0].repeat_interleave(4, 0).repeat_interleave(4, 1)[:-3, :-1])
    assert masks.shape == (6, 45, 79)
    assert (masks[:, 2::4, 2::4][:, :, :-1] == truth[:, :11, :19]).float().mean() > 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": -1}, "--context"),
        ({"radius": -1}, "--radius"),
        ({"topk": 0}, "--topk"),
        ({"temperature": 0.0}, "--temperature"),
        ({"window": "disc"}, "--window is 'disc'"),
        ({"upsampling": "cubic"}, "--upsampling is 'cubic'"),
        ({"first_mask": torch.zeros(4, 4)}, "float32"),
        ({"first_mask": torch.zeros(1, 4, 4).long()}, r"\(1, 4, 4\)"),
        ({"features": torch.zeros(4, 4, 3)}, r"\(4, 4, 3\)"),
        ({"features": torch.zeros(0, 4, 4, 3)}, r"\(0, 4, 4, 3\)"),
    ],
)
def test_bad_input_is_rejected(options, message):
    with pytest.raises(InputError, match=message):
        propagate_labels(**{"features": torch.ones(2, 2, 2, 3), "first_mask": torch.zeros(4, 4).long()} | options)
