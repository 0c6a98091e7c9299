"""Advice for one's own pictures: from what was measured of them and of the machine to options, each with its reason.

Everything here is a pure function of `survey.Facts`. A rule takes its value from a preset where pictures and machine
allow it, and says in one sentence with which numbers. Numbers that are not of the folder or of the machine are from the
README's "What was measured", or from trainings that others published, and then the sentence says so.
"""

import math
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from minissl.errors import InputError
from minissl.method import find, options
from minissl.survey import Facts
from minissl.train import TrainConfig

FEWEST, FEW = 8, 1000  # pictures: fewer have nothing to be told from; are soon known by heart
TEACHER = 30  # minutes from which on a teacher pays
TEXTURE = 0.8  # agreement of a picture's quarters from which on a part shows the whole
PER_PROTOTYPE = 32  # pictures; 39 in the runs that were measured
HEADS = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16_384), (500_000, 32_768))  # pictures, prototypes
WHOLE, LEAST = 31.4e9, 5.6e9  # bytes that DINO's preset took on a GPU, and was counted to take with --recompute
WASTE = 1.2  # of an allocator


class Advice(NamedTuple):
    """An option of `train METHOD`, --NAME, or, without the dashes, what is to be expected."""

    option: str
    value: Any
    reason: str  # one sentence

    @property
    def text(self) -> str:
        """The value as it is typed."""
        if isinstance(self.value, tuple):
            return "[" + ",".join(f"{x:g}" for x in self.value) + "]"
        return f"{self.value:g}" if isinstance(self.value, float) else str(self.value)


def advise(facts: Facts) -> list[Advice]:
    """What to train, and why; the method comes first.

    Raises:
        InputError: if there are too few different pictures, or too small ones, or there is no advice for the method.
    """
    check(facts)
    method, minutes = choose_method(facts), choose_minutes(facts)
    known = preset(method.value, facts)
    found = [method, choose_preset(facts), *choose_sizes(facts, known), choose_crops(facts, known)]
    batch = choose_batch(facts, known)
    steps = round(60 * minutes.value * facts.rate / batch.value)
    teacher = "prototypes" in known
    found += [choose_prototypes(facts), choose_momentum(known["momentum"], steps)] if teacher else [no_teacher(facts)]
    looks = Advice("--watch_minutes", max(0.2, round(minutes.value / 8, 1)), "So features are measured eight times.")
    found += [batch, *choose_thrift(facts, known, batch.value), minutes, looks]
    return found + ([*expect(facts, steps, batch.value, found[2].value)] if facts.rate else [])


def check(facts: Facts) -> None:
    """Raises InputError for what no option can mend."""
    there = ("dino",) if facts.gpu else ("simclr", "dino")
    if facts.method not in ("", *there):
        raise InputError(f"There is advice for {' and '.join(there)} here, not for {facts.method!r}; see train --help.")
    if facts.different < FEWEST:
        there = f"Pictures to learn from: {facts.train}, of which about {facts.different} are no copies"
        raise InputError(f"{there}; these methods tell pictures apart, so put some hundreds in the folder.")
    if facts.smallest < 16:
        raise InputError(f"The smallest picture is {facts.smallest} pixels on its short side; take out those under 16.")


def preset(method: str, facts: Facts) -> dict[str, Any]:
    """All options of a method's training, as its preset for the machine has them."""
    kind = find(method)
    defaults = vars(TrainConfig()) | {name: option.default for name, option in options(kind).items()}
    return defaults | {"encoder.patch_size": 16, "image_size": 256} | kind.presets["gpu" if facts.gpu else "cpu"]


def choose_method(facts: Facts) -> Advice:
    if facts.method:
        return Advice("method", facts.method, "It was asked for.")
    if facts.gpu:
        why = "After 200 passes over 9,469 photographs others report k-NN 83.8 by DINO and 73.3 by SimCLR, both ViT-S."
        return Advice("method", "dino", why)
    if facts.train < FEW:
        why = "of 300 scenes SimCLR made k-NN 39.3 ± 2.4 in 2.5 minutes, where an untrained network has 17.0"
        return Advice("method", "simclr", f"{facts.train:,} pictures are few: {why}.")
    if facts.minutes >= TEACHER:
        why = "A teacher takes time, and pays: DINO had k-NN 70.9 ± 13.2 on our scenes after 5 minutes, 89.6 after 30."
        return Advice("method", "dino", why)
    why = (
        f"In less than {TEACHER} minutes a teacher is a gamble: on our scenes k-NN was 76.5 ± 4.6 by SimCLR and 70.9 ± "
    )
    return Advice("method", "simclr", f"{why}13.2 by DINO after 5 minutes, on photographs 61.2 and 57.3 after 20.")


