"""The pool is what it says: long-tailed, repetitive, and partly about nothing."""

import pytest
import torch

from minissl.data.pool import COPIES, OFF_TOPIC, TOPICS, Pool
from minissl.data.scenes import Scenes


@pytest.fixture(scope="module")
def pool():
    return Pool(1000, size=32)


def test_its_shares_are_as_stated(pool):
    repeats = pool.origin != torch.arange(1000)
    assert repeats.float().mean() == pytest.approx(COPIES, abs=0.04)
    assert (pool.topic > 0).float().mean() == pytest.approx(OFF_TOPIC, abs=0.1)
    assert set(pool.topic.tolist()) == set(range(len(TOPICS)))
    assert torch.equal(pool.labels < 0, pool.topic > 0)


def test_its_kinds_have_a_long_tail():
    first = Pool(8000, size=32)
    originals = (first.origin == torch.arange(8000)) & (first.topic == 0)
    counts = torch.bincount(first.labels[originals], minlength=10).float()
    share = 1 / torch.arange(1, 11)
    expected = counts.sum() * share / share.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi-square, 9 degrees: p < 0.001


def test_a_copy_is_near_its_original_and_no_original_is_a_copy(pool):
    repeats = (pool.origin != torch.arange(1000)).nonzero()[:, 0]
    assert (pool.origin[repeats] < repeats).all()
    assert torch.equal(pool.origin[pool.origin], pool.origin)
    images, shown = pool.images.float(), repeats[pool.topic[repeats] == 0]

    def gap(a, b):
        return torch.minimum((a - b).abs().mean((1, 2, 3)), (a.flip(-1) - b).abs().mean((1, 2, 3)))

    near = gap(images[shown], images[pool.origin[shown]])
    far = gap(images[shown], images[pool.origin[shown].roll(1)])
    assert near.median() < 0.5 * far.median()
    assert not any(torch.equal(images[i], images[pool.origin[i]]) for i in shown)


def test_it_is_the_same_again_and_shares_no_scene_with_the_splits(pool):
    assert torch.equal(Pool(1000, size=32).images, pool.images)
    assert not torch.equal(Pool(20, size=32, seed=1).images, pool.images[:20])
    draws = torch.cat([pool.draws[:, 0], *(Scenes(split, n=1000).draws[:, 0] for split in ("train", "test"))])
    assert len(draws.unique()) == len(draws)


def test_off_topic_pictures_show_nothing(pool):
    plain = pool.images[(pool.topic == TOPICS.index("plain")).nonzero()[0, 0]].float()
    noise = pool.images[(pool.topic == TOPICS.index("noise")).nonzero()[0, 0]].float()
    assert plain.diff(dim=-2).abs().max() <= 1
    assert noise.std() > 60
