"""Copies are found, groups get equal places, and what is like the chosen comes first."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

from minissl.data.curation import balanced, clusters, copies, nearest, retrieved, thumbnails
from minissl.data.pool import Pool


def by_loops(features, threshold):
    """The first of everybody's company, by walking from copy to copy."""
    x = F.normalize(features, dim=-1)
    near, first = x @ x.mT >= threshold, []
    for i in range(len(x)):
        company, edge = {i}, [i]
        while edge:
            for j in near[edge.pop()].nonzero()[:, 0].tolist():
                if j not in company:
                    company.add(j)
                    edge.append(j)
        first.append(min(company))
    return torch.tensor(first)


@pytest.mark.parametrize("seed", range(4))
def test_copies_equal_the_walk(seed):
    torch.manual_seed(seed)
    features = torch.randn(120, 3)  # crowded: long chains of copies
    found = copies(features, 0.97, k=120)
    assert torch.equal(found, by_loops(features, 0.97))
    assert len(found.unique()) < 110


def test_without_copies_everybody_stays():
    assert torch.equal(copies(torch.eye(40), 0.6), torch.arange(40))


def test_nearest_equals_the_whole_matrix():
    torch.manual_seed(0)
    a, b = torch.randn(30, 5), torch.randn(50, 5)
    cosines, rows = nearest(a, b, 4)
    right = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT).topk(4)
    torch.testing.assert_close(cosines, right.values)
    assert torch.equal(rows, right.indices)


def test_clusters_find_heaps():
    torch.manual_seed(0)
    truth = torch.arange(200) % 4
    found = clusters(5 * torch.eye(8)[truth] + 0.3 * torch.randn(200, 8), 4)
    assert adjusted_rand_score(truth, found) == 1.0


@pytest.mark.parametrize("n", [1, 12, 30, 45, 120])
def test_every_group_has_as_many_as_it_can_give(n):
    groups = torch.tensor([0] * 80 + [1] * 30 + [2] * 8 + [3] * 2)[torch.randperm(120)]
    rows = balanced(groups, n)
    assert len(rows.unique()) == n
    counts = torch.bincount(groups[rows], minlength=4)
    for group in range(4):  # nobody has two fewer than another unless it has given all
        assert counts[group] >= counts.max() - 1 or counts[group] == (groups == group).sum()
    assert torch.equal(rows, balanced(groups, n))
    if n == 30:
        assert not torch.equal(rows, balanced(groups, n, seed=1))


def test_what_is_like_the_chosen_comes_first():
    torch.manual_seed(0)
    pool = torch.cat([torch.eye(4)[torch.arange(40) % 2], -torch.ones(60, 4)]) + 0.05 * torch.randn(100, 4)
    rows = retrieved(pool, torch.eye(4)[:2], 40)
    assert sorted(rows.tolist()) == list(range(40))
    assert sorted(retrieved(pool, torch.eye(4)[:2], 100).tolist()) == list(range(100))  # all, when all are asked for
    first = retrieved(pool, torch.eye(4)[:2], 2)
    assert {int(row) % 2 for row in first} == {0, 1}  # each of the chosen has had its nearest


def test_a_thumbnail_is_the_same_mirrored_and_lighter():
    torch.manual_seed(0)
    images = torch.randint(30, 180, (6, 3, 16, 16), dtype=torch.uint8)
    ours = thumbnails(images)
    assert ours.shape == (6, 2 * 3 * 8 * 8)
    torch.testing.assert_close(thumbnails(images.flip(-1)), ours, atol=1e-5, rtol=0)
    lighter = (images.float() * 1.2).round().to(torch.uint8)
    assert F.cosine_similarity(thumbnails(lighter), ours).min() > 0.99
    assert F.cosine_similarity(ours, ours.roll(1, 0)).max() < 0.9


def test_copies_in_a_pool_are_found():
    pool = Pool(400)
    removed = copies(thumbnails(pool.images), 0.95) != torch.arange(400)
    true, scene = pool.origin != torch.arange(400), pool.topic == 0
    assert true[removed & scene].float().mean() > 0.9  # precision
    assert removed[true & scene].float().mean() > 0.5  # recall
