"""Files, whole or not at all; JSON, read with a clear refusal; hashes of plain values."""

import hashlib
import json
from collections.abc import Iterable
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
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        raise MsencError(f"{path}: cannot be written ({e.strerror}).") from e


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