def choose_preset(facts: Facts) -> Advice:
    gpu = f"{gb(facts.free)} are free on a GPU: the paper's network, of which steps were measured and no whole run."
    cpu = f"There is no CUDA here but {facts.cores} cores, which train a network of one block in minutes."
    return Advice("--preset", "gpu", gpu) if facts.gpu else Advice("--preset", "cpu", cpu)


def choose_minutes(facts: Facts) -> Advice:
    few = f"{facts.train:,} pictures are few: 300 scenes were measured with 2.5 minutes."
    if facts.minutes:
        return Advice("--minutes", float(facts.minutes), "They were asked for.")
    if facts.gpu:
        whole = 200 * facts.train / facts.rate / 60 if facts.rate else 60
        why = f"200 passes, as in the trainings others report, take {whole:,.0f} minutes; advised are 10 to 720."
        return Advice("--minutes", float(min(max(round(whole), 10), 720)), why)
    why = "Between 5 minutes, after which SimCLR had k-NN 76.5 ± 4.6 on our scenes, and 20, with 61.2 on photographs."
    return Advice("--minutes", 3.0, few) if facts.train < FEW else Advice("--minutes", 15.0, why)


def choose_sizes(facts: Facts, known: dict[str, Any]) -> Iterator[Advice]:
    """Pixels: the pictures', a view's, and if they are small a patch's and a small crop's."""
    kept, most, usual = min(known["image_size"], facts.middle), known["size"], known["encoder.patch_size"]
    why = f"Half of the pictures have {facts.middle} pixels or fewer on their short side; more would be made up."
    if kept < facts.middle:
        why = f"The preset's, of the {facts.middle} that half of the pictures have; views of {most} are cut from them."
    yield Advice("--image_size", kept, why)
    room, patch = min(kept, facts.smallest, most), usual
    while room // patch < 3 and patch > 4:
        patch //= 2
    size = room // patch * patch
    why = f"The preset's, {size // patch} x {size // patch} patches; the smallest picture has {facts.smallest} pixels."
    if size < most:
        why = f"The smallest picture has {facts.smallest} pixels, and {kept} are kept, where the preset wants {most}."
    yield Advice("--size", size, why)
    if patch < usual:
        why = f"Patches of {usual} would be {room // usual} a side, too few to have anything between them."
        yield Advice("--encoder.patch_size", patch, why)
    if known.get("local_crops") and size < most:
        small = max(2, round(known["local_size"] / most * size / patch)) * patch
        yield Advice("--local_size", small, f"{known['local_size']} of {most} pixels in the preset, of {size} here.")


def choose_crops(facts: Facts, known: dict[str, Any]) -> Advice:
    agree = f"quarters of one of these pictures agree by {facts.texture:.2f} (1: a texture)."
    if "scale" in known:
        why = f"The preset's for views of {known['size']} pixels, where the paper's begin at 0.08; {agree}"
        return Advice("--scale", known["scale"], why)
    if facts.gpu or facts.texture >= TEXTURE:
        return Advice("--global_scale", (0.4, 1.0), f"The paper's, whose crops show 0.4 of a picture or more; {agree}")
    why = "With crops from half a picture up k-NN on our scenes was 61.5, from a quarter up 40.1"
    return Advice("--global_scale", known["global_scale"], f"{why}; {agree}")


def choose_prototypes(facts: Facts) -> Advice:
    if facts.gpu:
        count = next((heads for most, heads in HEADS if facts.train <= most), 65_536)
        return Advice("--prototypes", count, f"What lightly-train, a library, takes for {facts.train:,} pictures.")
    count = 64
    while count < 256 and facts.train >= 2 * count * PER_PROTOTYPE:
        count *= 2
    why = f"{facts.train:,} pictures are {facts.train / count:.0f} a prototype; 10,000 scenes were 39, with k-NN 61.5"
    return Advice("--prototypes", count, f"{why}, and 54.7 with 64 prototypes.")


def no_teacher(facts: Facts) -> Advice:
    other = f"{choose_prototypes(facts).value} prototypes and a momentum of {preset('dino', facts)['momentum']:g}"
    return Advice("teacher", "none", f"SimCLR has none; --method dino would have one with {other}.")


def choose_momentum(usual: float, steps: int) -> Advice:
    """Of the teacher, which forgets a share of 1 - momentum of itself a step; half of that, as it climbs to 1."""
    momentum = round(max(0.5, min(usual, 1 - 10 / steps)), 3) if steps else usual
    left, worse = (math.exp(-(1 - m) / 2 * steps) for m in (momentum, usual))
    why = f"Over {steps:,} steps this leaves {left:.2%} of the random teacher it starts with"
    return Advice("--momentum", momentum, f"{why}, the preset's {usual:g} leaves {worse:.2%}.")


