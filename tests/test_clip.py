"""CLIP's loss equals the paper's, loops and open_clip; the state dict holds the tokenizer; text classifies images."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minissl.data.batch import Batch
from minissl.data.transforms.functional import normalize
from minissl.evaluation import (
    class_embeddings,
    fill_templates,
    prompt_embeddings,
    retrieval_recall,
    zero_shot_classify,
    zero_shot_classify_sum,
)
from minissl.methods.clip import CLIP, clip_loss, duplicate_caption_mask
from tests.golden import tiny_vit, wave


def clip_loss_by_loops(image, text, scale, ignore_mask=None):
    """Return both directions of the loss, row by row; ignored pairs are not among the candidates."""
    image, text = [x / x.norm() for x in image], [x / x.norm() for x in text]

    def one_direction(queries, keys):
        total = 0.0
        for i, query in enumerate(queries):
            candidates = [j for j in range(len(keys)) if j == i or ignore_mask is None or not ignore_mask[i, j]]
            positive = scale * query.dot(keys[i])
            total = total - positive + sum((scale * query.dot(keys[j])).exp() for j in candidates).log()
        return total / len(queries)

    return one_direction(image, text), one_direction(text, image)


def random_embeddings(b, e, seed=0, dtype=torch.float64):
    """Return embeddings of images and texts that require a gradient, (b, e) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, e, generator=generator, dtype=dtype).mul_(3).requires_grad_() for _ in range(2)]


def test_loss_equals_the_golden_numbers():
    image, text = wave(4, 8), wave(4, 8, phase=0.5)
    image_to_text, text_to_image = clip_loss_by_loops(image, text, 1 / 0.07)
    assert image_to_text.item() == pytest.approx(1.35225054, abs=1e-8)
    assert text_to_image.item() == pytest.approx(1.37764722, abs=1e-8)
    assert clip_loss(image, text, 1 / 0.07).item() == pytest.approx(1.36494888, abs=1e-8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.1, 100), st.integers(0, 99), st.booleans())
def test_loss_and_gradients_equal_loops(b, e, scale, seed, masked):
    image, text = random_embeddings(b, e, seed)
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    group = torch.randint(0, 3, (b,), generator=torch.Generator().manual_seed(seed))
    ignore_mask = group[:, None] == group if masked else None
    fast = clip_loss(image, text, scale, ignore_mask)
    slow = sum(clip_loss_by_loops(image, text, scale, ignore_mask)) / 2
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    fast_gradients, slow_gradients = (torch.autograd.grad(loss, [image, text, scale]) for loss in (fast, slow))
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("b", "e", "scale"), [(2, 3, 1.0), (8, 16, 1 / 0.07), (33, 8, 100.0)])
def test_loss_and_gradients_equal_open_clip(b, e, scale):
    from open_clip.loss import ClipLoss

    image, text = random_embeddings(b, e)
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss = clip_loss(image, text, scale)
    expected = ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients, expected_gradients = (torch.autograd.grad(x, [image, text, scale]) for x in (loss, expected))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


def test_equal_embeddings_have_a_loss_of_ln_b():
    same = torch.ones(7, 4)
    assert clip_loss(same, same, 50.0).item() == pytest.approx(math.log(7), rel=1e-6)


def test_loss_is_invariant_to_the_lengths_of_embeddings():
    image, text = random_embeddings(5, 8)
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(clip_loss(image * lengths, 9 * text, 10.0), clip_loss(image, text, 10.0))


def test_with_all_other_pairs_ignored_loss_and_gradient_are_0():
    image, text = random_embeddings(2, 4)
    loss = clip_loss(image, text, 10.0, torch.ones(2, 2, dtype=torch.bool))
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [image, text]):
        assert gradient.abs().max() == 0


