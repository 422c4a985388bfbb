"""A few targets with the audio and video of the previous turn, and the reply of each configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from msenc.config.stored import read_config
from msenc.pages.render import data_uri
from msenc.raw.audit_page import thumbnail
from msenc.raw.container import MediaError
from msenc.raw.media import read_audio
from msenc.report.compare import Configuration
from msenc.speech.wav import to_wav
from msenc.store.location import is_url
from msenc.store.shards import ShardReader
from msenc.types import Dialogue, MsencError, Utterance

NUM_EXAMPLES = 4
SAMPLE_RATE = 16_000
MAX_SECONDS = 12
MAX_BYTES = 3_000_000
"""Maximum audio in a page; the rest is omitted, with a note."""


@dataclass
class Turn:
    """One turn before a target.

    Args:
        speaker: who speaks.
        text: what is said.
        description: how it is said, if the data have it.
        sound: data URL of its audio, or "".
        picture: data URL of its first video frame, or "".
        lacking: why audio or video are missing.
    """

    speaker: str
    text: str
    description: str = ""
    sound: str = ""
    picture: str = ""
    lacking: str = ""


@dataclass
class Example:
    """One target.

    Args:
        title: its dialogue and turn.
        asked: kinds of planted bits in it.
        before: the previous turn, or None if the prepared data are not found.
        reference: the original turn.
        replies: per configuration its name, its reply, and a data URL of the reply's audio, or "".
    """

    title: str
    asked: list[str]
    before: Turn | None
    reference: Turn
    replies: list[tuple[str, Turn]] = field(default_factory=list)


def find_examples(configurations: Sequence[Configuration], split: str) -> tuple[list[Example], list[str]]:
    """Targets with the replies of each configuration's first run, and notes on whatever could not be shown.

    One target per kind of planted bit; for data without such bits, some evenly from the whole split.
    """
    shown = [(c, c.items[0]) for c in configurations if c.items[0] is not None and "reply" in c.items[0].rows[0]]
    if not shown:
        return [], ["No replies were generated, so none are shown."]
    dialogues, notes = open_dialogues(shown[0][0], split)
    media = _Media(raw_folder(shown[0][0]))
    examples = []
    for place in _choose([items.rows for _, items in shown]):
        row = shown[0][1].rows[place]
        before = media.turn(dialogues.utterance(row["dialogue"], row["turn"] - 1)) if dialogues else None
        reference = row.get("reference") or {}
        example = Example(
            f"{row['dialogue']}, turn {row['turn']}",
            [kind.removeprefix("planted_") for kind in row["bits"]],
            before,
            Turn(row.get("speaker", ""), reference.get("text", ""), reference.get("description") or ""),
        )
        for configuration, items in shown:
            answer = items.rows[place]
            reply = answer.get("reply") or {}
            turn = Turn(configuration.name, reply.get("text", ""), reply.get("description") or "")
            if answer.get("speech"):
                turn.sound = media.file(configuration.evaluations[0].folder / answer["speech"])
            example.replies.append((configuration.name, turn))
        examples.append(example)
    return examples, notes + media.notes


def _choose(rows: Sequence[Sequence[dict[str, Any]]]) -> list[int]:
    """Indices of the targets to show, preferring those where replies differ."""
    first = rows[0]

    def differs(place: int) -> bool:
        return len({str(of_one[place].get("reply")) for of_one in rows}) > 1

    kinds = sorted({kind for row in first for kind in row["bits"]})
    if kinds:
        wanted = [[i for i, row in enumerate(first) if kind in row["bits"]] for kind in kinds]
    else:
        step = max(len(first) // NUM_EXAMPLES, 1)
        wanted = [list(range(start, min(start + step, len(first)))) for start in range(0, len(first), step)]
    chosen: list[int] = []
    for places in wanted[:NUM_EXAMPLES]:
        fresh = [i for i in places if i not in chosen]
        chosen += [next((i for i in fresh if differs(i)), fresh[0])] if fresh else []
    return sorted(chosen)


class _Dialogues:
    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def utterance(self, id: str, turn: int) -> Utterance | None:
        try:
            return Dialogue.from_json(self.reader.read(id)["turns.json"]).utterances[turn]
        except (KeyError, IndexError, MsencError):
            return None


def _config(configuration: Configuration) -> DictConfig:
    path = configuration.runs[0].folder / ".hydra" / "config.yaml"
    return read_config(path) if path.is_file() else OmegaConf.create({})


def _place(configuration: Configuration, key: str) -> str | None:
    try:
        place = OmegaConf.select(_config(configuration), key)
    except (OmegaConfBaseException, RecursionError):  # it refers to a path that is unknown here
        return None
    return place if isinstance(place, str) and "\0" not in place else None


def raw_folder(configuration: Configuration) -> Path | None:
    """Where the clips are, if they are there."""
    root = _place(configuration, "data.root")
    return Path(root) if root and Path(root).is_dir() else None


def open_dialogues(configuration: Configuration, split: str) -> tuple[_Dialogues | None, list[str]]:
    """A split's dialogues, or None and why they are not there."""
    folder = _place(configuration, "data.dir")
    if folder is None or is_url(folder):
        return None, ["The prepared data are not found, so the previous turns are not shown."]
    try:
        return _Dialogues(ShardReader(Path(folder) / "turns", split, verify=False)), []
    except MsencError as error:
        return None, [f"The previous turns are not shown: {error}"]


class _Media:
    """Audio and first frames of clips, if they exist and fit into the page."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self.left = MAX_BYTES
        self.notes = [] if root else ["The raw clips were not found, so audio and video are missing."]

    def turn(self, utterance: Utterance | None) -> Turn | None:
        if utterance is None:
            return None
        turn = Turn(utterance.speaker, utterance.text, utterance.description or "")
        if self.root is None or not utterance.clips:
            turn.lacking = "" if utterance.clips else "no clip"
            return turn
        heard, seen = utterance.clip_of("audio"), utterance.clip_of("video")  # inside it, as readers of shards ensure
        try:
            samples = read_audio(self.root / heard, SAMPLE_RATE)
            turn.sound = self._hold(to_wav(samples[: MAX_SECONDS * SAMPLE_RATE], SAMPLE_RATE))
            turn.picture = thumbnail(self.root / seen) if seen else ""
        except MediaError as error:
            turn.lacking = error.reason
        except MsencError as error:  # PyAV is not installed
            turn.lacking = str(error)
        return turn

    def file(self, path: Path) -> str:
        try:
            return self._hold(path.read_bytes())
        except OSError:
            self.notes.append(f"{path.name}: the spoken reply no longer exists.")
            return ""

    def _hold(self, sound: bytes) -> str:
        if len(sound) > self.left:
            note = "Some audio is omitted: the page would become too large."
            self.notes += [] if note in self.notes else [note]
            return ""
        self.left -= len(sound)
        return data_uri("audio/wav", sound)
