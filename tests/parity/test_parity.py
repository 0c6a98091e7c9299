"""Every comparison of the ledger holds and is no empty word; it names what we have, and the README says how it went."""

import contextlib
import importlib
import inspect
import json
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minissl import evaluate, methods
from tests import parity
from tests.parity.__main__ import RECORD
from tests.parity.ledger import GOLDEN, Comparison, Draw, Seen, Sides, codes_of, table, watched

COMPARISONS = parity.everything()
every = pytest.mark.parametrize(
    "comparison",
    [pytest.param(c, marks=[pytest.mark.slow] if c.slow else [], id=name) for name, c in COMPARISONS.items()],
)
ROOMS = "balance color heads masking optim patches positions teacher text transformer vit".split()
ROOMS += [f"methods.{module.name}" for module in pkgutil.iter_modules(methods.__path__)]
IN_FLOAT32 = {"iBOT's loss of hidden patches, a loop"}  # ours, in part, whatever the precision of the rest
NOT_COMPARED = {  # and why
    "check_hides": "refuses an encoder",
    "freeze": "sets flags",
    "CLIP": "puts together what is compared; likewise the five below",
    "DINO": "",
    "DINOv2": "",
    "DINOv3": "",
    "Pretext": "",
    "SimCLR": "",
    "Transfer": "torch's cross-entropy of a linear layer",
    "symbols": "of the tokenizer",
    "merge": "of the tokenizer",
    "Stretch": "numbers by name; likewise the next",
    "Turn": "",
    "spare_encoder": "forgets gradients",
    "copy_buffers": "copies",
    "hide": "runs in the whole masked autoencoder",
    "hide_in_some": "draws which; its counts are tested in `tests/test_masking.py`",
    "DropPath": "chance; its share and its mean are tested in `tests/test_vit.py`",
    "mix": "a part of the Lab that is compared",
    "vit": "a ViT by its name",
    "few": "draws rows",
    "few_labels": "trainings, of parts that are compared; likewise the next",
    "fine_tune": "",
    "what_survives": "asks the linear probe",
}


@every
@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_ours_is_theirs(comparison, seed):
    for precision, most in comparison.allowed.items():
        assert comparison.see(seed, precision).difference() <= most


@every
def test_a_planted_error_is_seen(comparison):
    """One part in a thousand, in each of the tensors alone."""
    precision, most = next(iter(comparison.allowed.items()))
    seen = comparison.see(1, precision)
    for i, tensor in enumerate(seen.ours):
        wrong = [*seen.ours[:i], tensor * 1.001, *seen.ours[i + 1 :]]
        assert Seen(wrong, seen.theirs, seen.backward).difference() > most


@every
def test_the_two_sides_are_two(comparison):
    """Ours runs all that is named, theirs runs nothing of minissl, and another seed is another case."""
    ran = []

    @contextlib.contextmanager
    def watch():
        with watched() as codes:
            ran.append(codes)
            yield

    precision = next(iter(comparison.allowed))
    seen, (ours, theirs) = comparison.see(1, precision, watch), ran
    assert [held.__qualname__ for held in comparison.holds if not codes_of(held) & ours] == []
    assert theirs == set()
    others = (comparison.see(seed, precision).ours for seed in range(2, 5))
    assert comparison.against == GOLDEN or not all(alike(seen.ours, other) for other in others)


def alike(some, others):
    return [x.shape for x in some] == [x.shape for x in others] and all(map(torch.equal, some, others))


def one(ours, theirs, inputs=()):
    """A comparison of two functions of nothing."""
    return Comparison("", "", (), {"fp64": 1e-10}, False, lambda draw: Sides(ours, theirs, inputs))


@pytest.mark.parametrize("ours", [torch.zeros(2), torch.tensor([1.0, torch.nan]), torch.ones(3), torch.ones(2, 1)])
def test_what_shows_nothing_is_refused(ours):
    with pytest.raises(ValueError, match=r"nothing|held against"):
        one(lambda: ours, lambda: torch.ones(2)).see(0, "fp64").difference()


def test_values_and_gradients_are_measured():
    x = Draw(0, "fp64").free(3)
    assert one(lambda: x.sin(), lambda: x.sin(), [x]).see(0, "fp64").difference() == 0
    assert one(lambda: 3.0, lambda: 4.0).see(0, "fp64").difference() == pytest.approx(0.25)
    moved = one(lambda: 2 * x - x.detach(), lambda: x * 1, [x]).see(0, "fp64")
    assert [len(moved.ours), len(moved.theirs)] == [2, 2]
    assert moved.difference() == pytest.approx(1.0)  # the values are equal, the gradients are twice as large


def test_another_side_that_runs_ours_is_seen():
    with watched() as codes:
        evaluate.spread(torch.ones(2, 2))
    assert codes == codes_of(evaluate.spread)


def test_there_are_many_and_losses_and_networks_are_close():
    files = {module.name for module in pkgutil.iter_modules(parity.__path__)}
    assert files - set(parity.MODULES) == {"__main__", "ledger", "test_parity"}
    assert len(COMPARISONS) >= 40
    for name, comparison in COMPARISONS.items():
        if comparison.sides.__module__.split(".")[-1] in ("losses", "heads", "networks", "towers", "official"):
            assert comparison.allowed.get("fp64", 0) <= (1e-6 if name in IN_FLOAT32 else 1e-10), name
            assert comparison.allowed.get("fp32", 0) <= 1e-5, name


def ours():
    """What minissl has to compute with, by name: functions and classes of its rooms, and what evaluates."""
    found = {name: getattr(evaluate, name) for name in evaluate.__all__}
    for room in ROOMS:
        module = importlib.import_module(f"minissl.{room}")
        for name, thing in vars(module).items():
            if inspect.isroutine(thing) or inspect.isclass(thing):
                own = getattr(thing, "__module__", "") == module.__name__ and not name.startswith("_")
                found |= {name: thing} if own else {}
    return found


def test_whatever_computes_is_in_the_ledger_or_it_is_said_why_not():
    held = {h.__qualname__.split(".")[0] for c in COMPARISONS.values() for h in c.holds}
    assert sorted(ours().keys() - held - NOT_COMPARED.keys()) == []
    assert sorted(NOT_COMPARED.keys() - ours().keys()) == []
    assert sorted(NOT_COMPARED.keys() & held) == []


def test_the_readme_says_what_was_recorded():
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    assert {row["name"]: row["allowed"] for row in rows} == {name: c.allowed for name, c in COMPARISONS.items()}
    assert all(row["largest"][precision] <= most for row in rows for precision, most in row["allowed"].items())
    assert table(rows) in (RECORD.parents[2] / "README.md").read_text(encoding="utf-8")