def test_an_ignored_caption_has_no_influence_on_an_image():
    """With pairs (0, 1) ignored, the gradient of image 0 does not depend on text 1; otherwise it does."""
    ignore_mask = torch.eye(4, dtype=torch.bool)
    ignore_mask[0, 1] = ignore_mask[1, 0] = True
    image, text = random_embeddings(4, 8)
    changed = text.detach().clone()
    changed[1] = -changed[1]

    def gradient(text, ignore_mask):
        return torch.autograd.grad(clip_loss(image, text, 5.0, ignore_mask), image)[0][0]

    torch.testing.assert_close(gradient(text, ignore_mask), gradient(changed, ignore_mask), rtol=0, atol=1e-14)
    assert (gradient(text, None) - gradient(changed, None)).abs().max() > 1e-3


def test_a_pair_ignored_by_all_others_does_not_change_their_gradients():
    image, text = random_embeddings(4, 8)
    ignore_mask = torch.eye(4, dtype=torch.bool)
    ignore_mask[3, :] = ignore_mask[:, 3] = True
    with_pair = torch.autograd.grad(clip_loss(image, text, 5.0, ignore_mask), [image, text])
    without = torch.autograd.grad(clip_loss(image[:3], text[:3], 5.0), [image, text])
    for a, b in zip(with_pair, without):
        torch.testing.assert_close(4 * a, 3 * b)  # one is a mean over four pairs, the other over three


def test_duplicate_captions_are_those_with_identical_sentences():
    captions = [("a", "b"), ("c",), ("a", "b"), ("b", "a"), ("a",), ("c",)]
    expected = torch.tensor([[one == other for other in captions] for one in captions])
    assert torch.equal(duplicate_caption_mask(captions), expected)


COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (220, 220, 220)}


def colored_squares(copies=1):
    """Return four images of one color each, with two captions each."""
    names = list(COLORS) * copies
    images = torch.tensor([COLORS[name] for name in names], dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 20, 20)
    return Batch(images, captions=[(f"a {name} square", f"this square is {name}") for name in names])


def build(**options):
    random.seed(0)
    torch.manual_seed(0)
    small = {"crop_size": 16, "crop_scale": (0.8, 1.0), "embed_dim": 16, "text_width": 32, "text_layers": 1}
    small |= {"text_heads": 4, "context_length": 12, "vocab_size": 532}
    return CLIP(tiny_vit(), **small | options)


def build_with_tokenizer(**options):
    method = build(**options)
    method.prepare(SimpleNamespace(captions=colored_squares().captions))
    return method


def train(method, batch, steps=60):
    """Train a method on one batch. Returns the mean loss of the last ten steps."""
    optimizer, losses = torch.optim.AdamW(method.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = method.loss(batch, 0.5)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(0.5)
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_training_aligns_images_with_the_names_of_their_colors():
    method, batch = build_with_tokenizer(), colored_squares()
    assert method.loss(batch, 0.0)["loss"].item() > 0.7 * math.log(4)
    assert train(method, batch) < 0.3 * math.log(4)
    prompts = [[f"a {name} square"] for name in COLORS]
    with torch.no_grad():
        embeddings = method.embed_images(normalize(batch.images[:, :, :16, :16]))
        predictions = zero_shot_classify(embeddings, class_embeddings(method.embed_text, prompts))
    assert predictions.tolist() == [0, 1, 2, 3]


def test_masking_duplicate_captions_removes_a_floor_of_ln_2():
    batch = colored_squares(copies=2)
    assert train(build_with_tokenizer(mask_duplicate_captions=True), batch) < 0.5 * math.log(2)
    strict = build_with_tokenizer(mask_duplicate_captions=False)
    strict.embed_text = lambda texts: CLIP.embed_text(strict, [captions[0] for captions in batch.captions])
    assert train(strict, batch) > math.log(2) - 1e-4  # each caption occurs twice, so 1/2 is the best probability


def test_each_image_is_paired_with_all_of_its_captions():
    method, batch, sampled = build_with_tokenizer(), colored_squares(), []
    method.embed_text = lambda texts: sampled.append(texts) or CLIP.embed_text(method, texts)
    for _ in range(20):
        method.loss(batch, 0.5)
    for texts, captions in zip(zip(*sampled), batch.captions):
        assert set(texts) == set(captions)


def test_logit_scale_starts_at_the_inverse_temperature_and_is_logged():
    terms = build(temperature=0.05).loss(colored_squares(), 0.0)
    assert terms["scale"].item() == pytest.approx(20, rel=1e-5)


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-3.0, 0.0), (2.5, 2.5)])
def test_logit_scale_is_clamped_after_a_step(start, end):
    method = build()
    method.logit_scale.data.fill_(start)
    method.after_step(0.5)
    assert method.logit_scale.item() == pytest.approx(end, rel=1e-6)


