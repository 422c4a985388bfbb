"""IEMOCAP: improvised and scripted scenes of two actors, by sessions.

``Session1/dialog/transcriptions/Ses01F_impro01.txt`` has the words and times, the file of that name in
``dialog/EmoEvaluation`` the emotions; ``sentences/wav/<dialogue>/<utterance>.wav`` is the audio, and
``dialog/avi/DivX/<dialogue>.avi`` the scene.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msenc.raw.annotations import Row, row_of
from msenc.raw.container import part_of
from msenc.raw.layouts.layout import files_of, lines_of
from msenc.types import MsencError, Rejection

EMOTIONS = {
    "ang": "anger",
    "hap": "happiness",
    "sad": "sadness",
    "neu": "neutral",
    "fru": "frustration",
    "exc": "excitement",
    "fea": "fear",
    "sur": "surprise",
    "dis": "disgust",
    "oth": "other",
    "xxx": "",  # the annotators did not agree
}
"""Codes of the release -> labels; an empty one says nothing."""

_SPOKEN = re.compile(r"(Ses\d\d[FM]_\w+)_([FM]\w+)\s+\[(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)\]:\s*(.*)")
_FELT = re.compile(r"\[\s*\d+(?:\.\d+)?\s*-\s*\d+(?:\.\d+)?\s*\]\s+(Ses\w+)\s+(\w+)\s+\[.*\]\s*")


class Iemocap:
    """The folder ``IEMOCAP_full_release``.

    Args:
        val_sessions: whose dialogues are validated on.
        test_sessions: whose dialogues are tested on; by habit the last, whose two actors are in no other.
        video: whether the scene's video is read, too: both actors are in its picture.
    """

    split: dict[str, Any] = {}  # noqa: RUF012 (never changed: the sessions are the splits)

    def __init__(self, val_sessions: Sequence[int], test_sessions: Sequence[int], video: bool = True) -> None:
        if both := {*val_sessions} & {*test_sessions}:
            raise MsencError(f"data.layout: session {min(both)} is in val_sessions and in test_sessions.")
        self.split_of = dict.fromkeys(val_sessions, "val") | dict.fromkeys(test_sessions, "test")
        self.video = video

    def rows(self, root: Path, encoding: str | None) -> Iterator[Row | Rejection]:
        """See `Layout.rows`; the label is Emotion."""
        sessions = {int(path.name[7:]): path for path in root.glob("Session[0-9]*") if path.name[7:].isdecimal()}
        if missing := sorted({*self.split_of} - {*sessions}) or not sessions:
            wanted = f"Session{missing[0]}" if sessions else "Session1 to Session5"
            there = ", ".join(f"Session{n}" for n in sorted(sessions)) or "no session"
            raise MsencError(
                f"{root}: no folder {wanted}; found {there}. Set data.root to IEMOCAP_full_release, or change "
                "data.layout.val_sessions and test_sessions."
            )
        for number, session in sorted(sessions.items()):
            folder = session / "dialog" / "transcriptions"
            if not (files := files_of(folder, "Ses*.txt")):
                raise MsencError(f"{folder}: no transcription. Expected Ses{number:02}F_impro01.txt and others.")
            for file in files:
                yield from self._dialogue(root, session, file, self.split_of.get(number, "train"), encoding)

    def _dialogue(
        self, root: Path, session: Path, file: Path, split: str, encoding: str | None
    ) -> Iterator[Row | Rejection]:
        name = file.stem
        emotions = self._emotions(session / "dialog" / "EmoEvaluation" / file.name, encoding)
        turns: list[tuple[float, Row]] = []
        for number, line, is_repaired in lines_of(file, encoding):
            match = _SPOKEN.fullmatch(line.strip())
            if match is None:  # some lines give words without an utterance
                yield Rejection(name, "row", "no utterance", file.name, number, line.strip())
                continue
            if match[1] != name:
                raise MsencError(
                    f"{file}, row {number}: found an utterance of {match[1]}, expected one of {name}. Get the file "
                    "again."
                )
            utterance = f"{name}_{match[2]}"
            audio = (session / "sentences" / "wav" / name / f"{utterance}.wav").relative_to(root).as_posix()
            scene = (session / "dialog" / "avi" / "DivX" / f"{name}.avi").relative_to(root).as_posix()
            start_s, end_s = float(match[3]), float(match[4])
            has_part = self.video and start_s < end_s
            values = {
                "clip": part_of(scene, start_s, end_s) if has_part else audio,
                "audio": audio if has_part else "",
                "dialogue": name,
                "speaker": f"{name[:5]}{match[2][0]}",
                "text": match[5],
                "split": split,
                "Emotion": emotions.pop(utterance, ""),
            }
            turns.append((start_s, row_of(file, number, values, is_repaired=is_repaired)))
        yield from (row for _, row in sorted(turns, key=lambda turn: turn[0]))
        for utterance in emotions:
            yield Rejection(utterance, "row", "emotion without a transcription", file.name)

    def _emotions(self, file: Path, encoding: str | None) -> dict[str, str]:
        found = {}
        for number, line, _ in lines_of(file, encoding):
            if match := _FELT.fullmatch(line):
                if match[2] not in EMOTIONS:
                    codes = ", ".join(EMOTIONS)
                    raise MsencError(f"{file}, row {number}: found the emotion {match[2]!r}, expected one of {codes}.")
                found[match[1]] = EMOTIONS[match[2]]
        return found
