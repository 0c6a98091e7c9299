"""The ledger: what of ours is held against what of others, and how far apart the two are.

A comparison is a function of a `Draw`: it makes inputs of random shapes and gives two sides, ours and theirs, each a
function of nothing. The sides run apart, so that it can be seen that ours runs what the comparison names, and that
theirs runs nothing of minissl: the other side is a library, or a loop that follows the formula.

Two tensors differ by max |ours - theirs| / max |theirs|, two sides by the largest of their tensors' differences. A
tensor that is not finite, or 0 throughout, shows nothing and is refused. Where there are inputs that want a gradient,
the sum of the outputs, each weighted by a fixed wave, is differentiated on both sides, and its gradients are tensors to
compare like the others.
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
PACKAGES = {"open_clip": "open_clip_torch", "skimage": "scikit-image", "sklearn": "scikit-learn"}  # import, install
GOLDEN = "the authors' numbers"  # measured once, whatever the seed
PLAIN = ("a loop", "the formula", GOLDEN)  # of no library, and so of no version
PACKAGE = str(Path(minissl.__file__).parent)


class Draw:
    """Random numbers of one seed, in one precision."""

    def __init__(self, seed: int, precision: str):
        self.seed, self.dtype = seed, PRECISIONS[precision]
        self.chance, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def whole(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return self.chance.randint(low, high)

    def real(self, low: float, high: float) -> float:
        return self.chance.uniform(low, high)

    def one_of(self, *choices: Any) -> Any:
        return self.chance.choice(choices)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).mul(scale).to(self.dtype)

    def free(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers that want a gradient."""
        return self.normal(*shape, scale=scale).requires_grad_()

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        found = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return found.to(self.dtype)

    def numbers(self, *shape: int, below: int) -> Tensor:
        """int64, from 0."""
        return torch.randint(below, shape, generator=self.generator)

    def mask(self, *shape: int, share: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def bytes(self, *shape: int) -> Tensor:
        return self.numbers(*shape, below=256).to(torch.uint8)

    def shake(self, module: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
        """Random weights everywhere, in this precision: what starts at 0 or 1 would hide mistakes."""
        module.to(self.dtype)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(self.normal(*p.shape, scale=scale if p.ndim < 2 else p[0].numel() ** -0.5))
                p.add_(1.0 if p.ndim == 1 and "bias" not in name else 0.0)
        return module


class Sides(NamedTuple):
    """Two functions of nothing to a tensor, a number, or several of them, and what both are differentiated by."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    inputs: Sequence[Tensor] = ()


class Seen(NamedTuple):
    """What a comparison gave for one seed."""

    ours: list[Tensor]
    theirs: list[Tensor]
    backward: bool

    def difference(self) -> float:
        """See above. Raises ValueError for what cannot be compared, or would show nothing."""
        if not self.ours or len(self.ours) != len(self.theirs):
            raise ValueError(f"{len(self.ours)} tensors cannot be held against {len(self.theirs)}")
        return max(_apart(*pair) for pair in zip(self.ours, self.theirs))


class Comparison(NamedTuple):
    """What is compared, whose the other side is, which of our functions or classes run, and how far apart they may be.

    Args:
        what: in a few words.
        against: a library by the name it is imported by, pillow, or one of `PLAIN`.
        holds: our functions and classes.
        allowed: precision -> difference.
        slow: whether it loads one of the large libraries.
        sides: the function that was decorated.
    """

    what: str
    against: str
    holds: tuple[Any, ...]
    allowed: dict[str, float]
    slow: bool
    sides: Callable[[Draw], Sides]

    @property
    def name(self) -> str:
        return f"{self.what}, {self.against}"

    def see(self, seed: int, precision: str, watch: Callable[[], Any] = contextlib.nullcontext) -> Seen:
        """Both sides for one seed; `watch` is entered around each of them and around nothing else."""
        state = random.getstate()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            random.seed(seed)
            sides = self.sides(Draw(seed, precision))
            found = []
            for side in (sides.ours, sides.theirs):
                with watch():
                    outputs = _tensors(side())
                found.append(outputs + _gradients(outputs, sides.inputs))
        random.setstate(state)
        return Seen(*found, bool(sides.inputs))

    def library(self) -> str:
        """Whose the other side is, with its version where there is one."""
        if self.against in PLAIN:
            return self.against
        name = PACKAGES.get(self.against, self.against)
        return f"{name} {version(name)}"


COMPARISONS: dict[str, Comparison] = {}


def compared(
    what: str,
    against: str,
    *holds: Any,
    fp64: float | None = 1e-10,
    fp32: float | None = None,
    slow: bool = False,
) -> Callable[[Callable[[Draw], Sides]], Callable[[Draw], Sides]]:
    """Enter a function of a draw into the ledger; for the arguments see `Comparison`."""
    allowed = {name: most for name, most in (("fp64", fp64), ("fp32", fp32)) if most is not None}

    def enter(sides: Callable[[Draw], Sides]) -> Callable[[Draw], Sides]:
        comparison = Comparison(what, against, holds, allowed, slow, sides)
        if comparison.name in COMPARISONS:
            raise ValueError(f"{comparison.name} is in the ledger already")
        COMPARISONS[comparison.name] = comparison
        return sides

    return enter


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, (list, tuple)):
        return [tensor for part in found for tensor in _tensors(part)]
    return [torch.as_tensor(found, dtype=None if isinstance(found, Tensor) else torch.float64)]


def _gradients(outputs: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    if not inputs:
        return []
    waves = [torch.cos(torch.arange(o.numel(), dtype=o.dtype) + 0.5).view_as(o) for o in outputs]
    return list(torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, waves)), inputs))


def _apart(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape:
        raise ValueError(f"{tuple(ours.shape)} cannot be held against {tuple(theirs.shape)}")
    size = theirs.abs().max() if theirs.numel() else torch.tensor(0.0)
    if not (ours.isfinite().all() and theirs.isfinite().all() and size > 0 and ours.any()):
        raise ValueError("what is not finite, or 0 throughout, shows nothing")
    return float((ours - theirs).abs().max() / size)


@contextlib.contextmanager
def watched() -> Iterator[set[Any]]:
    """The code objects of minissl that run inside."""
    codes: set[Any] = set()

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            codes.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield codes
    finally:
        sys.setprofile(before)


def codes_of(held: Any) -> set[Any]:
    """The code objects of a function, or of a class's methods."""
    parts = vars(held).values() if inspect.isclass(held) else [held]
    return {code for part in parts if (code := getattr(inspect.unwrap(part), "__code__", None))}


def row(comparison: Comparison, seeds: Sequence[int]) -> dict[str, Any]:
    """What is recorded of a comparison over some seeds."""
    seeds = seeds[:1] if comparison.against == GOLDEN else seeds
    found = {name: [comparison.see(seed, name) for seed in seeds] for name in comparison.allowed}
    return {
        "name": comparison.name,
        "what": comparison.what,
        "ours": [held.__qualname__ for held in comparison.holds],
        "against": comparison.library(),
        "backward": any(seen.backward for every in found.values() for seen in every),
        "allowed": comparison.allowed,
        "largest": {name: max(seen.difference() for seen in every) for name, every in found.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The recorded rows in Markdown."""
    lines = [
        "| what | held against | gradients too | fp64: largest (allowed) | fp32: the same |",
        "|---|---|---|---|---|",
    ]
    for one in rows:
        cells = [one["what"], one["against"], "yes" if one["backward"] else ""]
        for name in PRECISIONS:
            there, largest = name in one["allowed"], one["largest"].get(name)
            cells.append(f"{largest:.0e} ({one['allowed'][name]:.0e})".replace("0e+00", "0") if there else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
