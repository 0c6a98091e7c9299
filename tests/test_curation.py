"""Near-duplicates are found, groups are sampled evenly, and similar images are retrieved first."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

from minissl.data import curation
from minissl.data.curation import (
    balanced_sample,
    cluster,
    find_near_duplicates,
    nearest_neighbors,
    retrieve_similar,
    thumbnail_descriptors,
)
from minissl.data.synthetic.uncurated import UncuratedPool


def connected_components(features, threshold):
    """Return the first index of each image's component, by graph search."""
    x = F.normalize(features, dim=-1)
    adjacent, first = x @ x.mT >= threshold, []
    for i in range(len(x)):
        component, queue = {i}, [i]
        while queue:
            for j in adjacent[queue.pop()].nonzero()[:, 0].tolist():
                if j not in component:
                    component.add(j)
                    queue.append(j)
        first.append(min(component))
    return torch.tensor(first)


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_equal_a_graph_search(seed):
    torch.manual_seed(seed)
    features = torch.randn(120, 3)  # dense: long chains of duplicates
    first = find_near_duplicates(features, 0.97, k=120)
    assert torch.equal(first, connected_components(features, 0.97))
    assert len(first.unique()) < 110


def test_without_duplicates_all_images_stay():
    assert torch.equal(find_near_duplicates(torch.eye(40), 0.6), torch.arange(40))


def test_nearest_neighbors_equal_the_full_matrix(monkeypatch):
    monkeypatch.setattr(curation, "CHUNK", 8)
    torch.manual_seed(0)
    a, b = torch.randn(30, 5), torch.randn(50, 5)
    similarities, indices = nearest_neighbors(a, b, 4)
    expected = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT).topk(4)
    torch.testing.assert_close(similarities, expected.values)
    assert torch.equal(indices, expected.indices)


def test_separated_clusters_are_found():
    torch.manual_seed(0)
    truth = torch.arange(200) % 4
    assigned = cluster(5 * torch.eye(8)[truth] + 0.3 * torch.randn(200, 8), 4)
    assert adjusted_rand_score(truth, assigned) == 1.0


@pytest.mark.parametrize("n", [1, 12, 30, 45, 120])
def test_groups_are_sampled_evenly(n):
    torch.manual_seed(0)
    groups = torch.tensor([0] * 80 + [1] * 30 + [2] * 8 + [3] * 2)[torch.randperm(120)]
    rows = balanced_sample(groups, n)
    assert len(rows.unique()) == n
    counts = torch.bincount(groups[rows], minlength=4)
    for group in range(4):  # a group has at most one fewer than another, unless it was taken whole
        assert counts[group] >= counts.max() - 1 or counts[group] == (groups == group).sum()
    assert torch.equal(rows, balanced_sample(groups, n))
    if n == 30:
        assert not torch.equal(rows, balanced_sample(groups, n, seed=1))


def test_similar_images_are_retrieved_first():
    torch.manual_seed(0)
    pool = torch.cat([torch.eye(4)[torch.arange(40) % 2], -torch.ones(60, 4)]) + 0.05 * torch.randn(100, 4)
    rows = retrieve_similar(pool, torch.eye(4)[:2], 40)
    assert sorted(rows.tolist()) == list(range(40))
    assert sorted(retrieve_similar(pool, torch.eye(4)[:2], 100).tolist()) == list(range(100))
    first = retrieve_similar(pool, torch.eye(4)[:2], 2)
    assert {int(row) % 2 for row in first} == {0, 1}  # the nearest neighbor of each curated image


def test_thumbnail_descriptors_are_invariant_to_flips_and_brightness():
    torch.manual_seed(0)
    images = torch.randint(30, 180, (6, 3, 16, 16), dtype=torch.uint8)
    descriptors = thumbnail_descriptors(images)
    assert descriptors.shape == (6, 2 * 3 * 8 * 8)
    torch.testing.assert_close(thumbnail_descriptors(images.flip(-1)), descriptors, atol=1e-5, rtol=0)
    brighter = (images.float() * 1.2).round().to(torch.uint8)
    assert F.cosine_similarity(thumbnail_descriptors(brighter), descriptors).min() > 0.99
    assert F.cosine_similarity(descriptors, descriptors.roll(1, 0)).max() < 0.9


def test_near_duplicates_in_a_pool_are_found():
    pool = UncuratedPool(400)
    removed = find_near_duplicates(thumbnail_descriptors(pool.images), 0.95) != torch.arange(400)
    is_copy, is_scene = pool.origin != torch.arange(400), pool.topic == 0
    assert is_copy[removed & is_scene].float().mean() > 0.9  # precision
    assert removed[is_copy & is_scene].float().mean() > 0.5  # recall
