"""Every comparison of the ledger holds, can fail, and tests what it names; every function that computes is compared."""

import contextlib
import importlib
import inspect
import json
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minissl import evaluation, methods
from tests import parity
from tests.parity.__main__ import RECORD
from tests.parity.ledger import (
    GOLDEN,
    Comparison,
    Outputs,
    RandomInputs,
    Sides,
    code_objects,
    markdown_table,
    trace_package,
)

COMPARISONS = parity.load_comparisons()
each_comparison = pytest.mark.parametrize(
    "entry",
    [pytest.param(c, marks=[pytest.mark.slow] if c.slow else [], id=name) for name, c in COMPARISONS.items()],
)
MODULES = [f"data.transforms.{name}" for name in ("lab_color", "masking")]
MODULES += [f"models.{name}" for name in "ema heads layers position_encoding text_encoder tokenizer vit".split()]
MODULES += [f"methods.{m.name}" for m in pkgutil.iter_modules(methods.__path__) if m.name not in ("base", "registry")]
MODULES += ["training.optimizers", "training.schedules"]
COMPUTED_IN_FLOAT32 = {"iBOT patch loss, explicit loop"}  # in part, whatever the precision of the inputs
COMBINES = "combines functions and networks that are compared"
NOT_COMPARED = {  # name: reason
    **dict.fromkeys(("CLIP", "DINO", "DINOv2", "DINOv3", "SimCLR"), COMBINES),
    "Transfer": "cross-entropy of torch on a linear layer",
    "cosine_similarities": "compared inside nt_xent and clip_loss",
    "freeze_encoder": "sets flags",
    "update_teacher": "calls EMATeacher.update for each network",
    "num_prototypes_by_head": "reads sizes",
    "copy_buffers": "copies",
    "zero_encoder_grads": "clears gradients",
    "random_masking": "runs in the comparison of MAE",
    "sample_block_masks": "random; its counts are tested in test_masking.py",
    "DropPath": "random; its rate and mean are tested in test_vit.py",
    "RopeAngles": "a tuple",
    "RopeAugmentation": "a tuple",
    "byte_symbols": "runs in the comparison of the tokenizer",
    "merge_pair": "runs in the comparison of the tokenizer",
    "vit": "builds a ViT by name",
    "accuracy": "mean of equal labels",
    "pixel_labels": "rearranges masks and labels",
    "collapse_type": "compares numbers with thresholds",
    "sample_per_class": "samples indices",
    **dict.fromkeys(("quick_evaluation", "evaluate_encoder", "evaluate_attention", "evaluate_patches"), COMBINES),
    **dict.fromkeys(("evaluate_zero_shot", "few_shot_accuracy", "probe_augmentations"), COMBINES),
    **dict.fromkeys(("image_embeddings", "image_text_similarity"), COMBINES),
}


@each_comparison
@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_both_sides_agree(entry, seed):
    for precision, tolerance in entry.tolerance.items():
        assert entry.run(seed, precision).difference() <= tolerance


@each_comparison
def test_a_planted_error_of_one_in_a_thousand_is_detected(entry):
    """In each of the tensors alone."""
    precision, tolerance = next(iter(entry.tolerance.items()))
    outputs = entry.run(1, precision)
    for i, tensor in enumerate(outputs.actual):
        wrong = [*outputs.actual[:i], tensor * 1.001, *outputs.actual[i + 1 :]]
        assert Outputs(wrong, outputs.expected, outputs.backward).difference() > tolerance


@each_comparison
def test_the_two_sides_are_independent(entry):
    """The actual side runs all that is named, the expected side nothing of minissl; another seed is another case."""
    codes = []

    @contextlib.contextmanager
    def trace():
        with trace_package() as ran:
            codes.append(ran)
            yield

    precision = next(iter(entry.tolerance))
    outputs = entry.run(1, precision, trace)
    actual, expected = codes
    assert [tested.__qualname__ for tested in entry.tested if not code_objects(tested) & actual] == []
    assert expected == set()
    if entry.reference != GOLDEN:
        assert not all(equal(outputs.actual, entry.run(seed, precision).actual) for seed in range(2, 5))


def equal(tensors, others):
    return [x.shape for x in tensors] == [x.shape for x in others] and all(map(torch.equal, tensors, others))


def make_comparison(actual, expected, inputs=()):
    return Comparison("", "", (), {"fp64": 1e-10}, False, lambda rng: Sides(actual, expected, inputs))


@pytest.mark.parametrize("actual", [torch.zeros(2), torch.tensor([1.0, torch.nan]), torch.ones(3), torch.ones(2, 1)])
def test_tensors_that_prove_nothing_are_refused(actual):
    with pytest.raises(ValueError, match=r"prove nothing|cannot compare"):
        make_comparison(lambda: actual, lambda: torch.ones(2)).run(0, "fp64").difference()


def test_values_and_gradients_are_compared():
    x = RandomInputs(0, "fp64").leaf(3)
    assert make_comparison(lambda: x.sin(), lambda: x.sin(), [x]).run(0, "fp64").difference() == 0
    assert make_comparison(lambda: 3.0, lambda: 4.0).run(0, "fp64").difference() == pytest.approx(0.25)
    outputs = make_comparison(lambda: 2 * x - x.detach(), lambda: x * 1, [x]).run(0, "fp64")
    assert [len(outputs.actual), len(outputs.expected)] == [2, 2]
    assert outputs.difference() == pytest.approx(1.0)  # the values are equal, the gradients are twice as large


def test_a_call_of_the_package_is_traced():
    with trace_package() as codes:
        evaluation.feature_std(torch.ones(2, 2))
    assert codes == code_objects(evaluation.feature_std)


def test_there_are_many_comparisons_and_losses_and_networks_have_tight_tolerances():
    files = {module.name for module in pkgutil.iter_modules(parity.__path__)}
    assert files - set(parity.MODULES) == {"__main__", "ledger", "test_parity"}
    assert len(COMPARISONS) >= 113
    for name, entry in COMPARISONS.items():
        if entry.sides.__module__.split(".")[-1] in ("losses", "heads", "networks", "towers", "official"):
            assert entry.tolerance.get("fp64", 0) <= (1e-6 if name in COMPUTED_IN_FLOAT32 else 1e-10), name
            assert entry.tolerance.get("fp32", 0) <= 1e-5, name


def public_names():
    """Return the names of all functions and classes of `MODULES`, and of what `minissl.evaluation` hands on."""
    names = set(evaluation.__all__)
    for path in MODULES:
        module = importlib.import_module(f"minissl.{path}")
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", "") == module.__name__
            if (inspect.isroutine(value) or inspect.isclass(value)) and defined_here and not name.startswith("_"):
                names.add(name)
    return names


def test_every_function_that_computes_is_compared_or_has_a_reason():
    names = public_names()
    compared = {tested.__qualname__.split(".")[0] for entry in COMPARISONS.values() for tested in entry.tested}
    assert sorted(names - compared - NOT_COMPARED.keys()) == []
    assert sorted(NOT_COMPARED.keys() - names) == []
    assert sorted(NOT_COMPARED.keys() & compared) == []


def test_the_documentation_has_the_recorded_table():
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    assert {row["name"]: row["tolerance"] for row in rows} == {name: c.tolerance for name, c in COMPARISONS.items()}
    assert all(row["difference"][precision] <= most for row in rows for precision, most in row["tolerance"].items())
    root = RECORD.parents[2]
    pages = [root / "README.md", *root.glob("docs/**/*.md")]
    assert any(markdown_table(rows) in page.read_text(encoding="utf-8") for page in pages)
