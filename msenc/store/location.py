"""Locations of prepared data: a path, read in place, or a URL, read through a local cache.

data.dir -> locate -> Path or RemotePath -> read_text (dataset.json, index.json), fetch (shards)
"""

import errno
import hashlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.callbacks import DEFAULT_CALLBACK, TqdmCallback

from msenc.files import check_regular
from msenc.files.kinds import check_name
from msenc.store.cache import Cache, hold, locked, partial_of, unwritable
from msenc.types import MsencError

LARGE_BYTES = 16 * 2**20
"""Files of this size and more are fetched with a progress bar."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of msenc that brings what it needs."""

WAITS_S = (1.0, 4.0)
"""Seconds before each further try to fetch a file, beyond those of the protocol's own library."""

_SECRET = re.compile(
    r"[\w.+-]+://([^/\s@]*:(?!\d+(/|$))\S*@|\S*[?&][\w-]*(sig|token|key|secret|password|credential)[\w-]*=)",
    re.IGNORECASE,
)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemotePath:
    """A folder or file behind a URL. ``/`` joins names to it, and `read_text` reads it, as with a Path.

    Args:
        url: its address.
        copy: path of its copy in the cache.
        cache: holds the copies.
        current: addresses of the files that were read since `locate`; all paths made from one share it.
    """

    url: str
    copy: Path
    cache: Cache
    current: set[str] = field(default_factory=set, repr=False, compare=False)

    def __truediv__(self, name: str) -> "RemotePath":
        check_name(name, f"{self.url}/")
        return RemotePath(f"{self.url}/{name}", self.copy / name, self.cache, self.current)

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
            with locked(self.copy):
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
            with locked(copy):
                if not _is_whole(copy, sha256, num_bytes, verify):
                    if copy.exists():
                        log.warning("%s: the copy in the cache is damaged; fetching %s again.", copy, self.url)
                    self._fetch(copy, sha256, num_bytes)
        return copy

    def open(self, sha256: str, num_bytes: int, verify: bool = True) -> int:
        """A descriptor of `fetch`'s copy, which the cache keeps while it is open.

        Raises:
            MsencError: as `fetch`.
        """
        while (descriptor := hold(self.fetch(sha256, num_bytes, verify))) is None:
            pass  # another process needed its room, and took it before this one held it
        return descriptor

    def _fetch(self, copy: Path, sha256: str, num_bytes: int) -> None:
        try:
            with _download(self.url, copy, num_bytes, self.cache) as partial:
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


def has_secret(text: str) -> bool:
    """Whether a URL has a password, key or token in it.

    Example:
        >>> [has_secret(t) for t in ("s3://key:a/b+c@bucket/meld", "https://host/meld?X-Amz-Signature=0a")]
        [True, True]
        >>> [has_secret(t) for t in ("s3://bucket/meld", "http://host:9000/a@b", "hf://datasets/a/b@main", "a:b@c")]
        [False, False, False, False]
    """
    return _SECRET.match(text) is not None


def locate(place: str | Path, cache_dir: str | Path, cache_max_bytes: int | None = None) -> Place:
    """A location as the config gives it -> what reads from it; nothing is read yet.

    Args:
        place: a path, or a URL of any protocol that fsspec knows, ``file://`` included (a slow network disk is read
            through the cache that way).
        cache_dir: folder for local copies of remote files.
        cache_max_bytes: that the copies of shards may take together; None: no limit.

    Raises:
        MsencError: the URL's protocol is unknown, or needs a package that is not installed; the cache is a URL.
    """
    if not is_url(place):
        return Path(place)
    url = str(place).rstrip("/")
    system, path = _file_system(url)
    key = hashlib.sha256(system.unstrip_protocol(path).encode()).hexdigest()[:12]
    cache = Cache(local_folder(cache_dir, "paths.cache_dir"), cache_max_bytes)
    return RemotePath(url, cache.folder / f"{PurePosixPath(path).name}-{key}", cache)


def local_folder(place: str | Path, key: str) -> Path:
    """A location that is written to, or that is not prepared data.

    Args:
        place: as the config gives it.
        key: its name in the config, for the message.

    Raises:
        MsencError: it is a URL.
    """
    if is_url(place):
        raise MsencError(f"{key}={place}: a URL, expected a local folder. {_reason(key)}")
    return Path(place)


def _reason(key: str) -> str:
    """Why what a key names cannot lie behind a URL, and what to do instead."""
    if key in ("runs_dir", "paths.runs_dir", "paths.output_dir", "hydra.sweep.dir", "out"):
        return (
            "A run's files are locked, appended to and renamed, and object storage can do none of these. Write runs to "
            "a local or shared folder, and copy it afterwards: aws s3 sync FOLDER URL (docs/storage.md)."
        )
    return (
        "Only prepared data is read from a URL, and nothing is written to one: prepare with data.dir=FOLDER, copy that "
        "folder to the URL, and train with data.dir=URL (docs/storage.md)."
    )


def hash_file(path: Path) -> str:
    """A file's sha256, in hexadecimal digits."""
    with check_regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(copy: Path, sha256: str, num_bytes: int, verify: bool) -> bool:
    return copy.is_file() and copy.stat().st_size == num_bytes and (not verify or hash_file(copy) == sha256)


@contextmanager
def _download(url: str, copy: Path, num_bytes: int = 0, cache: Cache | None = None) -> Iterator[Path]:
    """Fetch a file as a partial one next to `copy`, which is removed unless renamed in the body."""
    partial = partial_of(copy, num_bytes)
    system, path = _file_system(url)
    bar: dict[str, Any] = {"desc": copy.name, "unit": "B", "unit_scale": True, "disable": None}
    try:
        if cache is not None:
            cache.make_room(partial, num_bytes)
        for wait in (*WAITS_S, None):
            try:
                with TqdmCallback(tqdm_kwargs=bar) if num_bytes >= LARGE_BYTES else DEFAULT_CALLBACK as callback:
                    system.get_file(path, str(partial), callback=callback)
                break
            except FileNotFoundError:
                raise
            except Exception as error:  # each protocol has its own error types
                if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                    raise unwritable(copy, error) from error
                if wait is None or _is_lasting(error):
                    raise MsencError(
                        f"{url}: cannot be fetched ({_said(error)}). Check the address, the network and your access, "
                        "then repeat the command: complete files are kept."
                    ) from error
                log.info("%s: %s; trying again.", url, _said(error))
                time.sleep(wait)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _is_lasting(error: Exception) -> bool:
    """Whether another try would end the same way: access is refused, or the request is wrong."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, PermissionError) or "Credentials" in type(error).__name__


def _said(error: Exception) -> str:
    """An error in one line. An address in it may be that of a proxy or an endpoint, with a password."""
    text = re.sub(r"://[^/\s@]*:\S*@", "://***@", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:297]}...'}"


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
        if protocol in EXTRAS:
            package = f"-e '.[{EXTRAS[protocol]}]'"
        raise MsencError(
            f"{url}: the protocol {protocol!r} needs a package that is not installed ({error}). Install it: "
            f"pip install {package}"
        ) from error
    except ValueError as error:
        raise MsencError(
            f"{url}: cannot be used as a URL ({error}). Expected a path, or a URL such as s3://BUCKET/FOLDER, "
            "hf://datasets/OWNER/NAME, https://HOST/FOLDER or file:///FOLDER."
        ) from error
