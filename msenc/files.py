"""Files, whole or not at all; JSON, read with a clear refusal; hashes of plain values."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msenc.types import MsencError


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        MsencError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise MsencError(f"{path}: cannot be read as JSON ({e}).") from e


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; numbers that JSON does not know, such as NaN, become null."""
    write_text(path, json.dumps(known_to_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def known_to_json(value: Any) -> Any:
    """Plain values with null for NaN and infinity, which JSON does not know.

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
    """Write a text file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when the body has ended, and is gone where that fails.

    Raises:
        MsencError: the disk refuses.
    """
    partial = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    """The same for a folder, which takes the place of an earlier one; what a kill left is cleared away."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


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
