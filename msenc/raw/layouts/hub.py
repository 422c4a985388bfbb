"""A data set of the Hugging Face hub, one utterance per row: a folder of ``save_to_disk``, or of Parquet files.

Rows hold their clips; they are written once to ``clips`` in the same folder, as everything that decodes reads files.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from msenc.files import reason_of, whole
from msenc.files.kinds import is_name
from msenc.raw.annotations import Row, row_of
from msenc.raw.container import SUFFIXES
from msenc.raw.layouts.layout import json_of, random_split
from msenc.types import SPLITS, MsencError, Rejection, needing

CLIPS = "clips"
"""Folder of the clips that rows hold."""
READ = ("dialogue", "turn", "speaker", "text", "description", "audio", "video")
NEEDED = ("dialogue", "text")
BATCH_ROWS = 64
ADVICE = "Expected a folder of datasets' save_to_disk, or of Parquet files."


class _Files(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_Files]


class HubDataset:
    """The folder of ``dataset_dict.json`` (or ``state.json``), or one above Parquet files.

    Args:
        columns: what is read -> the column that has it: ``dialogue`` and ``text``, and as there are ``turn`` (a number,
            by which a dialogue's turns are put in order; else they keep the order of the rows), ``speaker``,
            ``description``, ``audio`` and ``video``.
        labels: label -> the column that has it.
        splits: the data set's split -> ``train``, ``val``, ``test``, or null to leave it out.
        fractions: of the dialogues, where the folder has a single split.
        seed: of the drawing.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        labels: Mapping[str, str],
        splits: Mapping[str, str | None],
        fractions: Mapping[str, float],
        seed: int = 1,
    ) -> None:
        if wrong := ({*columns} - {*READ}) | ({*NEEDED} - {*columns}):
            raise MsencError(
                f"data.layout.columns: found {', '.join(columns) or 'nothing'}; expected {' and '.join(NEEDED)}, and "
                f"any of {', '.join(k for k in READ if k not in NEEDED)} (not right: {', '.join(sorted(wrong))})."
            )
        self.columns, self.labels, self.splits = dict(columns), dict(labels), dict(splits)
        self.split: dict[str, Any] = random_split(fractions, seed)

    def rows(self, root: Path, encoding: str | None) -> Iterator[Row | Rejection]:
        """See `Layout.rows`; the labels are those of `labels`."""
        with needing("data.layout of the hub", "hub"):
            import pyarrow as pa
        found = _files(root)
        for name, files in found.items():
            split = None if len(found) == 1 else self._split(root, name, found)
            if len(found) > 1 and split is None:
                continue
            rows: dict[str, list[tuple[Any, Row]]] = {}
            number = 0
            for file in files:
                try:
                    for batch in _batches(file):
                        self._check_columns(file, batch.schema.names)
                        for values in batch.to_pylist():
                            number += 1
                            row = self._row(root, file, number, name, values, split)
                            turn = values.get(self.columns.get("turn", ""), number)
                            rows.setdefault(row.values["dialogue"], []).append((_order(turn, row), row))
                except (pa.ArrowException, OSError) as error:
                    raise MsencError(f"{file}: cannot be read ({reason_of(error)[:200]}). {ADVICE}") from error
            for own in rows.values():
                yield from (row for _, row in sorted(own, key=lambda turn: turn[0]))

    def _split(self, root: Path, name: str, found: Mapping[str, Any]) -> str | None:
        if name not in self.splits:
            raise MsencError(
                f"{root}: found the splits {', '.join(found)}; data.layout.splits says nothing of {name!r}. Give it: "
                f"data.layout.splits.{name}=train (or {', '.join(SPLITS[1:])}, or null to leave it out)."
            )
        return self.splits[name]

    def _check_columns(self, file: Path, there: list[str]) -> None:
        for key, column in {**self.columns, **self.labels}.items():
            if column not in there:
                where = "columns" if key in self.columns else "labels"
                raise MsencError(
                    f"{file}: no column {column!r}, which data.layout.{where}.{key} names; found {', '.join(there)}."
                )

    def _row(self, root: Path, file: Path, number: int, name: str, values: Mapping[str, Any], split: str | None) -> Row:
        texts = {key: _text(values[column]) for key, column in {**self.columns, **self.labels}.items()}
        clips = {}
        for key in ("audio", "video"):
            column = self.columns.get(key)
            clips[key] = _clip(root, file, f"{name}-{number:07}-{key}", values[column]) if column else ""
        dialogue = texts["dialogue"] if split is None else f"{name}-{texts['dialogue']}"
        stated = {
            "clip": clips["video"] or clips["audio"],
            "audio": clips["audio"] if clips["video"] else "",
            "dialogue": "".join(c if c.isalnum() or c in "-_" else "_" for c in dialogue),
            "speaker": texts.get("speaker", ""),
            "text": texts["text"],
            "description": texts.get("description", ""),
            **({} if split is None else {"split": split}),
            **{label: texts[label] for label in self.labels},
        }
        return row_of(file, number, stated)


