"""Shipped checkpoints: each is small, has a card that says how it was trained, and gives the numbers of its card."""

import json
from functools import cache

import pytest

from minissl.data import load_dataset
from minissl.evaluation import extract_features, knn, rank_me
from minissl.evaluation.benchmark import accuracy
from minissl.hub import pretrained
from minissl.methods.registry import get_method_class, method_options
from minissl.training.checkpoint import FORMAT_VERSION
from minissl.training.config import TrainConfig
from minissl.training.run import RunConfig

CARD_PATHS = sorted(pretrained.CHECKPOINT_DIR.glob("*.json"))
CARDS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in CARD_PATHS}

every_card = pytest.mark.parametrize("name", CARDS)


def test_checkpoints_and_cards_come_in_pairs():
    assert CARDS
    assert {path.stem for path in pretrained.CHECKPOINT_DIR.glob("*.safetensors")} == set(CARDS)


@every_card
def test_a_checkpoint_is_small_and_its_card_is_complete(name):
    assert (pretrained.CHECKPOINT_DIR / f"{name}.safetensors").stat().st_size <= 3 << 20
    assert CARDS[name]["format_version"] == FORMAT_VERSION
    run = RunConfig(**CARDS[name]["run"])
    TrainConfig(**run.train)
    assert set(run.method_options) == set(method_options(get_method_class(run.method)))
    assert CARDS[name]["plan"]["steps"] > 0


@every_card
def test_an_exported_method_has_the_options_of_its_card(name):
    run = RunConfig(**CARDS[name]["run"])
    if name == "rotation":  # the encoder alone
        config = json.loads(json.dumps(pretrained.load_encoder(f"scenes/{name}").config))
        assert config == run.encoder | {"weights": "none"}
        return
    method = pretrained.load_method(f"scenes/{name}")
    assert json.loads(json.dumps(method.config)) == {"name": run.method, "options": run.method_options}


@cache
def images(name, split, size, n):
    """Rendered once for all cards."""
    dataset = load_dataset(name, split, size).subsample(n)
    return dataset.images, dataset.labels


@pytest.mark.slow
@every_card
def test_a_checkpoint_gives_the_numbers_of_its_card(name):
    """k-NN within half a point, on as many images as the card counts."""
    metrics = CARDS[name]["metrics"]
    run = RunConfig(**CARDS[name]["run"] | {"data": metrics["data"]})
    (train, labels), (test, test_labels) = (
        images(run.data, split, run.image_size, metrics[f"{split}_images"]) for split in ("train", "test")
    )
    encoder, size = pretrained.load_encoder(f"scenes/{name}"), run.encoder["image_size"]
    features, queries = (extract_features(encoder, part, size, pooling=run.feature_pooling) for part in (train, test))
    assert accuracy(knn(features, labels, queries), test_labels) == pytest.approx(metrics["knn"], abs=0.005)
    assert rank_me(queries) == pytest.approx(metrics["rank_me"], rel=0.01)