def choose_batch(facts: Facts, known: dict[str, Any]) -> Advice:
    usual = known["batch_size"]
    if facts.train < usual:
        count = 2 ** int(math.log2(facts.train))
        return Advice("--batch_size", count, f"The preset's {usual} are more than the {facts.train} pictures.")
    if facts.gpu:
        count = usual
        while count > 32 and WASTE * LEAST * count / usual > facts.free:
            count //= 2
        why = f"The preset's {usual} took {gb(WHOLE)} at 224 pixels, {gb(LEAST)} if blocks are computed twice"
        return Advice("--batch_size", count, f"{why}; {gb(facts.free)} are free.")
    why = f"A view is told from {2 * usual - 2} others, as in our runs, on 300 pictures and on 50,000."
    if "prototypes" in known:
        why = "On our scenes k-NN was 54.5, 48.8 and 40.0 with 64 a step, 38.0 and 45.5 with 128, 28.9 with 32."
    return Advice("--batch_size", usual, why)


def choose_thrift(facts: Facts, known: dict[str, Any], batch: int) -> Iterator[Advice]:
    """What a GPU needs whose memory is less than the preset takes."""
    usual, lr = known["batch_size"], known["lr"]
    if facts.gpu and WASTE * WHOLE * batch / usual > facts.free:
        yield Advice("--recompute", "true", f"It saves memory, of which {gb(facts.free)} are free.")
    if facts.gpu and batch != usual:
        yield Advice("--lr", lr * batch / usual, f"The paper's rule, which has {lr:g} for {usual} a step.")


def expect(facts: Facts, steps: int, batch: int, kept: int) -> Iterator[Advice]:
    """What the run will be, by the steps that were tried."""
    seen = steps * batch
    why = f"{seen:,} images at {facts.rate:,.0f} a second, as just tried, are {seen / facts.train:,.1f} passes"
    yield Advice("steps", f"{steps:,}", f"{why} over {facts.train:,} pictures.")
    pictures = (facts.train + facts.test) * 3 * kept**2
    why = f"{gb(pictures)} of pictures, and {gb(facts.took)} as just tried; {gb(facts.free)} are free."
    yield Advice("memory", gb(pictures + facts.took), why)


def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def cautions(facts: Facts) -> list[str]:
    """What no option mends, and the person should know, a sentence each."""
    most = preset(choose_method(facts).value, facts)["size"]
    minutes = choose_minutes(facts).value
    passes = 60 * minutes * facts.rate / facts.train
    told = {
        f"Files that cannot be read as pictures, and are left out: {facts.broken}.": facts.broken > 0,
        f"{facts.train:,} pictures are few: try released weights too, by --encoder.weights FILE.": facts.train < FEW,
        f"{facts.copies:.0%} nearly repeat another: keep one of each; k-NN finds the copies.": facts.copies > 0.05,
        f"Half have a thumbnail like another's (cosine {facts.alike:.2f}): what differs is small, and a view of {most} "
        "pixels may not show it.": facts.alike > 0.9,
        f"{passes:.1f} passes are few: for 100, as DINO's 89.6 took, {100 * minutes / max(passes, 1e-9):,.0f} minutes "
        "would do, or fewer if something else is running now.": 0 < passes < 5,
        f"{facts.grey:.0%} are grey: colour, half of what views usually change, says nothing.": facts.grey > 0.9,
        f"Half are {facts.aspect:.1f} times as long as wide, or more, and the middle square is kept, "
        f"{1 / facts.aspect:.0%} of such a picture: cut them into squares first.": facts.aspect > 1.8,
        f"19 of 20 have {facts.low} pixels or more: without smaller ones (down to {facts.smallest}) views could be "
        "larger.": facts.smallest < min(most, facts.low),
    }
    return [sentence for sentence, holds in told.items() if holds]


def command(facts: Facts, out: str) -> list[str]:
    """The words after `python -m minissl` that carry the advice out."""
    method, *found = advise(facts)
    pairs = [word for one in found if one.option.startswith("--") for word in (one.option, one.text)]
    return ["train", method.value, "--data", facts.data, *pairs, "--device", facts.device, "--out", out]


def table(facts: Facts, width: int = 100) -> str:
    """The advice in three columns, and what to beware of."""
    lines = []
    for one in advise(facts):
        head = f"{one.option:22}{one.text:12}"
        lines += textwrap.wrap(one.reason, width, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join([*lines, *(f"Beware: {sentence}" for sentence in cautions(facts))])