def _order(turn: Any, row: Row) -> float:
    try:
        return float(turn)
    except (TypeError, ValueError) as error:
        raise MsencError(
            f"{row.file}, row {row.number}: the turn is {turn!r}; expected a number, or no data.layout.columns.turn."
        ) from error


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | bytes | list) else str(value)


def _clip(root: Path, file: Path, name: str, value: Any) -> str:
    """The file of a row's clip, below the root; it is written if the row itself holds it."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = {"bytes": value}
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict) or not {"bytes", "path"} & value.keys():
        raise MsencError(f"{file}: the clip {name} is no clip; expected bytes, a path, or both, as of datasets' Audio.")
    data, path = value.get("bytes"), value.get("path") or ""
    if data is None:
        try:
            return Path(path).relative_to(root).as_posix() if Path(path).is_absolute() else path
        except ValueError:
            raise MsencError(
                f"{file}: the clip {name} is {path}, outside of {root}, and the row does not hold it. Save the data "
                "set with its files in it (save_to_disk does so by default)."
            ) from None
    suffix = Path(path).suffix.lower()
    clip = root / CLIPS / (f"{name}{suffix}" if suffix in SUFFIXES and is_name(f"{name}{suffix}") else f"{name}.wav")
    if not clip.is_file() or clip.read_bytes() != data:
        try:
            clip.parent.mkdir(exist_ok=True)
            with whole(clip) as partial:
                partial.write_bytes(data)
        except OSError as error:
            raise MsencError(
                f"{clip}: cannot be written ({error.strerror}). Copy the data set to where it can."
            ) from error
    return clip.relative_to(root).as_posix()


def _files(root: Path) -> dict[str, list[Path]]:
    """Split -> its files, in order."""
    if (whole_set := root / "dataset_dict.json").is_file():
        names = json_of(whole_set, dict[str, list[str]], None, ADVICE).get("splits", [])
        if wrong := next((name for name in names if not is_name(name)), None):
            raise MsencError(
                f"{whole_set}: found the split {wrong!r}, expected the name of a folder beside it. {ADVICE}"
            )
        return {name: _saved(root / name) for name in names}
    if (root / "state.json").is_file():
        return {root.name: _saved(root)}
    found: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.parquet")):
        if not file.name.startswith("."):
            found.setdefault(file.name.partition(".parquet")[0].partition("-")[0], []).append(file)
    if not found:
        raise MsencError(f"{root}: found no dataset_dict.json, state.json or *.parquet. {ADVICE} Set data.root to it.")
    return found


def _saved(folder: Path) -> list[Path]:
    files = json_of(folder / "state.json", _State, None, ADVICE)["_data_files"]
    if wrong := next((f["filename"] for f in files if not is_name(f["filename"])), None):
        raise MsencError(f"{folder / 'state.json'}: found the file {wrong!r}, expected one beside it. {ADVICE}")
    return [folder / f["filename"] for f in files]


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    if file.suffix == ".parquet":
        with parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(batch_size=BATCH_ROWS)
        return
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            for first in range(0, len(batch), BATCH_ROWS):
                yield batch.slice(first, BATCH_ROWS)
