"""Write checkpoints and other files atomically, and read them.

A checkpoint is one safetensors file. It holds tensors and, in the header, JSON. Nothing is pickled, so a checkpoint
from an unknown source cannot run code. A file appears under its name only when it is complete on the disk, and replaces
the previous one in one move. A checksum reveals damage. A run keeps its last two checkpoints; if the last one is
damaged, it continues from the one before.
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

from minissl import distributed
from minissl.errors import InputError

FORMAT_VERSION = 1  # of checkpoints, exported files and config.json; increased when an older minissl cannot read them
DISK_FULL_ERRORS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota


def previous_path(path: Path) -> Path:
    """Return the path of the checkpoint before the last one."""
    return path.with_stem(path.stem + ".previous")


def checkpoint_exists(path: Path) -> bool:
    """Return whether a checkpoint or the one before it exists; a kill during a save may leave the latter alone."""
    return path.exists() or previous_path(path).exists()


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises InputError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made ({error.strerror}); choose another --out.") from None


def refuse_run_dir(folder: Path) -> None:
    """Raise InputError if a folder is a run directory, whose own files would be overwritten."""
    if "run" in read_json(folder / "config.json"):
        raise InputError(f"{folder} holds a run, whose files would be overwritten; choose another place.")


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Lock a run directory for this training, inside a `with` block. The lock also ends if the process is killed.

    Of several processes the first holds the lock for all.

    Raises:
        InputError: if another training holds it, or the folder cannot be written.
    """
    if distributed.rank():
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"Another training is running in {folder}; wait for it, or choose another --out.") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Convert an OSError inside a `with` block, such as that of a full disk, to an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRORS:
            raise InputError(
                f"The disk is full: {path} was not written; what was saved before is complete. "
                "Free some space and give the same command again; a training continues with --resume."
            ) from None
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place for it.") from None


def write_atomic(path: Path, content: bytes, keep: bool = False) -> None:
    """Write a file atomically: at any moment either the old or the new file is complete.

    Args:
        path: the file.
        content: its bytes.
        keep: keep the file that is replaced, at `previous_path(path)`.

    Raises:
        InputError: if it cannot be written.
    """
    partial, second = (path.with_name(path.name + end) for end in (".partial", ".second"))
    with report_write_errors(path):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            keep = keep and path.exists()
            if keep:
                link_or_copy(path, second)
            os.replace(partial, path)
            if keep:
                os.replace(second, previous_path(path))
        except OSError:
            for left in (partial, second):
                with suppress(OSError):
                    left.unlink()
            raise


def link_or_copy(path: Path, other: Path) -> None:
    """Create a hard link to a file, or a copy where the file system has no links."""
    other.unlink(missing_ok=True)  # left by a save that was killed
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically. Raises InputError if it cannot be written."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing. Raises InputError if it is damaged or holds other JSON."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError, RecursionError):
        raise damaged_file_error(path) from None


def damaged_file_error(path: Path) -> InputError:
    """Return the error for a file whose content is not what it should be."""
    return InputError(f"{path} is damaged, or was not written by minissl; correct it, or delete it.")


def check_format_version(path: Path, version: Any) -> None:
    """Raise InputError for a file in a format that is newer than this minissl, or with a version that is no number."""
    if not isinstance(version, int):
        raise damaged_file_error(path)
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, and this minissl reads versions up to {FORMAT_VERSION}; "
            "install a newer minissl."
        )


