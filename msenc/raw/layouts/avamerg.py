"""AvaMERG: empathetic dialogues, spoken by avatars. ``train.json``, ``test.json`` and archives of WAV and MP4 files.

A conversation states each of the listener's turns with the dialogue before it; its last one states all of it. Files are
``dia<conversation>utt<number>_<voice>.wav`` (or ``.mp4``), the numbers from 0 on.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from msenc.raw.annotations import Row, row_of
from msenc.raw.layouts.layout import MediaFiles, json_of, random_split
from msenc.raw.splits import split_dialogues
from msenc.types import MsencError, Rejection

ADVICE = "Expected AvaMERG's train.json (and test.json); set data.root to their folder."


class _Said(TypedDict):
    index: int
    role: str
    utterance: str


class _Chain(TypedDict):
    speaker_emotion: NotRequired[str | None]


class _Turn(TypedDict):
    dialogue_history: list[_Said]
    response: NotRequired[str | None]
    chain_of_empathy: NotRequired[_Chain | None]


class _Profile(TypedDict):
    ID: int | str


class _Conversation(TypedDict):
    conversation_id: str
    speaker_profile: _Profile
    listener_profile: _Profile
    turns: list[_Turn]


PARTS = ("train", "test")


class AvaMerg:
    """The folder of ``train.json``, with the unpacked archives anywhere below.

    Args:
        val: share of the conversations of ``train.json`` that are validated on; the release has no such split.
        seed: of their drawing.
    """

    split: dict[str, Any] = {}  # noqa: RUF012 (never changed: the files are the splits)

    def __init__(self, val: float = 0.05, seed: int = 1) -> None:
        self.drawn = random_split({"train": 1 - val, "val": val}, seed)

    def rows(self, root: Path, encoding: str | None) -> Iterator[Row | Rejection]:
        """See `Layout.rows`; the label is Emotion, of the speaker."""
        paths = {part: root / f"{part}.json" for part in PARTS}
        if not any(path.is_file() for path in paths.values()):
            raise MsencError(f"{paths['train']}: missing. {ADVICE}")
        media = MediaFiles(root)
        for part, path in paths.items():
            if not path.is_file():
                continue
            conversations = json_of(path, list[_Conversation], encoding, ADVICE)
            names = [f"{part}_{conversation['conversation_id']}" for conversation in conversations]
            if twice := next((name for name, count in Counter(names).items() if count > 1), None):
                raise MsencError(f"{path}: the conversation {twice} is there twice. {ADVICE}")
            splits = [part] * len(names)
            if part == "train":
                splits = split_dialogues(videos=names, key="data.layout", **self.drawn)
            for number, (name, split, one) in enumerate(zip(names, splits, conversations, strict=True)):
                for values in _turns(one, part, media):
                    yield row_of(path, number, {**values, "dialogue": name, "split": split})


def _turns(conversation: _Conversation, part: str, media: MediaFiles) -> Iterator[dict[str, str]]:
    emotions = {}
    has_audio = media.has(".wav")  # or only the videos were fetched
    for turn in conversation["turns"]:
        heard = [said["index"] for said in turn["dialogue_history"] if said["role"] == "speaker"]
        if heard and (emotion := (turn.get("chain_of_empathy") or {}).get("speaker_emotion")):
            emotions[heard[-1]] = emotion
    last = max(conversation["turns"], key=lambda turn: len(turn["dialogue_history"]), default=None)
    spoken = [*last["dialogue_history"]] if last else []
    if last and last.get("response"):
        index = max((said["index"] for said in spoken), default=-1) + 1
        spoken.append({"index": index, "role": "listener", "utterance": last["response"]})
    for said in sorted(spoken, key=lambda said: said["index"]):
        voice = conversation["speaker_profile" if said["role"] == "speaker" else "listener_profile"]["ID"]
        name = f"dia{conversation['conversation_id'].zfill(5)}utt{said['index']}_{voice}"
        # Ids are counted in each part anew.
        others = tuple(other for other in PARTS if other != part)
        seen, heard_in = (media.find(f"{name}.{kind}", part, others) for kind in ("mp4", "wav"))
        heard_in = heard_in or f"{name}.wav"
        yield {
            "clip": seen or heard_in,
            "audio": heard_in if seen and has_audio else "",
            "speaker": said["role"],
            "text": said["utterance"],
            "Emotion": emotions.get(said["index"], ""),
        }
