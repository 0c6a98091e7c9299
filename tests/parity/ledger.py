"""The ledger of comparisons: which function is compared with which reference, and how much the two may differ.

A comparison is a function of `RandomInputs`. It samples inputs of random shapes and returns two sides, each a function
without arguments: the actual one calls minissl, the expected one calls a library or a loop that follows the formula.
The sides run separately, so that a test can check which code runs in each.

Two tensors differ by max |actual - expected| / max |expected|, two sides by the largest difference of their tensors. A
tensor with non-finite values, or of zeros only, proves nothing and is refused. If a comparison names differentiable
inputs, the outputs, each weighted by a fixed cosine, are summed and differentiated on both sides. The gradients are
compared like the outputs.
"""

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import minissl

PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32}
DISTRIBUTIONS = {"open_clip": "open_clip_torch", "skimage": "scikit-image", "sklearn": "scikit-learn"}  # of a module
GOLDEN = "authors' numbers"  # output of the authors' code, measured once; the same for every seed
UNVERSIONED = ("explicit loop", "formula", GOLDEN)
PACKAGE_DIR = str(Path(minissl.__file__).parent)


class RandomInputs:
    """Random inputs of one seed in one precision."""

    def __init__(self, seed: int, precision: str):
        self.seed = seed
        self.dtype = PRECISIONS[precision]
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Sample an integer from low to high, both included."""
        return self.random.randint(low, high)

    def number(self, low: float, high: float) -> float:
        """Sample a float from low to high."""
        return self.random.uniform(low, high)

    def choice(self, *options: Any) -> Any:
        """Sample one of the options."""
        return self.random.choice(options)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Sample normal numbers with mean 0 and standard deviation `scale`."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).mul(scale).to(self.dtype)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Sample normal numbers that require a gradient."""
        return self.normal(*shape, scale=scale).requires_grad_()

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Sample uniform numbers."""
        numbers = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return numbers.to(self.dtype)

    def integers(self, *shape: int, below: int) -> Tensor:
        """Sample int64 from 0 to `below` - 1."""
        return torch.randint(below, shape, generator=self.generator)

    def mask(self, *shape: int, fraction: float = 0.5) -> Tensor:
        """Sample booleans, True with probability `fraction`."""
        return torch.rand(shape, generator=self.generator) < fraction

    def pixels(self, *shape: int) -> Tensor:
        """Sample uint8."""
        return self.integers(*shape, below=256).to(torch.uint8)

    def randomize(self, module: torch.nn.Module, scale: float = 0.3) -> Any:
        """Sample all parameters of a module, in this precision; initial values of 0 or 1 would hide errors."""
        module.to(self.dtype)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(self.normal(*p.shape, scale=scale if p.ndim < 2 else p[0].numel() ** -0.5))
                p.add_(1.0 if p.ndim == 1 and "bias" not in name else 0.0)
        return module


class Sides(NamedTuple):
    """Two functions without arguments that return a tensor, a number, or several of them.

    Args:
        actual: calls minissl.
        expected: calls the reference.
        inputs: tensors by which the outputs of both sides are differentiated; without any, only outputs are compared.
    """

    actual: Callable[[], Any]
    expected: Callable[[], Any]
    inputs: Sequence[Tensor] = ()


class Outputs(NamedTuple):
    """Outputs and gradients of both sides for one seed."""

    actual: list[Tensor]
    expected: list[Tensor]
    backward: bool

    def difference(self) -> float:
        """Return the largest relative difference.

        Raises:
            ValueError: if the outputs cannot be compared, or would prove nothing.
        """
        if not self.actual or len(self.actual) != len(self.expected):
            raise ValueError(f"cannot compare {len(self.actual)} tensors with {len(self.expected)}")
        return max(_relative_difference(*pair) for pair in zip(self.actual, self.expected))


class Comparison(NamedTuple):
    """One entry of the ledger.

    Args:
        what: what is compared, in a few words.
        reference: a library, by the name of its module; pillow; or one of `UNVERSIONED`.
        tested: functions and classes of minissl that the actual side has to call.
        tolerance: largest difference by precision.
        slow: whether it imports one of the large libraries.
        sides: the decorated function.
    """

    what: str
    reference: str
    tested: tuple[Any, ...]
    tolerance: dict[str, float]
    slow: bool
    sides: Callable[[RandomInputs], Sides]

    @property
    def name(self) -> str:
        return f"{self.what}, {self.reference}"

    def run(self, seed: int, precision: str, context: Callable[[], Any] = contextlib.nullcontext) -> Outputs:
        """Compute both sides for one seed. `context` is entered around each side and around nothing else."""
        state = random.getstate()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            random.seed(seed)
            sides = self.sides(RandomInputs(seed, precision))
            results = []
            for side in (sides.actual, sides.expected):
                with context():
                    outputs = _flatten(side())
                results.append(outputs + _gradients(outputs, sides.inputs))
        random.setstate(state)
        return Outputs(*results, bool(sides.inputs))

    def versioned_reference(self) -> str:
        """Return the reference, with its version if it is a library."""
        if self.reference in UNVERSIONED:
            return self.reference
        distribution = DISTRIBUTIONS.get(self.reference, self.reference)
        return f"{distribution} {version(distribution)}"


COMPARISONS: dict[str, Comparison] = {}


def comparison(
    what: str,
    reference: str,
    *tested: Any,
    fp64: float | None = 1e-10,
    fp32: float | None = None,
    slow: bool = False,
) -> Callable[[Callable[[RandomInputs], Sides]], Callable[[RandomInputs], Sides]]:
    """Decorate a function of `RandomInputs`, to enter it into the ledger.

    Args:
        what, reference, tested, slow: as for `Comparison`.
        fp64, fp32: tolerance in this precision; None does not compare in it.
    """
    tolerance = {name: value for name, value in (("fp64", fp64), ("fp32", fp32)) if value is not None}

    def enter(sides: Callable[[RandomInputs], Sides]) -> Callable[[RandomInputs], Sides]:
        entry = Comparison(what, reference, tested, tolerance, slow, sides)
        if entry.name in COMPARISONS:
            raise ValueError(f"{entry.name} is in the ledger already")
        COMPARISONS[entry.name] = entry
        return sides

    return enter


def _flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, (list, tuple)):
        return [tensor for part in outputs for tensor in _flatten(part)]
    return [torch.as_tensor(outputs, dtype=None if isinstance(outputs, Tensor) else torch.float64)]


def _gradients(outputs: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    if not inputs:
        return []
    weights = [torch.cos(torch.arange(o.numel(), dtype=o.dtype) + 0.5).view_as(o) for o in outputs]
    return list(torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights)), inputs))


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"cannot compare the shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
    scale = expected.abs().max() if expected.numel() else torch.tensor(0.0)
    if not (actual.isfinite().all() and expected.isfinite().all() and scale > 0 and actual.any()):
        raise ValueError("tensors that are not finite, or 0 everywhere, prove nothing")
    return float((actual - expected).abs().max() / scale)


@contextlib.contextmanager
def trace_package() -> Iterator[set[Any]]:
    """Collect the code objects of minissl that run inside."""
    codes: set[Any] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE_DIR):
            codes.add(frame.f_code)

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield codes
    finally:
        sys.setprofile(previous)


def code_objects(tested: Any) -> set[Any]:
    """Return the code objects of a function, or of all methods of a class."""
    parts = vars(tested).values() if inspect.isclass(tested) else [tested]
    return {code for part in parts if (code := getattr(inspect.unwrap(part), "__code__", None))}


def measure(entry: Comparison, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the row of `data/recorded/parity.json` for a comparison over some seeds."""
    seeds = seeds[:1] if entry.reference == GOLDEN else seeds
    runs = {precision: [entry.run(seed, precision) for seed in seeds] for precision in entry.tolerance}
    return {
        "name": entry.name,
        "what": entry.what,
        "functions": [tested.__qualname__ for tested in entry.tested],
        "reference": entry.versioned_reference(),
        "backward": any(outputs.backward for by_seed in runs.values() for outputs in by_seed),
        "tolerance": entry.tolerance,
        "difference": {name: max(outputs.difference() for outputs in by_seed) for name, by_seed in runs.items()},
    }


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the recorded rows as a Markdown table."""
    lines = [
        "| comparison | reference | gradients | fp64: difference (tolerance) | fp32: difference (tolerance) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["what"], row["reference"], "yes" if row["backward"] else ""]
        for precision in PRECISIONS:
            cell = ""
            if precision in row["tolerance"]:
                cell = f"{row['difference'][precision]:.0e} ({row['tolerance'][precision]:.0e})".replace("0e+00", "0")
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
