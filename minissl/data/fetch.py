"""Files that somebody publishes: brought here whole, checked, and unpacked in one move.

A file on its way is called NAME.partial, and so is a folder that is being unpacked: only what is whole and has the
right checksum gets its name, and what a cut left behind is gone on with. An archive or an unpacked folder that a person
put in its place by hand is used, and needs no network.
"""

import hashlib
import shutil
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from minissl.errors import InputError

BLOCK = 1 << 20  # bytes read at a time
PATIENCE = 30  # seconds without an answer


@dataclass(frozen=True)
class Archive:
    """A published file and what identifies it.

    Attributes:
        address: where it is published.
        size: bytes.
        md5: checksum, in hexadecimal.
        folder: what it unpacks to, under the folder of downloads; the archive itself lies beside.
        files: checksums of files inside, by name, where they are published too.
    """

    address: str
    size: int
    md5: str
    folder: str
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]

    def file(self, root: Path) -> Path:
        return (root / self.folder).with_name(self.name)

    def is_there(self, root: Path) -> bool:
        """Whether it can be used without a network."""
        return (root / self.folder).is_dir() or self.file(root).is_file()


def choose(archives: Sequence[Archive], root: Path) -> Archive:
    """Of archives that would do, the first that is there; else the first."""
    return next((archive for archive in archives if archive.is_there(root)), archives[0])


def fetch(archive: Archive, root: Path) -> Path:
    """The folder an archive unpacks to, downloaded and unpacked if it is not there.

    Raises:
        InputError: if the download fails, saying how to do it by hand; for a file that is cut or another than the
            published one, and for one that cannot be unpacked.
    """
    folder, file = root / archive.folder, archive.file(root)
    if folder.is_dir():
        return folder
    if not file.is_file():
        download(archive, file)
    elif wrong := flaw(archive, file):
        raise InputError(f"{file} {wrong}; delete it, and run the same command again or {_by_hand(archive, file)}.")
    unpack(file, folder)
    return folder


def download(archive: Archive, file: Path) -> None:
    """Bring an archive to `file`, going on from where an earlier try was cut. Raises InputError, see `fetch`."""
    partial = file.with_name(file.name + ".partial")
    before, have, reason = -1, _size(partial), "the server sent no more"
    while before < have < archive.size:  # as long as every try brings something
        before = have
        try:
            _get(archive, partial, have)
        except (OSError, HTTPException) as error:
            reason = _line(getattr(error, "reason", error))
            if isinstance(error, HTTPError):
                error.close()
        have = _size(partial)
    if not have:
        raise InputError(f"{archive.name} could not be downloaded ({reason}); {_by_hand(archive, file)}.")
    if have < archive.size:
        raise InputError(
            f"The download of {archive.name} stopped at {have:,} of {archive.size:,} bytes ({reason}); "
            f"run the same command again to go on from there, or {_by_hand(archive, file)}."
        )
    if wrong := flaw(archive, partial):
        partial.unlink()
        raise InputError(f"What {archive.address} sent {wrong}; it was thrown away. Try again, or ask whoever runs it.")
    partial.replace(file)


def flaw(archive: Archive, file: Path) -> str:
    """What tells a file from the published one, as the end of a sentence; empty if nothing does."""
    if _size(file) != archive.size:
        return f"has {_size(file):,} bytes, and {archive.name} has {archive.size:,}"
    found = checksum(file)
    return "" if found == archive.md5 else f"has the md5 {found}, and {archive.name} has {archive.md5}"


def checksum(file: Path) -> str:
    """The md5 of a file, in hexadecimal."""
    total = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def inside(archive: Archive, folder: Path, name: str) -> Path:
    """A file of an unpacked archive. Raises InputError if it is missing, or is not as published where that is known."""
    file = folder / name
    if not file.is_file():
        raise InputError(f"{file} is missing; delete {folder} to have it unpacked again.")
    if name in archive.files and checksum(file) != archive.files[name]:
        raise InputError(f"{file} is not as published; delete {folder} to have it unpacked again.")
    return file


def unpack(file: Path, folder: Path) -> None:
    """Unpack the `folder` that an archive holds: all of it or nothing. Raises InputError.

    Members that would land outside, links to the outside and devices are refused.
    """
    workplace = folder.with_name(folder.name + ".partial")
    shutil.rmtree(workplace, ignore_errors=True)  # of a process that was killed
    try:
        with tarfile.open(file) as archive:
            archive.extractall(workplace, filter="data")
        (workplace / folder.name).replace(folder)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{file} cannot be unpacked ({_line(error)}); nothing of it was kept.") from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _get(archive: Archive, partial: Path, have: int) -> None:
    """Append what is missing to a file that has `have` bytes; start it anew where the server cannot go on."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    headers = {"User-Agent": "minissl"} | ({"Range": f"bytes={have}-"} if have else {})
    with urlopen(Request(archive.address, headers=headers), timeout=PATIENCE) as answer:
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if goes_on else 0
        bar = tqdm(desc=archive.name, total=archive.size, initial=start, unit="B", unit_scale=True, leave=False)
        with open(partial, "ab" if goes_on else "wb") as file, bar:
            while file.tell() <= archive.size and (block := answer.read(BLOCK)):
                file.write(block)
                bar.update(len(block))


def _line(reason: object) -> str:
    """What others say is wrong, on one line."""
    return " ".join(str(reason).split()) or "no reason was given"


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _by_hand(archive: Archive, file: Path) -> str:
    return f"fetch {archive.address} ({archive.size:,} bytes, md5 {archive.md5}) by hand and put it at {file}"
