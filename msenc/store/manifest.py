"""``dataset.json`` beside the streams: what a prepared dataset holds; ``rejected.csv``: what it does not, and why."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from msenc.files import write_text
from msenc.store.location import Place
from msenc.types import SPLITS, Dialogue, MsencError, Rejection

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"


@dataclass(frozen=True)
class SplitCounts:
    """Size of one split.

    Args:
        dialogues: dialogues in it.
        utterances: their turns.
        samples: targets, every turn but the first of each dialogue.
        hours: sum of the durations that the annotations give, however implausible; unknown ones count nothing.
        clips: utterances whose media file exists, or None where that was not looked at.
    """

    dialogues: int
    utterances: int
    samples: int
    hours: float
    clips: int | None = None


@dataclass(frozen=True)
class StreamInfo:
    """One stream folder.

    Args:
        kind: ``text``, ``audio`` or ``video``.
        encoder: name of what made the features, or None for turns.
        dim: width of the features, or None for turns.
        settings: what the stream was made with.
        hash: of its content, as its index has it.
        utterances: number of utterances that have the stream, by split.
    """

    kind: str
    encoder: str | None
    dim: int | None
    settings: dict[str, Any]
    hash: str
    utterances: dict[str, int]


@dataclass(frozen=True)
class DatasetManifest:
    """A prepared dataset.

    Args:
        name: of the dataset, the first part of its ids.
        splits: sizes by split.
        streams: by the name of their folder.
        rejected: number of rejections by reason.
        num_repaired: rows whose encoding was repaired.
        settings: what the dataset was prepared with.
        turns_hash: of the turns' stream.
        audit_hash: of the audit of these turns, or empty where there was none.
    """

    name: str
    splits: dict[str, SplitCounts]
    streams: dict[str, StreamInfo]
    rejected: dict[str, int] = field(default_factory=dict)
    num_repaired: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    turns_hash: str = ""
    audit_hash: str = ""
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Write ``dataset.json`` into `folder`, whole or not at all."""
        write_text(Path(folder) / MANIFEST, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def read(folder: Place, hint: str = "") -> "DatasetManifest":
        """Read ``dataset.json`` of `folder`.

        Args:
            folder: a prepared dataset, or a copy of one behind a URL.
            hint: added to error messages: the command that prepares it.

        Raises:
            MsencError: if it is missing, cannot be read, is of another schema or incomplete.
        """
        path = folder / MANIFEST
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MsencError(f"{path}: missing. Expected a dataset written by prepare.py. {hint}".strip()) from error
        except (OSError, ValueError) as error:
            raise MsencError(f"{path}: cannot be read ({error}). Prepare the data again. {hint}".strip()) from error
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise MsencError(
                f"{path}: found schema version {version}, expected {SCHEMA_VERSION}. Prepare again. {hint}".strip()
            )
        try:
            splits = {name: _typed(SplitCounts, counts) for name, counts in value["splits"].items()}
            streams = {name: _typed(StreamInfo, info) for name, info in value["streams"].items()}
            return _typed(DatasetManifest, {**value, "splits": splits, "streams": streams})
        except (KeyError, TypeError, AttributeError) as error:
            raise MsencError(
                f"{path}: not a complete manifest ({error}). Prepare the data again. {hint}".strip()
            ) from error


def _typed(cls: type[Any], values: dict[str, Any]) -> Any:
    """An instance of a dataclass, if the values are of the types that its fields say."""
    for name, hint in get_type_hints(cls).items():
        kind = int | float if hint is float else get_origin(hint) if get_origin(hint) is dict else hint
        if name in values and not isinstance(values[name], kind):
            raise TypeError(f"{name} is {values[name]!r}")
    return cls(**values)


def count_splits(dialogues: Iterable[Dialogue], clips: dict[str, int] | None = None) -> dict[str, SplitCounts]:
    """Sizes of the splits that have a dialogue.

    Args:
        dialogues: of all splits.
        clips: number of existing media files by split, where that is known.

    Example:
        >>> count_splits([Dialogue("demo/val/dia0", "val", ())])["val"].dialogues
        1
    """
    by_split: dict[str, list[Dialogue]] = {split: [] for split in SPLITS}
    for dialogue in dialogues:
        by_split[dialogue.split].append(dialogue)
    counts = {}
    for split, members in by_split.items():
        turns = [u for dialogue in members for u in dialogue.utterances]
        known = [u.end_s - u.start_s for u in turns if u.start_s is not None and u.end_s is not None]
        if members:
            counts[split] = SplitCounts(
                dialogues=len(members),
                utterances=len(turns),
                samples=sum(dialogue.num_samples for dialogue in members),
                hours=round(sum(known) / 3600, 4),
                clips=None if clips is None else clips.get(split, 0),
            )
    return counts


def count_rejections(rejections: Iterable[Rejection]) -> dict[str, int]:
    """Number of rejections by ``what: reason``, most frequent first.

    Example:
        >>> count_rejections([Rejection("demo/val/dia0/utt1", "audio", "silent", "dia0_utt1.mp4")])
        {'audio: silent': 1}
    """
    return dict(Counter(f"{r.what}: {r.reason}" for r in rejections).most_common())


def write_rejections(path: Path, rejections: Iterable[Rejection]) -> None:
    """Write one CSV line per rejection, whole or not at all."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([f.name for f in fields(Rejection)])
    writer.writerows(astuple(rejection) for rejection in rejections)
    write_text(Path(path), buffer.getvalue())


def read_rejections(path: Path) -> list[Rejection]:
    """What `write_rejections` wrote."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [Rejection(**{**row, "row": int(row["row"]) if row["row"] else None}) for row in rows]
