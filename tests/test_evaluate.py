"""Evaluations equal their plain descriptions."""

import math

import pytest
import torch
import torch.nn.functional as F

from minissl import evaluate
from minissl.augment import normalize
from minissl.errors import InputError
from minissl.method import Tokens
from tests.golden import tiny_vit


def votes_by_loops(train, labels, test, k, temperature, classes):
    found = []
    for x in test:
        similarity = sorted(((float(F.cosine_similarity(x, t, dim=0)), int(y)) for t, y in zip(train, labels)))[-k:]
        score = [sum(math.exp(s / temperature) for s, y in similarity if y == c) for c in range(classes)]
        found.append(score.index(max(score)))
    return torch.tensor(found)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (100, 0.5)])
def test_knn_equals_the_loops(k, temperature):
    torch.manual_seed(k)
    train, labels, test = torch.randn(40, 6), torch.randint(0, 4, (40,)), torch.randn(15, 6)
    found = evaluate.knn(train, labels, test, k=k, temperature=temperature, classes=4)
    assert torch.equal(found, votes_by_loops(train, labels, test, k, temperature, 4))


def test_knn_takes_more_tests_than_fit_in_a_chunk():
    torch.manual_seed(0)
    train = torch.eye(5).repeat(3, 1)
    labels = torch.arange(5).repeat(3)
    test = torch.eye(5).repeat(500, 1)
    assert torch.equal(evaluate.knn(train, labels, test, k=3), torch.arange(5).repeat(500))


def test_linear_probe_separates_what_is_separable():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (300,))
    features = F.one_hot(labels, 3) * 4.0 + torch.randn(300, 3)
    found = evaluate.linear_probe(features[:200], labels[:200], features[200:])
    assert (found == labels[200:]).float().mean() > 0.9


def test_rank_me_counts_directions():
    torch.manual_seed(0)
    assert evaluate.rank_me(torch.randn(64, 1) @ torch.randn(1, 16)) == pytest.approx(1, abs=0.01)
    orthogonal = torch.linalg.qr(torch.randn(64, 16)).Q
    assert evaluate.rank_me(orthogonal) == pytest.approx(16, rel=1e-3)


def test_the_mass_mask_is_the_authors():
    attention = torch.tensor([0.05, 0.30, 0.10, 0.25, 0.20, 0.10]).view(2, 3)
    assert evaluate.mass_mask(attention, 0.6).flatten().nonzero()[:, 0].tolist() == [1, 3, 4]


def test_the_mass_mask_holds_the_mass():
    torch.manual_seed(0)
    attention = torch.rand(5, 3, 6, 4) ** 3
    kept = (attention * evaluate.mass_mask(attention, 0.6)).sum((-2, -1)) / attention.sum((-2, -1))
    assert (kept >= 0.6 - 1e-6).all()


def test_attention_on_the_object_overlaps_it():
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[:, :4, :4] = 3
    on, off = torch.full((4, 4), 1e-4), torch.full((4, 4), 1e-4)
    on[:2, :2], off[2:, 2:] = 1, 1
    overlap = evaluate.attention_iou(torch.stack([on, off])[None], masks, mass=0.99)
    torch.testing.assert_close(overlap, torch.tensor([[1.0, 0.0]]))


def test_extract_is_the_encoder_in_evaluation_mode_and_gives_the_mode_back():
    torch.manual_seed(0)
    encoder = tiny_vit(drop_path=0.5).train()
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    found = evaluate.extract(encoder, images, batch_size=3)
    assert encoder.training
    torch.testing.assert_close(found, encoder.eval()(normalize(images)).cls.detach())


def test_extract_reads_the_patches_too():
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    encoder = tiny_vit().eval()
    tokens = encoder(normalize(images.float() / 255))
    both = evaluate.extract(encoder, images, pool="both")
    assert torch.equal(both[:, :32], tokens.cls)
    mean = sum(tokens.patches[:, y, x] for y in range(4) for x in range(4)) / 16
    torch.testing.assert_close(both[:, 32:], mean)


def test_extract_brings_images_to_a_size():
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    assert evaluate.extract(tiny_vit(), images, size=16).shape == (2, 32)


def test_the_share_of_attention_on_the_object():
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    masks[:, :, :4] = 3
    on, even = torch.zeros(4, 4), torch.ones(4, 4)
    on[:, 0] = 2.0
    share = evaluate.attention_share(torch.stack([on, even])[None], masks)
    torch.testing.assert_close(share, torch.tensor([[1.0, 0.5]]))


