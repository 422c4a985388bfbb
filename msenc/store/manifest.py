"""``dataset.json`` beside the streams: what a prepared dataset holds; ``rejected.csv``: what it does not, and why."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from msenc.files import parse_csv, read_json, read_text, write_text
from msenc.files.kinds import Count, Name, Split, short
from msenc.store.location import Place
from msenc.types import SPLITS, Dialogue, MsencError, Rejection

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
PREPARE = "Prepare the data again, into an empty folder."


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

    dialogues: Count
    utterances: Count
    samples: Count
    hours: float
    clips: Count | None = None


@dataclass(frozen=True)
class StreamInfo:
    """One stream folder.

    Args:
        kind: ``text``, ``audio`` or ``video``.
        encoder: name of what made the features, or None for turns.
        dim: width of the features, of several layers all together; None for turns.
        settings: what the stream was made with.
        hash: of its content, as its index has it.
        utterances: number of utterances that have the stream, by split.
    """

    kind: Literal["text", "audio", "video"]
    encoder: Name | None
    dim: Count | None
    settings: dict[str, Any]
    hash: str
    utterances: dict[Split, Count]


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

    name: Name
    splits: dict[Split, SplitCounts]
    streams: dict[Name, StreamInfo]
    rejected: dict[str, Count] = field(default_factory=dict)
    num_repaired: Count = 0
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
        advice = f"Expected a dataset written by prepare.py: prepare again. {hint}".strip()
        value = read_json(folder / MANIFEST, DatasetManifest, advice, SCHEMA_VERSION)
        splits = {name: SplitCounts(**counts) for name, counts in value["splits"].items()}
        streams = {name: StreamInfo(**info) for name, info in value["streams"].items()}
        return DatasetManifest(**{**value, "splits": splits, "streams": streams})


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
    """What `write_rejections` wrote.

    Raises:
        MsencError: it is no such file; names the row.
    """
    rejections = []
    for number, row in enumerate(
        parse_csv(read_text(path, PREPARE), path, [f.name for f in fields(Rejection)], PREPARE)
    ):
        if row["row"] and not (row["row"].isdecimal() and len(row["row"]) < 10):
            raise MsencError(f"{path}, entry {number + 1}: found row {short(row['row'])}, expected a number. {PREPARE}")
        rejections.append(Rejection(**{**row, "row": int(row["row"]) if row["row"] else None}))
    return rejections
