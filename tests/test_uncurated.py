"""The uncurated pool is long-tailed, has near-duplicates and off-topic images in the stated fractions."""

import hashlib

import pytest
import torch

from minissl.data.synthetic.scenes import Scenes
from minissl.data.synthetic.uncurated import COPIES, OFF_TOPIC, TOPICS, UncuratedPool

GOLDEN = "3b4400377ed6"  # of the images of UncuratedPool(300, size=32, seed=2)


@pytest.fixture(scope="module")
def pool():
    return UncuratedPool(1000, size=32)


def test_the_pool_equals_the_published_one():
    images = UncuratedPool(300, size=32, seed=2).images
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12] == GOLDEN


def test_fractions_are_as_stated(pool):
    is_copy = pool.origin != torch.arange(1000)
    assert is_copy.float().mean() == pytest.approx(COPIES, abs=0.04)
    assert (pool.topic > 0).float().mean() == pytest.approx(OFF_TOPIC, abs=0.1)
    assert set(pool.topic.tolist()) == set(range(len(TOPICS)))
    for factor in pool.factors.values():
        assert torch.equal(factor.labels < 0, pool.topic > 0)
    assert torch.equal(pool.labels, pool.factors["object"].labels)


def test_object_classes_follow_zipfs_law():
    pool = UncuratedPool(8000, size=32)
    originals = (pool.origin == torch.arange(8000)) & (pool.topic == 0)
    counts = torch.bincount(pool.labels[originals], minlength=10).float()
    frequency = 1 / torch.arange(1, 11)
    expected = counts.sum() * frequency / frequency.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi-square, 9 degrees: p < 0.001


def test_a_copy_is_similar_to_its_origin_which_is_no_copy(pool):
    copies = (pool.origin != torch.arange(1000)).nonzero()[:, 0]
    assert (pool.origin[copies] < copies).all()
    assert torch.equal(pool.origin[pool.origin], pool.origin)
    images, scenes = pool.images.float(), copies[pool.topic[copies] == 0]

    def distance(a, b):
        return torch.minimum((a - b).abs().mean((1, 2, 3)), (a.flip(-1) - b).abs().mean((1, 2, 3)))

    to_origin = distance(images[scenes], images[pool.origin[scenes]])
    to_another = distance(images[scenes], images[pool.origin[scenes].roll(1)])
    assert to_origin.median() < 0.5 * to_another.median()
    assert not any(torch.equal(images[i], images[pool.origin[i]]) for i in scenes)


def test_the_pool_is_deterministic_and_shares_no_scene_with_the_splits(pool):
    assert torch.equal(UncuratedPool(1000, size=32).images, pool.images)
    assert not torch.equal(UncuratedPool(20, size=32, seed=1).images, pool.images[:20])
    draws = torch.cat([pool.draws[:, 0], *(Scenes(split, n=1000).draws[:, 0] for split in ("train", "test"))])
    assert len(draws.unique()) == len(draws)


def test_a_part_of_the_pool_can_be_rendered_alone(pool):
    indices = torch.tensor([999, 3, int((pool.topic > 0).nonzero()[5]), 3])
    batch = UncuratedPool(1000, size=32).get_batch(indices)
    assert torch.equal(batch.images, pool.images[indices])
    assert torch.equal(batch.labels, pool.labels[indices])


def test_off_topic_images_show_no_object(pool):
    plain = pool.images[(pool.topic == TOPICS.index("plain")).nonzero()[0, 0]].float()
    noise = pool.images[(pool.topic == TOPICS.index("noise")).nonzero()[0, 0]].float()
    assert plain.diff(dim=-2).abs().max() <= 1
    assert noise.std() > 60
