"""What a published data set's own layout states -> the rows that a table of clips would have.

A layout is a class with a `rows`; everything else (ids, splits, odd texts, what is listed) is what `read_rows` does for
any table. Layouts name clips by the rule of their release, whether the files are there or not: what is missing is
listed with its name when streams are read.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from msenc.files import check_regular, hold, reason_of
from msenc.raw.annotations import Annotations, Row, read_rows
from msenc.raw.container import SUFFIXES
from msenc.raw.encoding import decode_table
from msenc.types import MsencError, Rejection


class Layout(Protocol):
    """How a release lies on a disk.

    Attributes:
        split: `split_dialogues`'s rule, fractions and seed, where the rows state no split.
    """

    split: Mapping[str, Any]

    def rows(self, root: Path, encoding: str | None) -> Iterator[Row | Rejection]:
        """Its utterances in order, dialogue by dialogue, and what it states and cannot be used.

        Args:
            root: the release's folder.
            encoding: of its text files; None: UTF-8, and what `decode_table` repairs.

        Raises:
            MsencError: a file of the layout is missing, or is not what the release has there.
        """
        ...


def read_layout(
    layout: Layout, root: Path, dataset: str, labels: Sequence[str] | None, encoding: str | None
) -> Annotations:
    """Read a release.

    Args:
        layout: of it.
        root: its folder.
        dataset: first part of the dialogue ids.
        labels: columns to keep as labels; None keeps all.
        encoding: see `Layout.rows`.

    Raises:
        MsencError: see `Layout.rows` and `read_rows`.
    """
    root = Path(root)
    if not root.is_dir():
        raise MsencError(f"{root}: no such folder. Expected the data set as it is published; set data.root to it.")
    rejections: list[Rejection] = []

    def stated() -> Iterator[Row]:
        for found in layout.rows(root, encoding):
            if isinstance(found, Rejection):
                rejections.append(found)
            else:
                yield found

    split = {**layout.split, "key": "data.layout.split"}
    annotations = read_rows(stated(), root, dataset, split, labels)
    return replace(annotations, rejections=[*rejections, *annotations.rejections])


def random_split(fractions: Mapping[str, float], seed: int) -> dict[str, Any]:
    """The split of a release that has none: each dialogue is drawn by itself."""
    return {"rule": "random", "fractions": fractions, "seed": seed}


def lines_of(path: Path, encoding: str | None) -> Iterator[tuple[int, str, bool]]:
    """Number, text and whether its encoding was repaired, of each line of a text file that is not blank."""
    text, recoded = decode_table(_bytes_of(path), path, encoding)
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line, number in recoded


def json_of(path: Path, kind: Any, encoding: str | None, advice: str) -> Any:
    """A JSON file's value, held to a kind of `msenc.files.kinds`; `json_lines_of` for one in each line."""
    return _parse(_decode(path, encoding, advice), path, kind, advice)


def json_lines_of(path: Path, kind: Any, encoding: str | None, advice: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each line of a file with a JSON text in each."""
    for number, line in enumerate(_decode(path, encoding, advice).split("\n"), start=1):
        if line.strip():
            yield number, _parse(line, f"{path}, row {number}", kind, advice)


def _parse(text: str, where: object, kind: Any, advice: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MsencError(f"{where}: not JSON ({reason_of(error)}). {advice}") from error
    return hold(value, kind, where, advice)


def _decode(path: Path, encoding: str | None, advice: str) -> str:
    data = _bytes_of(path)
    try:
        return data.decode(encoding or "utf-8-sig")
    except LookupError as error:
        raise MsencError(f"data.encoding={encoding}: Python knows no such encoding.") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = encoding or "UTF-8"
        raise MsencError(
            f"{path}, row {line}: not in {name}. Say what it is in: data.encoding=NAME. {advice}"
        ) from error


def _bytes_of(path: Path) -> bytes:
    try:
        return check_regular(path).read_bytes()
    except FileNotFoundError as error:
        raise MsencError(f"{path}: missing. Expected it as the release has it; get the release complete.") from error
    except OSError as error:
        raise MsencError(f"{path}: cannot be read ({error.strerror}). Make the data set's files readable.") from error


def files_of(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by name; hidden ones (macOS leaves ``._`` twins in archives) are none of the release's."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


class MediaFiles:
    """Media files below a folder by their names, wherever an archive put them.

    Args:
        root: that the names of `find` start from.
        folder: that is searched; by default all of `root`.
    """

    def __init__(self, root: Path, folder: Path | None = None) -> None:
        self._found: dict[str, list[str]] = {}
        for path in sorted((folder or root).rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
                self._found.setdefault(path.name, []).append(path.relative_to(root).as_posix())

    def has(self, suffix: str) -> bool:
        """Whether there is any file of that kind: if so, every turn has one."""
        return any(name.endswith(suffix) for name in self._found)

    def find(self, name: str, beside: str = "", apart: tuple[str, ...] = ()) -> str | None:
        """The file of that name: the only one, or else the only one whose path begins like `beside`.

        Args:
            name: of the file.
            beside: how its path begins, if there are several.
            apart: how paths begin that are never meant, even of the only one: those of other splits.
        """
        found = [path for path in self._found.get(name, []) if not path.startswith(apart)]
        if len(found) > 1:
            found = [path for path in found if path.startswith(beside)]
        return found[0] if len(found) == 1 else None
