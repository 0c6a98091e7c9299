"""Tests of k-NN, the linear probe and few-shot accuracy."""

import math

import pytest
import torch
import torch.nn.functional as F

from minissl.evaluation import few_shot_accuracy, knn, linear_probe, sample_per_class


def knn_by_loops(train, labels, test, k, temperature, classes):
    predictions = []
    for x in test:
        neighbors = sorted(((float(F.cosine_similarity(x, t, dim=0)), int(y)) for t, y in zip(train, labels)))[-k:]
        votes = [sum(math.exp(s / temperature) for s, y in neighbors if y == c) for c in range(classes)]
        predictions.append(votes.index(max(votes)))
    return torch.tensor(predictions)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (100, 0.5)])
def test_knn_equals_loops(k, temperature):
    torch.manual_seed(k)
    train, labels, test = torch.randn(40, 6), torch.randint(0, 4, (40,)), torch.randn(15, 6)
    predictions = knn(train, labels, test, k=k, temperature=temperature, classes=4)
    assert torch.equal(predictions, knn_by_loops(train, labels, test, k, temperature, 4))


def test_knn_classifies_more_test_features_than_one_chunk():
    train, labels, test = torch.eye(5).repeat(3, 1), torch.arange(5).repeat(3), torch.eye(5).repeat(500, 1)
    assert torch.equal(knn(train, labels, test, k=3), torch.arange(5).repeat(500))


def clusters():
    """300 features around the corners of a triangle, with their labels."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (300,))
    return F.one_hot(labels, 3) * 4.0 + torch.randn(300, 3), labels


def test_linear_probe_separates_clusters():
    features, labels = clusters()
    predictions = linear_probe(features[:200], labels[:200], features[200:])
    assert (predictions == labels[200:]).float().mean() > 0.9


def test_sample_per_class_takes_all_images_of_a_small_class():
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] * 20)
    indices = sample_per_class(labels, 5, seed=0)
    assert labels[indices].bincount().tolist() == [5, 3, 5]
    assert len(indices.unique()) == 13
    assert torch.equal(indices, sample_per_class(labels, 5, seed=0))
    assert not torch.equal(indices, sample_per_class(labels, 5, seed=1))


def test_few_shot_accuracy_is_the_mean_over_samples():
    features, labels = clusters()
    train, test = (features[:200], labels[:200]), (features[200:], labels[200:])
    accuracies = []
    for seed in range(2):
        indices = sample_per_class(train[1], 4, seed)
        predictions = linear_probe(train[0][indices], train[1][indices], test[0], inverse_regularization=0.1)
        accuracies.append(float((predictions == test[1]).float().mean()))
    assert accuracies[0] != accuracies[1]
    assert few_shot_accuracy(*train, *test, per_class=4, num_samples=2) == pytest.approx(sum(accuracies) / 2)
