"""The folder of local copies of remote files: who writes a copy, who reads it, and which go when it is full.

A copy is written under its lock (`locked`), as a partial file beside it. Who reads one holds it (`hold`).
`Cache.make_room` drops nothing that is held or being written.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from msenc.types import MsencError

_KNOWN = re.compile(r"[0-9a-f]{16}-.+")
"""Names of copies whose content is known, unlike that of indexes: those that take room."""
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<bytes>\d+)\.partial")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """Where copies are kept, for as many processes as like.

    Args:
        folder: of the copies.
        max_bytes: that copies of shards may take together; None: no limit. Indexes are small, and not counted.
    """

    folder: Path
    max_bytes: int | None = None

    def make_room(self, partial: Path, num_bytes: int) -> None:
        """Drop copies until another fits: the longest unused first, none that a process reads or writes.

        Args:
            partial: the new copy's partial file, which is created: other processes count it from now on.
            num_bytes: the new copy's size.

        Raises:
            MsencError: it is larger than the whole cache may be, or the folder cannot be written.
        """
        if self.max_bytes is None:
            return
        if num_bytes > self.max_bytes:
            raise MsencError(
                f"paths.cache_max_bytes={self.max_bytes}: found a shard of {num_bytes} bytes, expected a limit that at "
                "least one fits in. Raise it, or set it to null for none (MSENC_CACHE_MAX_BYTES in the environment)."
            )
        with locked(self.folder / "room"):
            copies = sorted(copy for copy in self._copies() if copy[2] != partial)
            over = num_bytes + sum(size for _, size, _ in copies) - self.max_bytes
            for _, size, path in copies:
                if over > 0 and _drop(path):
                    over -= size
            partial.touch()
        if over > 0:
            _warn_once(
                f"{self.folder}: what is read or fetched at this moment takes {over} bytes more than "
                f"paths.cache_max_bytes={self.max_bytes}."
            )

    def _copies(self) -> Iterator[tuple[float, int, Path]]:
        """Last use, size and path of each copy, partial ones with the size they will have."""
        for place, _, names in os.walk(self.folder):
            for name in names:
                partial = _PARTIAL.fullmatch(name)
                if _KNOWN.fullmatch(partial["name"] if partial else name):
                    path = Path(place, name)
                    with suppress(FileNotFoundError):
                        facts = path.stat()
                        yield facts.st_mtime, int(partial["bytes"]) if partial else facts.st_size, path


def partial_of(copy: Path, num_bytes: int) -> Path:
    """The file that becomes a copy of this size."""
    return copy.with_name(f".{copy.name}.{num_bytes}.partial")


def hold(copy: Path) -> int | None:
    """Open a copy, which is not dropped while the descriptor is open; None where it was dropped already."""
    try:
        descriptor = os.open(copy, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a file system without locks, or a cache that others filled: what is open stays readable
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(copy)
    if os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return None
    return descriptor


def _drop(path: Path) -> bool:
    """Remove a copy that nobody reads, or a partial file whose process is gone; whether it was."""
    if partial := _PARTIAL.fullmatch(path.name):
        try:
            with FileLock(_lock_of(path.with_name(partial["name"])), timeout=0):
                path.unlink(missing_ok=True)
        except (OSError, Timeout):
            return False
        return True
    try:
        descriptor = os.open(path, os.O_RDWR)  # network file systems lock for writing what is open for it
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock_of(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.lock")


@contextmanager
def locked(copy: Path) -> Iterator[None]:
    """Let one process at a time write a copy.

    Raises:
        MsencError: its folder cannot be written.
    """
    lock = FileLock(_lock_of(copy))
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise unwritable(copy, error) from error
    try:
        yield
    finally:
        lock.release()


def unwritable(copy: Path, error: OSError) -> MsencError:
    """The refusal for a copy that the disk does not take."""
    return MsencError(
        f"{copy}: cannot be written ({error.strerror or error}). It is the local copy of data behind a URL. Free space "
        "or permissions there, or set another folder: paths.cache_dir=FOLDER, or MSENC_CACHE in the environment."
    )


@cache
def _warn_once(text: str) -> None:
    log.warning(text)
