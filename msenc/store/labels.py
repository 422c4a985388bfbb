"""``labels.jsonl`` next to the streams: columns of the data's table that no prompt reads, by utterance.

They label utterances (`Emotion` in MELD) for aligning connectors. Turns and their hash do not depend on
them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from msenc.files import read_json_lines, write_text
from msenc.store.location import Place
from msenc.types import MsencError

LABELS = "labels.jsonl"
ID = "id"
"""The key of a line's utterance; a column of that name cannot be a label."""
VOICE_TURNS = "voice-turns.jsonl"
"""Measured attributes by utterance, which `prepare.describe` writes."""

Labels = Mapping[str, Mapping[str, Any]]
"""Utterance id (``meld/train/dia3/utt5``) -> column -> value."""


class _Row(TypedDict):
    id: str


class _MeasuredRow(_Row):
    measured: NotRequired[dict[str, str]]


def write_labels(folder: Path, labels: Labels) -> None:
    """Write ``labels.jsonl`` atomically; without any label, remove an earlier one."""
    if labels:
        lines = (json.dumps({ID: id, **columns}, ensure_ascii=False) + "\n" for id, columns in labels.items())
        write_text(folder / LABELS, "".join(lines))
    else:
        (folder / LABELS).unlink(missing_ok=True)


def read_labels(folder: Place, file: str, hint: str) -> dict[str, dict[str, Any]]:
    """Read a file of labels: ``labels.jsonl``, or ``voice-turns.jsonl`` with measured voices.

    Args:
        folder: the prepared data.
        file: `LABELS` or `VOICE_TURNS`.
        hint: how to create it, for messages.

    Raises:
        MsencError: it is missing, or a line is invalid, or of an utterance that has one already.
    """
    kind = _MeasuredRow if file == VOICE_TURNS else _Row
    rows: Iterator[tuple[str, dict[str, Any]]] = read_json_lines(folder / file, kind, hint)
    labels: dict[str, dict[str, Any]] = {}
    for where, row in rows:
        if (id := row.pop(ID)) in labels:
            raise MsencError(f"{where}: found {id!r} a second time, expected one line per utterance. {hint}".rstrip())
        labels[id] = row
    if not labels:
        raise MsencError(f"{folder / file}: is empty, expected a line per utterance. {hint}".rstrip())
    return labels


def columns_of(labels: Labels) -> Sequence[str]:
    """The columns that any utterance has, in order."""
    return list(dict.fromkeys(column for row in labels.values() for column in row))
