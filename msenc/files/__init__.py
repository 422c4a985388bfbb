"""Atomic file writes; JSON and CSV, read with clear errors; hashes of plain values."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from msenc.files.kinds import MisfitError, check, short
from msenc.types import MsencError


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {short(text)} is too large")
    return number


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON knows")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):  # by default, json silently keeps the last one
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {short(twice)} stands there twice")
    return table


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_unique)
_FAST_DECODER, _FAST_ENCODER = msgspec.json.Decoder(), msgspec.json.Encoder()


def _escapes(start: str, text: str) -> bool:
    return "\\" in text and start in text  # one letter is found in a tenth of the time that two take


def _decode(text: str) -> Any:
    """What `_DECODER` makes of a text or refuses, in a third of its time where nothing is wrong."""
    try:
        value = _FAST_DECODER.decode(text)  # knows no NaN, no infinity and no half of a surrogate pair
        # A key that stands there twice is there once when written again; a quote in a text stays one, except \u0022.
        if not _escapes("\\u", text) and text.count('"') == _FAST_ENCODER.encode(value).count(b'"'):
            return value
    except (msgspec.MsgspecError, OverflowError, RecursionError, UnicodeEncodeError):
        pass  # of what is wrong, json names the place
    return _DECODER.decode(text)


def check_regular(path: Path) -> Path:
    """The path, unless a pipe or a device is there, of which reading would wait for ever, or not end.

    Raises:
        OSError: it is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a folder's own error says what it is
        raise OSError(errno.EINVAL, "found a pipe or a device, expected a file")
    return path


def read_text(path: Any, advice: str = "") -> str:
    """Read a text file, unchanged.

    Args:
        path: of the file, or a `store.location.RemotePath`.
        advice: what to do if it cannot be read, for the message.

    Raises:
        MsencError: it is missing, not a regular file, not readable, or not UTF-8.
    """
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file():  # reading a pipe would block
            raise MsencError(f"{path}: cannot be read (found a folder or device, expected a file). {advice}".rstrip())
        return path.read_bytes().decode() if isinstance(path, Path) else path.read_text()  # line ends unchanged
    except FileNotFoundError as e:
        raise MsencError(f"{path}: missing. {advice}".rstrip()) from e
    except (OSError, ValueError) as e:
        raise MsencError(f"{path}: cannot be read ({reason_of(e)}). {advice}".rstrip()) from e


def parse_json(text: str | bytes, where: object, kind: Any = Any, advice: str = "", version: int | None = None) -> Any:
    """The value of a JSON text, of a kind that `msenc.files.kinds` describes.

    Args:
        text: in UTF-8.
        where: its location, for messages.
        kind: the expected kind.
        advice: what to do about it, for messages.
        version: the expected ``schema_version``, if it has one.

    Raises:
        MsencError: it is not valid JSON (which has no NaN), of another version, a key occurs twice, or a value in it
            is of another kind.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = _decode(text)
        if version is not None and (found := value.get("schema_version") if type(value) is dict else None) != version:
            raise MsencError(f"{where}: found schema version {short(found)}, expected {version}. {advice}".rstrip())
        if _escapes("\\ud", text) or _escapes("\\uD", text):  # half a surrogate pair could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise MsencError(f"{where}: cannot be read as JSON ({reason_of(e)}). {advice}".rstrip()) from e
    return hold(value, kind, where, advice)


def hold(value: Any, kind: Any, where: object, advice: str = "") -> Any:
    """The value, if it is of the kind.

    Raises:
        MsencError: it is not; names the place.
    """
    try:
        check(value, kind)
    except MisfitError as misfit:
        raise MsencError(f"{where}{', ' if misfit.place else ': '}{misfit}. {advice}".rstrip()) from misfit
    return value


def read_json(path: Any, kind: Any = Any, advice: str = "", version: int | None = None) -> Any:
    """A JSON file's value; see `read_text` and `parse_json`.

    Raises:
        MsencError: it is missing, not JSON, or not of the kind; names the place in it.
    """
    return parse_json(read_text(path, advice), path, kind, advice, version)


def read_json_lines(path: Any, kind: Any = Any, advice: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a file with a JSON text in each line, each with the file and line where it stands.

    Raises:
        MsencError: as `read_json`; names the line.
    """
    # not splitlines(): words may hold what it takes for an end, as U+2028
    for number, line in enumerate(read_text(path, advice).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, kind, advice)


