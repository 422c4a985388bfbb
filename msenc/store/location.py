"""Locations of prepared data: a path, read in place, or a URL, read through a local cache.

data.dir -> locate -> Path or RemotePath -> read_text (dataset.json, index.json), fetch (shards)
"""

import errno
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock
from fsspec.callbacks import DEFAULT_CALLBACK, TqdmCallback

from msenc.files.kinds import check_name
from msenc.types import MsencError

LARGE_BYTES = 16 * 2**20
"""Files of this size and more are fetched with a progress bar."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemotePath:
    """A folder or file behind a URL. ``/`` joins names to it, and `read_text` reads it, as with a Path.

    Args:
        url: its address.
        copy: path of its copy in the cache.
        current: addresses of the files that were read since `locate`; all paths made from one share it.
    """

    url: str
    copy: Path
    current: set[str] = field(default_factory=set, repr=False, compare=False)

    def __truediv__(self, name: str) -> "RemotePath":
        check_name(name, f"{self.url}/")
        return RemotePath(f"{self.url}/{name}", self.copy / name, self.current)

    def __str__(self) -> str:
        return self.url

    def read_text(self, encoding: str = "utf-8") -> str:
        """The text of a file that may change: fetched anew by every process, once.

        If it cannot be fetched, an earlier copy is used, with a warning.

        Raises:
            FileNotFoundError: there is no such file.
            MsencError: it cannot be fetched, and no copy is in the cache.
        """
        if self.url not in self.current:
            with _lock(self.copy):
                try:
                    with _download(self.url, self.copy) as partial:
                        partial.replace(self.copy)
                except MsencError as error:
                    if not self.copy.is_file():
                        raise
                    when = datetime.fromtimestamp(self.copy.stat().st_mtime).isoformat(" ", "minutes")
                    log.warning("%s Using the copy of %s: %s", error, when, self.copy)
            self.current.add(self.url)
        return self.copy.read_text(encoding)

    def fetch(self, sha256: str, num_bytes: int, verify: bool = True) -> Path:
        """The local copy of a file with known content, fetched if it is missing or damaged.

        Processes that want the same file at the same time wait for the one that fetches it.

        Args:
            sha256: of its content; part of the copy's name, so that a file that was replaced is fetched anew.
            num_bytes: its size.
            verify: hash a copy that is there already; what is fetched is always hashed.

        Raises:
            MsencError: it does not exist, cannot be fetched or written, or is not what `sha256` says.
        """
        copy = self.copy.with_name(f"{sha256[:16]}-{self.copy.name}")
        if not _is_whole(copy, sha256, num_bytes, verify):
            with _lock(copy):
                if not _is_whole(copy, sha256, num_bytes, verify):
                    if copy.exists():
                        log.warning("%s: the copy in the cache is damaged; fetching %s again.", copy, self.url)
                    self._fetch(copy, sha256, num_bytes)
        return copy

    def _fetch(self, copy: Path, sha256: str, num_bytes: int) -> None:
        try:
            with _download(self.url, copy, num_bytes) as partial:
                found = partial.stat().st_size
                if hash_file(partial) != sha256:
                    what = f"{found} bytes" if found != num_bytes else "content that differs from its sha256"
                    raise MsencError(
                        f"{self.url}: found {what}, expected {num_bytes} bytes with the sha256 that the index names. "
                        "That folder was changed or copied incompletely: copy it again."
                    )
                partial.replace(copy)
        except FileNotFoundError as error:
            raise MsencError(
                f"{self.url}: no such file, though the index names it. That folder was copied incompletely: "
                "copy it again."
            ) from error


Place = Path | RemotePath
"""The location of a file or folder of prepared data."""


def is_url(place: str | Path) -> bool:
    """Whether a location is a URL, and not a path.

    Example:
        >>> is_url("s3://bucket/meld"), is_url("file:///mnt/meld"), is_url("data/meld")
        (True, True, False)
    """
    return "://" in str(place)


def locate(place: str | Path, cache_dir: str | Path) -> Place:
    """A location as the config gives it -> what reads from it; nothing is read yet.

    Args:
        place: a path, or a URL of any protocol that fsspec knows, ``file://`` included (a slow network disk is read
            through the cache that way).
        cache_dir: folder for local copies of remote files.

    Raises:
        MsencError: the URL's protocol is unknown, or needs a package that is not installed; the cache is a URL.
    """
    if not is_url(place):
        return Path(place)
    url = str(place).rstrip("/")
    system, path = _file_system(url)
    key = hashlib.sha256(system.unstrip_protocol(path).encode()).hexdigest()[:12]
    return RemotePath(url, local_folder(cache_dir, "paths.cache_dir") / f"{PurePosixPath(path).name}-{key}")


def local_folder(place: str | Path, key: str) -> Path:
    """A location that is written to, or that is not prepared data.

    Args:
        place: as the config gives it.
        key: its name in the config, for the message.

    Raises:
        MsencError: it is a URL.
    """
    if is_url(place):
        raise MsencError(
            f"{key}={place}: a URL, expected a local folder. Only prepared data is read from a URL, and "
            "nothing is written to one: prepare with data.dir=FOLDER, copy that folder to the URL, and train with "
            "data.dir=URL."
        )
    return Path(place)


def hash_file(path: Path) -> str:
    """A file's sha256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(copy: Path, sha256: str, num_bytes: int, verify: bool) -> bool:
    return copy.is_file() and copy.stat().st_size == num_bytes and (not verify or hash_file(copy) == sha256)


@contextmanager
def _download(url: str, copy: Path, num_bytes: int = 0) -> Iterator[Path]:
    """Fetch a file under a temporary name next to `copy`; it is removed unless renamed in the body."""
    partial = copy.with_name(f".{copy.name}.partial")
    system, path = _file_system(url)
    bar: dict[str, Any] = {"desc": copy.name, "unit": "B", "unit_scale": True, "disable": None}
    try:
        with TqdmCallback(tqdm_kwargs=bar) if num_bytes >= LARGE_BYTES else DEFAULT_CALLBACK as callback:
            system.get_file(path, str(partial), callback=callback)
    except FileNotFoundError:
        partial.unlink(missing_ok=True)
        raise
    except Exception as error:  # each protocol has its own error types
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise _unwritable(copy, error) from error
        raise MsencError(
            f"{url}: cannot be fetched ({type(error).__name__}: {error}). Check the address, the network and your "
            "access, then repeat the command: complete files are kept."
        ) from error
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _lock(copy: Path) -> Iterator[None]:
    """Let one process at a time write a copy."""
    lock = FileLock(copy.with_name(f".{copy.name}.lock"))
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unwritable(copy, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(copy: Path, error: OSError) -> MsencError:
    return MsencError(
        f"{copy}: cannot be written ({error.strerror or error}). It is the local copy of data behind a URL. Free space "
        "or permissions there, or set another folder: paths.cache_dir=FOLDER, or MSENC_CACHE in the environment."
    )


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # By default, downloads are aborted after five minutes even if they progress, and proxies are ignored.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extras = metadata("fsspec").get_all("Provides-Extra") or []
        package = f"'fsspec[{protocol}]'" if protocol in extras else getattr(error.__cause__ or error, "name", protocol)
        raise MsencError(
            f"{url}: the protocol {protocol!r} needs a package that is not installed ({error}). Install it: "
            f"pip install {package}"
        ) from error
    except ValueError as error:
        raise MsencError(
            f"{url}: cannot be used as a URL ({error}). Expected a path, or a URL such as s3://BUCKET/FOLDER, "
            "hf://datasets/OWNER/NAME, https://HOST/FOLDER or file:///FOLDER."
        ) from error
