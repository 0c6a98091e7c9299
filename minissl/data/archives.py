"""Download published archives completely, verify them, and unpack them atomically.

A download in progress is named NAME.partial, as is a folder that is being unpacked. Only a complete file with the right
checksum gets its final name, and an interrupted download is resumed. An archive or an unpacked folder that was put in
place by hand is used without a network connection.
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
TIMEOUT = 30  # seconds without a response


@dataclass(frozen=True)
class Archive:
    """A published archive.

    Attributes:
        address: URL.
        size: bytes.
        md5: checksum, in hexadecimal.
        folder: path it unpacks to, relative to the folder of downloads; the archive itself is next to it.
        files: MD5 checksums of files inside by name, as far as they are published.
    """

    address: str
    size: int
    md5: str
    folder: str
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file name."""
        return self.address.rsplit("/", 1)[-1]

    def file(self, root: Path) -> Path:
        """Return the path of the archive in a folder of downloads."""
        return (root / self.folder).with_name(self.name)

    def is_there(self, root: Path) -> bool:
        """Return whether the archive or its unpacked folder is present."""
        return (root / self.folder).is_dir() or self.file(root).is_file()


def choose_archive(archives: Sequence[Archive], root: Path) -> Archive:
    """Return the first of several alternative archives that is present; if none is, the first."""
    return next((archive for archive in archives if archive.is_there(root)), archives[0])


def fetch(archive: Archive, root: Path) -> Path:
    """Return the folder that an archive unpacks to, after downloading and unpacking it if it is missing.

    Raises:
        InputError: if the download fails (the message tells how to do it by hand), the file differs from the published
            one, or it cannot be unpacked.
    """
    folder, file = root / archive.folder, archive.file(root)
    if folder.is_dir():
        return folder
    if not file.is_file():
        download(archive, file)
    elif flaw := find_flaw(archive, file):
        raise InputError(f"{file} {flaw}; delete it, and run the same command again or {_by_hand(archive, file)}.")
    unpack(file, folder)
    return folder


def download(archive: Archive, file: Path) -> None:
    """Download an archive to `file`, resuming an interrupted download. Raises InputError, see `fetch`."""
    partial = file.with_name(file.name + ".partial")
    previous, received, reason = -1, _size(partial), "the server closed the connection"
    while previous < received < archive.size:  # retry as long as every attempt makes progress
        previous = received
        try:
            _get(archive, partial, received)
        except (OSError, HTTPException) as error:
            reason = _one_line(getattr(error, "reason", error))
            if isinstance(error, HTTPError):
                error.close()
        received = _size(partial)
    if not received:
        raise InputError(f"{archive.name} could not be downloaded ({reason}); {_by_hand(archive, file)}.")
    if received < archive.size:
        raise InputError(
            f"The download of {archive.name} stopped at {received:,} of {archive.size:,} bytes ({reason}); "
            f"run the same command again to resume it, or {_by_hand(archive, file)}."
        )
    if flaw := find_flaw(archive, partial):
        partial.unlink()
        raise InputError(f"The file from {archive.address} {flaw}; it was deleted. Try again, or ask its publisher.")
    partial.replace(file)


def find_flaw(archive: Archive, file: Path) -> str:
    """Return how a file differs from the published one, as the end of a sentence; "" if it does not."""
    if _size(file) != archive.size:
        return f"has {_size(file):,} bytes, but {archive.name} has {archive.size:,}"
    md5 = checksum(file)
    return "" if md5 == archive.md5 else f"has the MD5 checksum {md5}, but {archive.name} has {archive.md5}"


def checksum(file: Path) -> str:
    """Return the MD5 checksum of a file, in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def archive_member(archive: Archive, folder: Path, name: str) -> Path:
    """Return a file of an unpacked archive. Raises InputError if it is missing or its checksum is wrong."""
    file = folder / name
    if not file.is_file():
        raise InputError(f"{file} is missing; delete {folder} to unpack it again.")
    if name in archive.files and checksum(file) != archive.files[name]:
        raise InputError(f"{file} differs from the published file; delete {folder} to unpack it again.")
    return file


def unpack(file: Path, folder: Path) -> None:
    """Unpack the `folder` that an archive holds, completely or not at all.

    Raises:
        InputError: if the archive is damaged, or has members outside of the folder, links to the outside, or devices.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        with tarfile.open(file) as archive:
            archive.extractall(partial, filter="data")
        (partial / folder.name).replace(folder)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{file} cannot be unpacked ({_one_line(error)}); delete it, and download it again.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _get(archive: Archive, partial: Path, received: int) -> None:
    """Append the missing bytes to a file that has `received`; start again if the server does not support ranges."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    headers = {"User-Agent": "minissl"} | ({"Range": f"bytes={received}-"} if received else {})
    with urlopen(Request(archive.address, headers=headers), timeout=TIMEOUT) as response:
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {received}-")
        start = received if resumes else 0
        bar = tqdm(desc=archive.name, total=archive.size, initial=start, unit="B", unit_scale=True, leave=False)
        with open(partial, "ab" if resumes else "wb") as file, bar:
            while file.tell() <= archive.size and (block := response.read(BLOCK)):
                file.write(block)
                bar.update(len(block))


def _one_line(reason: object) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(reason).split()) or "no reason given"


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _by_hand(archive: Archive, file: Path) -> str:
    return f"download {archive.address} ({archive.size:,} bytes, MD5 {archive.md5}) by hand and put it at {file}"