def test_the_state_dict_holds_the_tokenizers_merges():
    method, other = build_with_tokenizer(), build()
    texts = ["a red square", "this square is white", "ten green bottles"]
    assert len(method.tokenizer.pairs) == 532 - 514
    assert other.tokenizer.pairs == []
    assert (other.embed_text(texts) - method.embed_text(texts)).abs().max() > 1e-3
    other.load_state_dict(method.state_dict())
    assert other.tokenizer.pairs == method.tokenizer.pairs
    assert other.tokenizer.context_length == 12
    torch.testing.assert_close(other.embed_text(texts), method.embed_text(texts), rtol=0, atol=0)


def test_a_long_caption_is_truncated():
    embeddings = build_with_tokenizer().embed_text(["a red square " * 20, "a red square " * 30])
    torch.testing.assert_close(embeddings[0], embeddings[1])


def test_a_class_embedding_is_the_mean_of_its_normalized_prompts():
    vectors = {"a": [10.0, 0.0], "b": [0.0, 0.1], "c": [-3.0, 4.0]}
    embeddings = class_embeddings(lambda texts: torch.tensor([vectors[text] for text in texts]), [["a", "b"], ["c"]])
    torch.testing.assert_close(embeddings, torch.tensor([[0.5**0.5, 0.5**0.5], [-0.6, 0.8]]))


def test_zero_shot_by_sum_equals_the_mean_softmax_probability_of_the_prompts():
    torch.manual_seed(0)
    vectors = {text: torch.randn(4) for text in "abcde"}
    prompts, images = [["a", "b", "c"], ["d", "e"]], torch.randn(20, 4)
    embeddings = prompt_embeddings(lambda texts: torch.stack([vectors[text] for text in texts]), prompts)
    expected = []
    for image in images:
        exponentials = {t: math.exp(7 * float(F.cosine_similarity(image, vectors[t], dim=0))) for t in vectors}
        means = [sum(exponentials[t] for t in texts) / len(texts) for texts in prompts]
        expected.append(means.index(max(means)))
    assert zero_shot_classify_sum(images, embeddings, 7.0).tolist() == expected
    assert 0 < sum(expected) < 20


def test_zero_shot_predicts_the_class_with_the_largest_cosine_similarity():
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]])
    images = torch.tensor([[0.1, 0.01], [1.0, 9.0], [-50.0, 40.0], [3.0, -2.0]])
    assert zero_shot_classify(images, classes).tolist() == [0, 1, 2, 0]


def test_class_names_are_inserted_into_templates():
    assert fill_templates(["cat", "dog"], ("a {}.", "{}")) == [["a cat.", "cat"], ["a dog.", "dog"]]
    assert [len(texts) for texts in fill_templates(["cat", "dog"])] == [5, 5]


def test_retrieval_recall_is_computed_within_groups_of_full_size():
    candidates = torch.eye(5)
    queries = 7 * candidates[[0, 1, 3, 2, 1]]  # the second group of two is swapped, the fifth pair has no full group
    ids = torch.arange(5)
    assert retrieval_recall(queries, candidates, ids, group_size=2) == pytest.approx(0.5)
    assert retrieval_recall(queries, candidates, ids, group_size=1) == 1.0
    assert retrieval_recall(queries, candidates, ids, group_size=5) == pytest.approx(2 / 5)
    equal_ids = torch.tensor([0, 1, 2, 2, 4])  # pairs 2 and 3 have the same caption
    assert retrieval_recall(queries, candidates, equal_ids, group_size=2) == 1.0


def test_retrieval_recall_of_less_than_a_group_is_rejected():
    with pytest.raises(ValueError, match="3 pairs"):
        retrieval_recall(torch.eye(3), torch.eye(3), torch.arange(3), group_size=4)
