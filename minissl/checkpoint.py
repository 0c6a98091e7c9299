"""Nothing is lost: a checkpoint is one safetensors file, written whole or not at all.

It holds tensors and, in the file's header, plain JSON. Nothing is pickled, so a checkpoint from a stranger is only
numbers. A file appears under its name after it is complete on the disk, and replaces the last one in one move.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minissl import distribute, parallel
from minissl.errors import InputError


def write(path: Path, content: bytes) -> None:
    """Put a file in place atomically. Raises InputError on a full disk; what stood there before is still whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT if hasattr(errno, "EDQUOT") else errno.ENOSPC):
            raise InputError(f"The disk is full: {path} was not written, and what was saved before is whole.") from None
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another --out.") from None


def write_json(path: Path, content: Any) -> None:
    """JSON, indented, in place atomically."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Tensors and JSON `info` in one safetensors file, in place atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write(path, save(tensors, metadata={"minissl": json.dumps(info)}))


def is_ours(path: Path) -> bool:
    """False for a file that is whole, as far as can be seen, and of someone else: then it is `official`'s to read."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return "minissl" in (file.metadata() or {})
    except SafetensorError:
        return True


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `info` of `save_tensors`. Raises InputError for a missing, cut or foreign file."""
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            info = json.loads((file.metadata() or {})["minissl"])
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118, it is no dict
    except (SafetensorError, KeyError, ValueError):
        raise InputError(f"{path} is not a whole checkpoint of minissl; delete it to start anew.") from None


def save_training(path: Path, method: nn.Module, optimizer: torch.optim.Optimizer, info: dict[str, Any]) -> None:
    """Everything a run is: the method's state, the optimiser's, and `info` (the step it stands at).

    Of several processes all have to call it, and the first writes. Raises InputError, and writes nothing, if the method
    holds what is no number: a finite loss can have a gradient that is not.
    """
    if not all(t.isfinite().all() for t in method.state_dict().values()):
        raise InputError(
            f"The weights are no longer numbers at step {info['step']}; the last checkpoint is from before. "
            "Start again with a lower --lr, or with --precision fp32."
        )
    tensors = {f"method.{name}": t for name, t in method.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in distribute.whole(state).items()}
    if parallel.rank() == 0:
        save_tensors(path, tensors, info)


def load_optimizer(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put the moments back, by the names `load_method` returned them by."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, index, key = name.split(".")
        states.setdefault(int(index), {})[key] = distribute.part_as(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def load_method(path: Path, method: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put a method back as `save_training` left it. Returns the tensors of its optimiser, and `info`.

    Raises InputError if the checkpoint is of another method.
    """
    tensors, info = load_tensors(path)
    state = {name.removeprefix("method."): t for name, t in tensors.items() if name.startswith("method.")}
    try:
        method.load_state_dict(state)
    except RuntimeError:
        raise InputError(f"{path} holds another method or another encoder; choose another --out.") from None
    return {name: t for name, t in tensors.items() if name.startswith("optimizer.")}, info


def need_space(folder: Path, size: int) -> None:
    """Raises InputError if `size` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"The disk of {folder} has {free / 1e6:.0f} MB left and the run needs {size / 1e6:.0f} MB.")
