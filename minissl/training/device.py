"""Choose the device and the precision, and measure or save memory."""

import os
import shutil
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from minissl.errors import InputError
from minissl.methods.base import Method
from minissl.training.config import Precision


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return a device by its name; without a name cuda, mps or cpu, the first that is available.

    Raises:
        InputError: if the device is unknown, or not available on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = None if device is None else str(device)
    kind = (name or next(kind for kind, yes in available.items() if yes)).split(":")[0]
    if kind not in available:
        raise InputError(f"--device {name} is unknown; choose cuda, mps or cpu.")
    if not available[kind]:
        raise InputError(f"--device {name} is not available to this PyTorch; leave --device out, or use --device cpu.")
    try:
        chosen = torch.device(name or kind)
    except RuntimeError:
        raise InputError(f"--device {name} is unknown; choose cuda, cuda:1, mps or cpu.") from None
    if kind == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name} does not exist; this machine has {torch.cuda.device_count()}, from cuda:0.")
    return chosen


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """Resolve the precision "auto": bf16 on GPUs and CPUs with instructions for it, else fp32; others are returned."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    fast = device.type == "cpu" and (features.get("avx512_bf16") or features.get("amx_bf16"))
    return "bf16" if fast else "fp32"


def memory_used(device: torch.device) -> int:
    """Return memory in bytes: the peak of tensors on a CUDA device so far, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def fits_on_device(num_bytes: int, device: torch.device) -> bool:
    """Return whether `num_bytes` of data are less than half of a CUDA device's free memory; True for other devices."""
    return device.type != "cuda" or num_bytes < torch.cuda.mem_get_info(device)[0] / 2


def transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of every transformer in a module: the children of each submodule list called `blocks`."""
    for part in module.modules():
        blocks = part._modules.get("blocks")
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            yield from blocks


def enable_activation_checkpointing(module: nn.Module) -> None:
    """Enable activation checkpointing, in place: each transformer block is recomputed in the backward pass."""
    for block in transformer_blocks(module):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_encoders(method: Method) -> None:
    """Compile every encoder of a method with torch.compile, a teacher's as well, at its first forward pass.

    On a CPU only the transformer blocks are compiled: PyTorch's compiler does not know the memory layout in which the
    gradient of a convolution is returned there.
    """
    encoders = [m for m in method.modules() if isinstance(m, type(method.encoder))]
    on_cpu = next(method.parameters()).device.type == "cpu"
    for module in {block for m in encoders for block in transformer_blocks(m)} if on_cpu else encoders:
        module.compile()


def check_compile(method: Method) -> None:
    """Raise InputError if a method on a CPU cannot be compiled: without a C++ compiler, or without a transformer."""
    if next(method.parameters()).device.type != "cpu":
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")):
        raise InputError("--compile true needs a C++ compiler on a CPU, such as g++; install one, or leave it out.")
    if not any(transformer_blocks(method.encoder)):
        raise InputError(
            "--compile true compiles the blocks of a ViT on a CPU; this encoder has none, so leave it out."
        )


class PeakMemory(TorchDispatchMode):
    """Count the bytes of all tensors created inside a `with` block; fake tensors count like real ones.

    With FakeTensorMode it predicts the memory of a training on a device that is not present. The allocator's overhead
    and the kernels' workspace are not counted: 20 to 40 % more on a CPU.

    Attributes:
        current: bytes held now.
        peak: the largest number of bytes held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._sizes:
                storage = x.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._free, storage._cdata)
        return outputs

    def _free(self, key: int) -> None:
        self.current -= self._sizes.pop(key)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that a clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