def parse_csv(text: str, where: object, columns: Sequence[str], advice: str = "") -> list[dict[str, str]]:
    """The rows of a CSV file that has exactly these columns.

    Raises:
        MsencError: it has another header, or a row of another length; names the row.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        for number, row in enumerate(reader):
            if (number == 0 and row != list(columns)) or len(row) != len(columns):
                raise MsencError(
                    f"{where}, row {reader.line_num}: found {short(','.join(row))}, expected "
                    f"{'the header' if number == 0 else 'values of'} {','.join(columns)}. {advice}".rstrip()
                )
            rows.append(dict(zip(columns, row, strict=True)))
    except csv.Error as e:
        raise MsencError(f"{where}, row {reader.line_num}: cannot be read as CSV ({e}). {advice}".rstrip()) from e
    if not rows:
        raise MsencError(f"{where}: is empty, expected the header {','.join(columns)}. {advice}".rstrip())
    return rows[1:]


def parse_table(
    text: str, where: object, columns: Sequence[str], optional: Sequence[str], advice: str = ""
) -> list[tuple[str, dict[str, str]]]:
    r"""The rows of a user's CSV file, each with the file and row where it stands; its columns may be in any order.

    Raises:
        MsencError: a column is missing, unknown or there twice, or a row has another length; names the row.

    Example:
        >>> parse_table("b,a\n1,2\n", "t.csv", ["a", "b"], ["c"])
        [('t.csv, row 2', {'b': '1', 'a': '2'})]
    """
    expected = f"expected the columns {','.join(columns)}" + (f" and perhaps {','.join(optional)}" if optional else "")
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    rows: list[tuple[str, dict[str, str]]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        if not set(columns) <= set(header) <= {*columns, *optional} or len(set(header)) < len(header):
            found = short(",".join(header)) if header else "nothing"
            raise MsencError(f"{where}, row 1: found {found}, {expected}. {advice}".rstrip())
        for row in reader:
            place = f"{where}, row {reader.line_num}"
            if row and len(row) != len(header):
                raise MsencError(f"{place}: found {len(row)} values, expected {len(header)}, as in the header.")
            if any(value.strip() for value in row):
                rows.append((place, dict(zip(header, row, strict=True))))
    except csv.Error as e:
        raise MsencError(f"{where}, row {reader.line_num}: cannot be read as CSV ({e}). {advice}".rstrip()) from e
    return rows


def reason_of(error: Exception) -> str:
    """An error's text in one line; what Python says of nesting names the interpreter's limits."""
    if isinstance(error, RecursionError):
        return "too many lists and objects in each other"
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(known_to_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def known_to_json(value: Any) -> Any:
    """Plain values with null for NaN and infinity, which JSON does not have.

    Example:
        >>> known_to_json({"loss": [0.5, math.nan], "steps": 3})
        {'loss': [0.5, None], 'steps': 3}
    """
    if isinstance(value, Mapping):
        return {key: known_to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [known_to_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name for a file, renamed to `path` when the body ends, and removed if it fails.

    Raises:
        MsencError: the disk refuses.
    """
    partial = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a link of this name would be written through
        yield partial
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise MsencError(f"{path}: cannot be written ({reason}). Free space or permissions there.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which replaces an earlier one; remains of killed processes are removed."""
    partial = folder.with_name(f".{folder.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    yield partial
    remove(folder)
    partial.rename(folder)


def remove(folder: Path) -> None:
    """Remove a folder; for a link, only the link."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush to disk which names a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(root: Path, *names: str) -> Path:
    """A path to write to, in a folder that may be a stranger's.

    Args:
        root: the folder.
        names: the parts of the path below it.

    Raises:
        MsencError: a link there, or a name, leads out of the folder.
    """
    path = Path(root, *names)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise MsencError(
            f"{path}: leads out of {root}, to {path.resolve()}, so nothing is written there. Put a plain file or "
            "folder in the link's place, or remove it."
        )
    return path


def check_no_way_out(root: Path) -> None:
    """Refuse to write in a run's folder if a link in it leads elsewhere.

    Raises:
        MsencError: names the first.
    """
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(place, name)):  # noqa: PTH114, PTH118 (a path for each file takes long)
                inside(root, os.path.relpath(place, root), name)


def digest(value: Any, length: int = 12) -> str:
    """A short hash of plain values: settings, names.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def content_hash(values: Iterable[Any]) -> str:
    """A hash of lists or mappings of plain values, one after the other: turns, labels.

    Example:
        >>> content_hash(["dia0", {"a": 1, "b": 2}]) == content_hash(["dia0", {"b": 2, "a": 1}])
        True
    """
    sha = hashlib.sha256()
    for value in values:
        sha.update(json.dumps(value, sort_keys=True).encode())
    return sha.hexdigest()
