"""CLIP's loss is the paper's, its state holds its tokenizer, and words classify images."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minissl.data.transforms.functional import normalize
from minissl.evaluation import class_embeddings, fill_templates, retrieval_recall, prompt_embeddings, zero_shot, zero_shot_classify_sum
from minissl.data.batch import Batch
from minissl.methods.clip import CLIP, clip_loss, duplicate_caption_mask
from tests.golden import tiny_vit, wave


def by_loops(image, text, scale, also=None):
    """Both directions of the loss, image by image and text by text; what is `also` true is not among the candidates."""
    image, text = [x / x.norm() for x in image], [x / x.norm() for x in text]

    def find_own(queries, candidates):
        total = 0.0
        for i, query in enumerate(queries):
            others = [j for j in range(len(candidates)) if j == i or also is None or not also[i, j]]
            total = (
                total
                - (scale * query.dot(candidates[i]))
                + sum((scale * query.dot(candidates[j])).exp() for j in others).log()
            )
        return total / len(queries)

    return find_own(image, text), find_own(text, image)


def pairs(b, e, seed=0, dtype=torch.float64):
    """Vectors of images and of texts that want a gradient."""
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(b, e, generator=dice, dtype=dtype).mul_(3).requires_grad_() for _ in range(2)]


def test_loss_equals_the_official_numbers():
    image, text = wave(4, 8), wave(4, 8, phase=0.5)
    to_text, to_image = by_loops(image, text, 1 / 0.07)
    assert to_text.item() == pytest.approx(1.35225054, abs=1e-8)
    assert to_image.item() == pytest.approx(1.37764722, abs=1e-8)
    assert clip_loss(image, text, 1 / 0.07).item() == pytest.approx(1.36494888, abs=1e-8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.1, 100), st.integers(0, 99), st.booleans())
def test_loss_and_gradients_equal_the_loops(b, e, scale, seed, forgiving):
    image, text = pairs(b, e, seed)
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    kind = torch.randint(0, 3, (b,), generator=torch.Generator().manual_seed(seed))
    also = kind[:, None] == kind if forgiving else None
    fast, slow = clip_loss(image, text, scale, also), sum(by_loops(image, text, scale, also)) / 2
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(loss, [image, text, scale]) for loss in (fast, slow))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("b", "e", "scale"), [(2, 3, 1.0), (8, 16, 1 / 0.07), (33, 8, 100.0)])
def test_loss_and_gradients_equal_open_clips(b, e, scale):
    from open_clip.loss import ClipLoss

    image, text = pairs(b, e)
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    found = clip_loss(image, text, scale)
    expected = ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, [image, text, scale]) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_knowing_nothing_costs_ln_b():
    same = torch.ones(7, 4)
    assert clip_loss(same, same, 50.0).item() == pytest.approx(math.log(7), rel=1e-6)


def test_only_directions_count():
    image, text = pairs(5, 8)
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(clip_loss(image * lengths, 9 * text, 10.0), clip_loss(image, text, 10.0))


def test_two_that_are_equally_true_cost_nothing_and_move_nothing():
    image, text = pairs(2, 4)
    loss = clip_loss(image, text, 10.0, torch.ones(2, 2, dtype=torch.bool))
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [image, text]):
        assert gradient.abs().max() == 0


def test_an_equally_true_caption_does_not_push():
    """With captions 0 and 1 equally true, image 0 feels nothing of caption 1; without, it is pushed."""
    also = torch.eye(4, dtype=torch.bool)
    also[0, 1] = also[1, 0] = True
    image, text = pairs(4, 8)
    moved = text.detach().clone()
    moved[1] = -moved[1]

    def push(text, also):
        return torch.autograd.grad(clip_loss(image, text, 5.0, also), image)[0][0]

    torch.testing.assert_close(push(text, also), push(moved, also), rtol=0, atol=1e-14)
    assert (push(text, None) - push(moved, None)).abs().max() > 1e-3


def test_a_pair_apart_from_the_batch_and_forgiven_changes_no_gradient():
    """A fourth pair, equally true to all others, leaves them the gradients of a batch without it."""
    image, text = pairs(4, 8)
    also = torch.eye(4, dtype=torch.bool)
    also[3, :] = also[:, 3] = True
    with_it = torch.autograd.grad(clip_loss(image, text, 5.0, also), [image, text])
    without = torch.autograd.grad(clip_loss(image[:3], text[:3], 5.0), [image, text])
    for a, b in zip(with_it, without):
        torch.testing.assert_close(4 * a, 3 * b)  # the mean is over one more


def test_equally_true_means_the_very_same_captions():
    captions = [("a", "b"), ("c",), ("a", "b"), ("b", "a"), ("a",), ("c",)]
    expected = torch.tensor([[one == other for other in captions] for one in captions])
    assert torch.equal(duplicate_caption_mask(captions), expected)


COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (220, 220, 220)}


def squares(copies=1):
    """Four coloured squares, each with two captions."""
    names = list(COLORS) * copies
    images = torch.tensor([COLORS[name] for name in names], dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 20, 20)
    return Batch(images, captions=[(f"a {name} square", f"this square is {name}") for name in names])


def small_clip(**options):
    random.seed(0)
    torch.manual_seed(0)
    small = {"size": 16, "scale": (0.8, 1.0), "embedding": 16, "text_width": 32, "text_depth": 1, "text_heads": 4}
    return CLIP(tiny_vit(), **small | {"length": 12, "vocabulary": 532} | options)


def prepared(**options):
    method = small_clip(**options)
    method.prepare(SimpleNamespace(captions=squares().captions))
    return method


def trained(method, batch, steps=60):
    """The mean loss of the last ten steps."""
    optimizer, losses = torch.optim.AdamW(method.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = method.loss(batch, 0.5)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(0.5)
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_learns_what_colours_are_called():
    method, batch = prepared(), squares()
    assert method.loss(batch, 0.0)["loss"].item() > 0.7 * math.log(4)
    assert trained(method, batch) < 0.3 * math.log(4)
    sentences = [[f"a {name} square"] for name in COLORS]
    with torch.no_grad():
        vectors = method.embed_images(normalize(batch.images[:, :, :16, :16] / 255))
    found = zero_shot(vectors, class_embeddings(method.embed_text, sentences))
    assert found.tolist() == [0, 1, 2, 3]


def test_two_of_each_image_are_no_puzzle_only_if_forgiven():
    batch = squares(copies=2)
    assert trained(prepared(forgive=True), batch) < 0.5 * math.log(2)
    strict = prepared(forgive=False)
    strict.embed_text = lambda texts: CLIP.embed_text(strict, [captions[0] for captions in batch.captions])
    assert trained(strict, batch) > math.log(2) - 1e-4  # two captions are one and the same: the best is a guess


def test_each_image_meets_one_of_its_own_captions():
    method, batch, seen = prepared(), squares(), []
    method.embed_text = lambda texts: seen.append(texts) or CLIP.embed_text(method, texts)
    for _ in range(20):
        method.loss(batch, 0.5)
    for texts, own in zip(zip(*seen), batch.captions):
        assert set(texts) == set(own)


def test_scale_starts_at_the_temperature_and_is_watched():
    terms = small_clip(temperature=0.05).loss(squares(), 0.0)
    assert terms["scale"].item() == pytest.approx(20, rel=1e-5)
    terms["loss"].backward()


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-3.0, 0.0), (2.5, 2.5)])
def test_scale_is_clamped_after_a_step(start, end):
    method = small_clip()
    method.logit_scale.data.fill_(start)
    method.after_step(0.5)
    assert method.logit_scale.item() == pytest.approx(end, rel=1e-6)


def test_merges_are_in_the_state():
    method, other, texts = prepared(), small_clip(), ["a red square", "this square is white", "ten green bottles"]
    assert len(method.tokenizer.pairs) == 532 - 514
    assert other.tokenizer.pairs == []
    assert (other.embed_text(texts) - method.embed_text(texts)).abs().max() > 1e-3
    other.load_state_dict(method.state_dict())
    assert other.tokenizer.pairs == method.tokenizer.pairs
    assert other.tokenizer.length == 12
    torch.testing.assert_close(other.embed_text(texts), method.embed_text(texts), rtol=0, atol=0)


def test_a_long_caption_is_cut():
    vectors = prepared().embed_text(["a red square " * 20, "a red square " * 30])
    torch.testing.assert_close(vectors[0], vectors[1])


def test_a_class_is_the_mean_of_its_sentences_directions():
    vectors = {"a": [10.0, 0.0], "b": [0.0, 0.1], "c": [-3.0, 4.0]}
    found = class_embeddings(lambda texts: torch.tensor([vectors[text] for text in texts]), [["a", "b"], ["c"]])
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [-0.6, 0.8]]))


def test_zero_shot_sum_is_the_mean_share_of_the_softmax():
    torch.manual_seed(0)
    vectors = {text: torch.randn(4) for text in "abcde"}
    prompts, images = [["a", "b", "c"], ["d", "e"]], torch.randn(20, 4)
    sentences = prompt_embeddings(lambda texts: torch.stack([vectors[text] for text in texts]), prompts)
    expected = []
    for image in images:
        power = {t: math.exp(7 * float(F.cosine_similarity(image, vectors[t], dim=0))) for t in vectors}
        means = [sum(power[t] for t in texts) / len(texts) for texts in prompts]
        expected.append(means.index(max(means)))
    assert zero_shot_classify_sum(images, sentences, 7.0).tolist() == expected
    assert 0 < sum(expected) < 20


def test_zero_shot_takes_the_nearest_direction():
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]])
    images = torch.tensor([[0.1, 0.01], [1.0, 9.0], [-50.0, 40.0], [3.0, -2.0]])
    assert zero_shot(images, classes).tolist() == [0, 1, 2, 0]


def test_names_are_put_in_templates():
    assert fill_templates(["cat", "dog"], ("a {}.", "{}")) == [["a cat.", "cat"], ["a dog.", "dog"]]
    assert [len(texts) for texts in fill_templates(["cat", "dog"])] == [5, 5]


def test_retrieval_is_within_groups_and_leaves_a_rest_out():
    found = torch.eye(5)
    queries = 7 * found[[0, 1, 3, 2, 1]]  # the second group is crossed, the fifth is a rest
    assert retrieval_recall(queries, found, torch.arange(5), group_size=2) == pytest.approx(0.5)
    assert retrieval_recall(queries, found, torch.arange(5), group_size=1) == 1.0
    assert retrieval_recall(queries, found, torch.arange(5), group_size=5) == pytest.approx(2 / 5)
    assert retrieval_recall(queries, found, torch.tensor([0, 1, 2, 2, 4]), group_size=2) == 1.0  # as right as its own


def test_retrieval_of_less_than_a_group_is_refused():
    with pytest.raises(ValueError, match="3 pairs"):
        retrieval_recall(torch.eye(3), torch.eye(3), torch.arange(3), group_size=4)
