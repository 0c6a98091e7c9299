"""Captions and prompts of scenes: sentences that name the object, its color, its action and the place."""

import random

CAPTIONS = (
    "a {color} {object} {doing} {where}",
    "{where}, a {color} {object} is {doing}",
    "a picture of a {color} {object} that is {doing} {where}",
    "the {object} {doing} {where} is {color}",
    "one {object}, {color}, {doing} {where}",
    "{doing} {where}: a {color} {object}",
)
PLACE_PHRASES = {
    "snowy field": "in a snowy field",
    "beach": "on a beach",
    "desert": "in a desert",
    "forest": "in a forest",
    "city": "in a city",
    "sea": "in the sea",
    "moon": "on the moon",
    "meadow": "in a meadow",
}


def describe(paraphrase: int, **words: str) -> str:
    """Return a sentence with an "object", a "color", an "action" and a "place"; `paraphrase` indexes CAPTIONS."""
    return CAPTIONS[paraphrase].format(**words, doing=words["action"], where=PLACE_PHRASES[words["place"]])


def factor_prompts(factor: str, names: dict[str, tuple[str, ...]], n: int = 300) -> tuple[tuple[str, ...], ...]:
    """Return n sentences for each class of a factor, with random classes of the other factors.

    The random classes are the same for all classes of the factor, so that the mean embeddings of two classes differ by
    the class alone.

    Args:
        factor: "object", "color", "action" or "place".
        names: the classes of every factor.
        n: number of sentences per class.
    """
    rng = random.Random(0)
    samples = [{other: rng.choice(classes) for other, classes in names.items()} for _ in range(n)]
    return tuple(
        tuple(describe(i % len(CAPTIONS), **words | {factor: name}) for i, words in enumerate(samples))
        for name in names[factor]
    )