def points_by_loops(attention, masks):
    """Which pixel the patch with most attention has in its middle, and what the mask says there."""
    (h, w), (height, width) = attention.shape[-2:], masks.shape[-2:]
    found = []
    for maps, mask in zip(attention, masks):
        for one in maps:
            best, row, column = -1.0, 0, 0
            for i in range(h):
                for j in range(w):
                    if float(one[i, j]) > best:
                        best, row, column = float(one[i, j]), i, j
            y, x = math.floor((row + 0.5) * height / h), math.floor((column + 0.5) * width / w)
            found.append(bool(mask[y, x] > 0))
    return torch.tensor(found).view(attention.shape[:2])


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (16, 16)), ((3, 5), (24, 20)), ((6, 7), (6, 7)), ((2, 3), (7, 9))])
def test_pointing_equals_the_loops(grid, size):
    torch.manual_seed(0)
    attention, masks = torch.rand(20, 3, *grid), torch.randint(0, 3, (20, *size), dtype=torch.uint8)
    attention[::2] = (attention[::2] * 4).round()  # many ties
    found = evaluate.pointing(attention, masks)
    assert found.dtype == torch.bool
    assert torch.equal(found, points_by_loops(attention, masks))
    assert 0 < found.float().mean() < 1


def test_of_equal_maxima_the_first_points():
    masks = torch.zeros(1, 4, 6, dtype=torch.uint8)
    masks[:, :2, :2] = 7  # the first of 2 x 3 patches
    attention = torch.zeros(1, 3, 2, 3)
    attention[0, 0, 0, 0] = attention[0, 0, 1, 2] = attention[0, 1, 0, 1] = attention[0, 1, 1, 0] = 1
    assert evaluate.pointing(attention, masks).tolist() == [[True, False, True]]


class Bright:
    """An encoder that attends to the brightest of 4 x 4-pixel patches."""

    def attention(self, images):
        return torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).sub(-2.2).pow(8)


def test_fine_attention_finds_a_spot_between_patches():
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[:, :, 6:10, 6:10] = 255  # over the corners of four patches
    maps = evaluate.fine_attention(Bright(), images, 16, stride=1)
    assert maps.shape == (1, 1, 16, 16)
    assert maps.sum().item() == pytest.approx(1)
    row, column = divmod(int(maps.argmax()), 16)
    assert 6 <= row < 10
    assert 6 <= column < 10
    center = (maps[0, 0].sum(0) * (torch.arange(16) + 0.5)).sum()
    assert center.item() == pytest.approx(8, abs=0.6)


def test_fine_attention_asks_for_a_layer_only_if_one_is_asked_for():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with pytest.raises(TypeError):
        evaluate.fine_attention(Bright(), images, 16, layer=0)
    encoder = tiny_vit().eval()
    first, last = (evaluate.fine_attention(encoder, images, 16, layer=layer) for layer in (0, 1))
    assert torch.equal(last, evaluate.fine_attention(encoder, images, 16))
    assert not torch.equal(first, last)


class Mean:
    """An encoder whose patches, of 4 x 4 pixels, are their mean colours."""

    def __call__(self, images):
        patches = F.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return Tokens(patches.mean((1, 2)), patches)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_fine_patches_are_of_the_pixels_around_them(stride):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    found = evaluate.fine_patches(Mean(), images, 12, stride)
    side = 12 // stride
    assert found.shape == (2, side, side, 3)
    pixels = normalize(images)
    for row in range(side):
        for column in range(side):
            top, left = (place * stride + stride // 2 - 2 for place in (row, column))  # a patch around the middle
            if min(top, left) >= 0 and max(top, left) <= 8:
                expected = pixels[:, :, top : top + 4, left : left + 4].mean((-2, -1))
                torch.testing.assert_close(found[:, row, column], expected)
    if stride == 4:
        torch.testing.assert_close(found, Mean()(pixels).patches)


def test_a_stride_that_does_not_divide_the_patch_is_said():
    with pytest.raises(InputError, match="3 pixels does not divide a patch of 4"):
        evaluate.fine_patches(Mean(), torch.zeros(1, 3, 12, 12, dtype=torch.uint8), 12, 3)


class Even:
    """An encoder that looks everywhere, on a grid of 4 x 4."""

    def attention(self, images):
        return torch.ones(len(images), 1, 4, 4)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_fine_attention_that_is_even_stays_even_to_the_border(stride):
    maps = evaluate.fine_attention(Even(), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 16, stride)
    torch.testing.assert_close(maps, torch.full((2, 1, 16, 16), 1 / 256))
