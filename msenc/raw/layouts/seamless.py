"""Seamless Interaction: two people face to face, each with a video, an audio and a transcript of their own.

Of ``V00_S0809_I00000582_P0947`` there is a ``.mp4``, a ``.wav`` and a ``.json`` in one folder of ``improvised/dev``, as
its downloaders write them; or they lie in ``video/``, ``audio/`` and ``transcript/`` (``.jsonl``) of the split, as in
its bucket. An interaction is the dialogue of all its participants, turns in the order in which they begin.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from msenc.raw.annotations import Row, row_of
from msenc.raw.layouts.layout import MediaFiles, files_of, json_lines_of, json_of
from msenc.types import MsencError, Rejection

SETTINGS = ("improvised", "naturalistic")
SPLITS = {"train": "train", "dev": "val", "test": "test"}
ADVICE = "Expected a file of Seamless Interaction."
_FILE = re.compile(r"(V\d+_S\d+_I\d+)_(P\w+)")


class _Span(TypedDict):
    transcript: str
    start: float
    end: float


_Participant = TypedDict("_Participant", {"id": NotRequired[str], "metadata:transcript": list[_Span]})


class Seamless:
    """The folder that holds ``improvised`` or ``naturalistic``."""

    split: dict[str, Any] = {}  # noqa: RUF012 (never changed: the folders are the splits)

    def rows(self, root: Path, encoding: str | None) -> Iterator[Row | Rejection]:
        """See `Layout.rows`; the label is Setting."""
        folders = [root / setting / split for setting in SETTINGS for split in SPLITS]
        if not any(folder.is_dir() for folder in folders):
            raise MsencError(
                f"{root}: found no folder {SETTINGS[0]}/dev or the like. Expected {' or '.join(SETTINGS)}, with "
                f"{', '.join(SPLITS)} in them; set data.root to the folder above."
            )
        for folder in folders:
            if folder.is_dir():
                yield from self._interactions(root, folder, encoding)

    def _interactions(self, root: Path, folder: Path, encoding: str | None) -> Iterator[Row | Rejection]:
        media = MediaFiles(root, folder)
        has_audio = media.has(".wav")  # or only the videos were fetched
        interactions: dict[str, dict[str, Path]] = {}
        for path in [*files_of(folder, "**/*.json"), *files_of(folder, "**/transcript/*.jsonl")]:
            if (match := _FILE.fullmatch(path.stem)) and path.parent.name not in ("vad", *_ANNOTATIONS):
                interactions.setdefault(match[1], {}).setdefault(match[2], path)
        if not interactions:
            raise MsencError(f"{folder}: no transcript. Expected V00_S0000_I00000000_P0000.json or transcript/*.jsonl.")
        for interaction, participants in sorted(interactions.items()):
            if len(participants) < 2:
                (path,) = participants.values()
                yield Rejection(interaction, "row", "interaction without the other's side", path.name)
                continue
            turns: list[tuple[float, Row]] = []
            for participant, path in sorted(participants.items()):
                name = f"{interaction}_{participant}"
                beside = f"{path.parent.relative_to(root).as_posix()}/"
                seen, heard = (
                    media.find(f"{name}.mp4", beside),
                    media.find(f"{name}.wav", beside) or f"{beside}{name}.wav",
                )
                for number, span in _spans(path, name, encoding):
                    values = {
                        "clip": seen or heard,
                        "audio": heard if seen and has_audio else "",
                        "dialogue": interaction,
                        "speaker": participant,
                        "text": span["transcript"],
                        "start": str(span["start"]),
                        "end": str(span["end"]),
                        "split": SPLITS[folder.name],
                        "Setting": folder.parent.name,
                    }
                    turns.append((span["start"], row_of(path, number, values)))
            yield from (row for _, row in sorted(turns, key=lambda turn: turn[0]))


_ANNOTATIONS = ("1P-IS", "1P-R", "3P-IS", "3P-R", "3P-V")
"""Folders of other files of the same names."""


def _spans(path: Path, name: str, encoding: str | None) -> list[tuple[int, _Span]]:
    if path.suffix == ".jsonl":
        return list(json_lines_of(path, _Span, encoding, ADVICE))
    value = json_of(path, _Participant, encoding, ADVICE)
    if value.get("id", name) != name:
        raise MsencError(f"{path}: found the transcript of {value['id']}, expected that of {name}. Get the file again.")
    return list(enumerate(value["metadata:transcript"], start=1))
