"""What is said of a scene: its four factors in words, several ways."""

import random

CAPTIONS = (
    "a {color} {object} {doing} {where}",
    "{where}, a {color} {object} is {doing}",
    "a picture of a {color} {object} that is {doing} {where}",
    "the {object} {doing} {where} is {color}",
    "one {object}, {color}, {doing} {where}",
    "{doing} {where}: a {color} {object}",
)
_WHERE = {
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
    """One of the ways (0 .. len(CAPTIONS) - 1) to say an object, a color, an action and a place."""
    return CAPTIONS[paraphrase].format(**words, doing=words["action"], where=_WHERE[words["place"]])


def prompts(factor: str, names: dict[str, tuple[str, ...]], n: int = 300) -> tuple[tuple[str, ...], ...]:
    """For each class of a factor, n sentences that say it, the rest of each drawn at random.

    Args:
        factor: "object", "color", "action" or "place".
        names: the classes of every factor.
        n: sentences a class; the average of many says nothing of what differs between them.
    """
    dice = random.Random(0)
    drawn = [{other: dice.choice(found) for other, found in names.items()} for _ in range(n)]
    return tuple(
        tuple(describe(i % len(CAPTIONS), **words | {factor: name}) for i, words in enumerate(drawn))
        for name in names[factor]
    )
