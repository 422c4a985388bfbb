"""DailyTalk: conversations of DailyDialog, read by two actors. ``metadata.json`` and ``data/<dialogue>/*.wav``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from msenc.raw.annotations import Row, row_of
from msenc.raw.layouts.layout import json_of, random_split
from msenc.types import MsencError, Rejection

ADVICE = "Expected DailyTalk's metadata.json; set data.root to the folder dailytalk of its archive."


class _Turn(TypedDict):
    dialog_idx: int
    utterance_idx: int
    speaker: int
    text: str
    emotion: str
    act: str


class DailyTalk:
    """The release's folder ``dailytalk``.

    Args:
        fractions: share of the dialogues per split; the release has none.
        seed: of the drawing.
    """

    def __init__(self, fractions: Mapping[str, float], seed: int = 1) -> None:
        self.split: dict[str, Any] = random_split(fractions, seed)

    def rows(self, root: Path, encoding: str | None) -> Iterator[Row | Rejection]:
        """See `Layout.rows`; labels are Emotion and Act."""
        path = root / "metadata.json"
        if not path.is_file():
            raise MsencError(f"{path}: missing. {ADVICE}")
        number = 0
        for dialogue, turns in json_of(path, dict[str, dict[str, _Turn]], encoding, ADVICE).items():
            for key, turn in sorted(turns.items(), key=lambda item: item[1]["utterance_idx"]):
                number += 1
                name = f"{turn['utterance_idx']}_{turn['speaker']}_d{turn['dialog_idx']}"
                if (dialogue, key) != (str(turn["dialog_idx"]), str(turn["utterance_idx"])):
                    raise MsencError(
                        f"{path}, {dialogue}.{key}: found the utterance {name}, expected one of dialogue {dialogue} "
                        f"with the number {key}. {ADVICE}"
                    )
                yield row_of(
                    path,
                    number,
                    {
                        "clip": f"data/{dialogue}/{name}.wav",
                        "dialogue": dialogue,
                        "speaker": str(turn["speaker"]),
                        "text": turn["text"],
                        "Emotion": turn["emotion"],
                        "Act": turn["act"],
                    },
                )
