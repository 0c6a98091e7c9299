"""The machine: which device, which precision, and what a run will take on it."""

import weakref
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from minissl.errors import InputError


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, else cuda, else mps, else cpu. Raises InputError if it is unknown or absent."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = (name or next(kind for kind, yes in there.items() if yes)).split(":")[0]
    if kind not in there:
        raise InputError(f"There is no device {name!r}; choose cuda, mps or cpu.")
    if not there[kind]:
        raise InputError(f"This machine's PyTorch sees no {kind} device; leave --device out, or use --device cpu.")
    try:
        device = torch.device(name or kind)
    except RuntimeError:
        raise InputError(f"There is no device {name!r}; choose cuda, cuda:1, mps or cpu.") from None
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"There is no device {name!r}; there are {torch.cuda.device_count()}, from cuda:0 on.")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """What "auto" means here: bf16 where the hardware multiplies it, fp32 where bf16 would be slow or unknown."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities()
    return "bf16" if device.type == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16")) else "fp32"


def memory_used(device: torch.device) -> int:
    """Bytes: the peak of the GPU's tensors, or what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of data can stay on the device and leave half of what is free to the training."""
    return device.type != "cuda" or size < torch.cuda.mem_get_info(device)[0] / 2


def recompute(method: nn.Module) -> None:
    """Let each block of each transformer keep its input alone, and be computed again when its gradient is asked for."""
    for module in method.modules():
        for block in getattr(module, "blocks", ()):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_encoders(method: nn.Module) -> None:
    """Let torch.compile make kernels of each encoder when it is first asked; of a teacher's as well."""
    for module in [m for m in method.modules() if isinstance(m, type(method.encoder))]:
        module.compile()


class Peak(TorchDispatchMode):
    """Inside, `most` becomes the largest number of bytes that tensors made here held at once; fake ones count as real.

    With FakeTensorMode it says what a training takes on a device that is not there. What an allocator wastes, and what
    kernels need for themselves, comes on top: a fifth to two fifths on a CPU.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        found = call(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.held:
                storage = x.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return found

    def _gone(self, key: int) -> None:
        self.now -= self.held.pop(key)


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was given, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Plan:
    """What a run will take, measured on a few steps before it starts."""

    steps: int
    seconds_per_step: float
    memory: int  # bytes

    def __str__(self) -> str:
        minutes = self.steps * self.seconds_per_step / 60
        return f"{self.steps} steps in about {minutes:.1f} minutes, {self.memory / 1e9:.1f} GB of memory"
