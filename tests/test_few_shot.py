"""Accuracy with few labels: linear probe, fine-tuning and training from scratch."""

import pytest
import torch

from minissl.data.images import Images
from minissl.evaluation import extract_features, linear_probe, sample_per_class
from minissl.methods.transfer import Transfer
from minissl.reports.few_shot import few_label_accuracy, fine_tune
from minissl.training.config import TrainConfig
from minissl.training.trainer import learn
from tests.golden import tiny_vit


def squares(n=120, seed=0):
    """Return noise images (n, 3, 16, 16) with a square in one of three colors, and the color's index (n,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 3
    for i, label in enumerate(labels.tolist()):
        images[i, label, 4:12, 4:12] = 230
    return images, labels


@pytest.fixture(scope="module")
def encoder():
    """Return an encoder that was trained to classify `squares`."""
    torch.manual_seed(0)
    method = Transfer(tiny_vit(), crop_size=16, num_classes=3)
    learn(method, Images(*squares()), TrainConfig(batch_size=32, lr=3e-3, seed=1), 60)
    return method.encoder.eval().requires_grad_(False)


def test_fine_tuning_is_reproducible_and_does_not_change_the_encoder(encoder):
    images, labels = squares(30)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    first, second = (fine_tune(encoder, images, labels, images, 16, steps=5, seed=2) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (30,)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_fine_tuning_learns_a_new_task(encoder):
    """The new labels permute the old ones, so that a randomly initialized head cannot be right."""
    (images, labels), (test_images, test_labels) = squares(30, seed=5), squares(60, seed=6)
    predictions = fine_tune(encoder, images, (labels + 1) % 3, test_images, 16, steps=40, seed=0)
    assert (predictions == (test_labels + 1) % 3).float().mean() > 0.9


def test_fewer_images_than_a_batch_are_enough(encoder):
    images, labels = squares(3)
    assert fine_tune(encoder, images, labels, images, 16, steps=2, batch_size=64).shape == (3,)


@pytest.mark.slow
def test_the_linear_probe_needs_few_labels_on_trained_features(encoder):
    torch.manual_seed(3)
    train, test = squares(60, seed=5), squares(60, seed=6)
    accuracy = few_label_accuracy(encoder, tiny_vit(), train, test, 16, labels_per_class=(1, 4), num_seeds=2)
    assert list(accuracy) == ["frozen", "fine-tuned", "from scratch"]
    assert all(values.shape == (2, 2) for values in accuracy.values())
    assert accuracy["frozen"][1].min() > 0.9
    rows = sample_per_class(train[1], 1, seed=1)
    features, test_features = (extract_features(encoder, images, 16) for images in (train[0][rows], test[0]))
    predictions = linear_probe(features, train[1][rows], test_features, inverse_regularization=0.1)
    assert accuracy["frozen"][0, 1] == (predictions == test[1]).float().mean()
