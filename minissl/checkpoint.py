"""Nothing is lost: a checkpoint is one safetensors file, written whole or not at all.

It holds tensors and, in the file's header, plain JSON. Nothing is pickled, so a checkpoint from a stranger is only
numbers. A file appears under its name after it is complete on the disk, and replaces the last one in one move. It says
what its numbers add up to, so that damage is seen; a run keeps the one before it as well, and goes on from that.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from minissl import distribute, parallel
from minissl.errors import InputError

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one is."""
    return path.with_stem(path.stem + ".previous")


def there(path: Path) -> bool:
    """Whether there is a checkpoint, or one before it: a kill may have come just between the two moves of a save."""
    return path.exists() or previous(path).exists()


def make_folder(folder: Path) -> None:
    """Raises InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made ({error.strerror}); choose another --out.") from None


def keep_off(folder: Path) -> None:
    """Raises InputError for the folder of a run, whose own files would be written over."""
    if "run" in read_json(folder / "config.json"):
        raise InputError(f"{folder} holds a run, and its files would be written over; choose another place.")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, a folder is this run's; the system lets go of it when the process ends, however it ends.

    Raises InputError if another run has it. Of several processes the first holds it for all.
    """
    if parallel.rank():
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"Another training is at work in {folder}; wait for it, or choose another --out.") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, that a file cannot be written is said in one sentence. Raises InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise InputError(
                f"The disk is full: {path} was not written, and what was saved before is whole. "
                "Make room, and give the same command again; a training goes on with --resume."
            ) from None
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place for it.") from None


def write(path: Path, content: bytes, keep: bool = False) -> None:
    """Put a file in place atomically, and `keep` what stood there as the one before.

    At any moment one of the two is whole, even if what stood there was not. Raises InputError, see `writing`.
    """
    partial, second = (path.with_name(path.name + end) for end in (".partial", ".second"))
    with writing(path):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            keep = keep and path.exists()
            if keep:
                keep_as(path, second)
            os.replace(partial, path)
            if keep:
                os.replace(second, previous(path))
        except OSError:
            for left in (partial, second):
                with suppress(OSError):
                    left.unlink()
            raise


def keep_as(path: Path, other: Path) -> None:
    """A second name for a file, which stays where it is; on a disk that has no second names, a copy."""
    other.unlink(missing_ok=True)  # of a save that was killed
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def write_json(path: Path, content: Any) -> None:
    """JSON, indented, in place atomically."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote of a dict; {} if it is missing. Raises InputError if it is cut or is something else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError, RecursionError):
        raise damaged(path) from None


def damaged(path: Path) -> InputError:
    """What to say of a file that is there and holds something else than it should."""
    return InputError(f"{path} is damaged, or is not minissl's; put it right, or take it away.")


def checksum(tensors: dict[str, Tensor], info: dict[str, Any]) -> str:
    """The CRC-32 of all that a file holds: its info; of each tensor, on the CPU, its name, its kind and its bytes."""
    found = zlib.crc32(json.dumps(info).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        flat = x.as_strided((x.numel(),), (1,))  # torch calls a single number contiguous, whatever stride it has
        found = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), found)
        found = zlib.crc32(flat.view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any], keep: bool = False) -> None:
    """Tensors and JSON `info` in one safetensors file, in place atomically; `keep` as for `write`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    info = info | {"sum": checksum(tensors, info)}  # not beside it: the order of several entries is not always the same
    write(path, save(tensors, metadata={"minissl": json.dumps(info)}), keep)


def is_ours(path: Path) -> bool:
    """False for a file that is whole, as far as can be seen, and of someone else: then it is `official`'s to read."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return "minissl" in (file.metadata() or {})
    except SafetensorError:
        return True


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `info` of `save_tensors`. Raises InputError for a missing, cut, damaged or foreign file."""
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    try:
        content = path.read_bytes()  # once: a training may put another file in its place at any moment
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        info, tensors = dict(json.loads(header["__metadata__"]["minissl"])), load(content)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); delete it to start anew.") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        raise InputError(f"{path} is not a whole checkpoint of minissl; delete it to start anew.") from None
    said, _ = info.pop("sum", None), info.pop("crc32", None)  # older files have none, or one of the bytes alone
    if said is not None and said != checksum(tensors, info):
        raise InputError(f"{path} was damaged after it was written; delete it to start anew.")
    return tensors, info


def load_newest(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `load_tensors`, of a run's checkpoint; where that is broken or missing, of the one before it."""
    try:
        return load_tensors(path)
    except InputError as problem:
        if not previous(path).exists():
            raise
        found = load_tensors(previous(path))
        parallel.say(
            f"{str(problem).split(';')[0]}; going on from the checkpoint before it, of step {found[1].get('step')}."
        )
        return found


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
        save_tensors(path, tensors, info, keep=True)


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
    tensors, info = load_newest(path)
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
