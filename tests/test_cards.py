"""Every checkpoint that is shipped is small, says where it comes from, and gives the numbers of its card."""

import json

import pytest

from minissl import pretrained
from minissl.config import Run
from minissl.evaluate import extract, knn, rank_me
from minissl.scores import accuracy

CARDS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(pretrained.OWN.glob("*.json"))}


def test_every_checkpoint_has_a_card_and_every_card_a_checkpoint():
    assert {path.stem for path in pretrained.OWN.glob("*.safetensors")} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_checkpoint_is_small_and_its_card_says_how_it_was_made(name):
    assert (pretrained.OWN / f"{name}.safetensors").stat().st_size <= 3 << 20
    assert set(CARDS[name]) == {"run", "plan", "metrics"}
    run = Run(**CARDS[name]["run"])  # the command, the seed and the data
    assert {"seed", "minutes", "epochs"} <= set(run.loop)
    assert CARDS[name]["plan"]["steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_a_checkpoint_gives_the_numbers_of_its_card(name):
    """Within half a point; on the images the card counts."""
    said = CARDS[name]["metrics"]
    run = Run(**CARDS[name]["run"] | {"data": said["data"]})
    train, test = (run.images(split).some(said[f"{split}_images"]) for split in ("train", "test"))
    encoder = pretrained.load(f"scenes/{name}")
    features, tests = (extract(encoder, part.images, run.size, pool=run.reads) for part in (train, test))
    assert accuracy(knn(features, train.labels, tests), test.labels) == pytest.approx(said["knn"], abs=0.005)
    assert rank_me(tests) == pytest.approx(said["rank_me"], rel=0.01)