def checksum(tensors: dict[str, Tensor], info: dict[str, Any]) -> str:
    """Return the CRC-32 of `info` and of each tensor's name, dtype, shape and bytes, as 8 hexadecimal digits.

    Args:
        tensors: by name, on the CPU.
        info: values that JSON can hold.
    """
    crc = zlib.crc32(json.dumps(info).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        flat = x.as_strided((x.numel(),), (1,))  # torch calls a single number contiguous, whatever its stride
        crc = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), crc)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any], keep: bool = False) -> None:
    """Write tensors and JSON `info` to one safetensors file, atomically; `keep` as for `write_atomic`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    info = info | {"format_version": FORMAT_VERSION}
    info["sum"] = checksum(tensors, info)
    write_atomic(path, save(tensors, metadata={"minissl": json.dumps(info)}), keep)


def is_minissl_file(path: Path) -> bool:
    """Return whether `load_tensors` should read a file: a safetensors file of minissl, or one that is damaged.

    False is for files of another suffix and for intact files of other programs, which `hub.official` may read.
    """
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return "minissl" in (file.metadata() or {})
    except SafetensorError:
        return True


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the `info` of a file of `save_tensors`.

    Raises:
        InputError: if the file is missing, cut off, damaged, not written by minissl, or of a newer format.
    """
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    try:
        content = path.read_bytes()  # once: a training may replace the file at any moment
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        info, tensors = dict(json.loads(header["__metadata__"]["minissl"])), load(content)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); delete it to start anew.") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        raise InputError(f"{path} is not a complete checkpoint of minissl; delete it to start anew.") from None
    check_format_version(path, info.get("format_version", FORMAT_VERSION))
    stored_checksum = info.pop("sum", None)
    if stored_checksum is not None and stored_checksum != checksum(tensors, info):
        raise InputError(f"{path} was damaged after it was written; delete it to start anew.")
    info.pop("format_version", None)
    return tensors, info


def load_latest_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a run's checkpoint as `load_tensors` does; if it is damaged or missing, the one before it.

    Raises:
        InputError: if neither can be loaded.
    """
    try:
        return load_tensors(path)
    except InputError as error:
        if not previous_path(path).exists():
            raise
        tensors, info = load_tensors(previous_path(path))
        problem = str(error).split(";")[0]
        distributed.print_once(f"{problem}; continuing from the checkpoint before it, of step {info.get('step')}.")
        return tensors, info


def save_training_state(path: Path, method: nn.Module, optimizer: torch.optim.Optimizer, info: dict[str, Any]) -> None:
    """Write the state of method and optimizer, and `info` ("step"). All processes take part; the first writes.

    Tensors are called "method.NAME" and "optimizer.INDEX.NAME", with the index of a parameter in the optimizer.

    Raises:
        InputError: if the file cannot be written, or a weight is not finite (a finite loss can have an infinite
            gradient); nothing is written then.
    """
    if not all(t.isfinite().all() for t in method.state_dict().values()):
        raise InputError(
            f"The weights are not finite at step {info['step']}; the last checkpoint is from before. "
            "Start again with a lower --lr, or with --precision fp32."
        )
    tensors = {f"method.{name}": t for name, t in method.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in distributed.gather_full(state).items()}
    if distributed.rank() == 0:
        save_tensors(path, tensors, info, keep=True)


def load_optimizer_state(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state from the tensors that `load_method_state` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, index, key = name.split(".")
        states.setdefault(int(index), {})[key] = distributed.shard_like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def load_method_state(path: Path, method: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a method's state from a checkpoint, in place.

    Returns:
        The tensors of the optimizer, called "optimizer.INDEX.NAME", and `info`.

    Raises:
        InputError: if the checkpoint is missing or damaged, or of another method or encoder.
    """
    tensors, info = load_latest_tensors(path)
    state = {name.removeprefix("method."): t for name, t in tensors.items() if name.startswith("method.")}
    try:
        method.load_state_dict(state)
    except RuntimeError:
        raise InputError(f"{path} holds another method or another encoder; choose another --out.") from None
    return {name: t for name, t in tensors.items() if name.startswith("optimizer.")}, info


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raise InputError if the disk of a folder has less than `num_bytes` of free space."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"The disk of {folder} has {free / 1e6:.0f} MB left, and the run needs {num_bytes / 1e6:.0f} MB; "
            "free some space, or choose another --out."
        )
