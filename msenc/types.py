"""The data types that all layers share; nothing here imports the rest of msenc.

Letters used in all docstrings and shape comments:

    B batch rows      U utterances      T frames of one utterance     D feature width
    Q queries         L tokens of a row  H hidden width of the LLM     V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:  # the command lines' --help must not wait for torch
    from torch import Tensor

SPLITS = ("train", "val", "test")
UNKNOWN = "unknown"
UNKNOWN_SPEAKER = "-1"


class MsencError(Exception):
    """An error for the user: what was found, what was expected, and what to do. Shown without a traceback."""


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Turn a missing package into an error that names it, what needs it, and the extra of msenc that installs it."""
    try:
        yield
    except ImportError as error:
        package = f"the package {error.name.partition('.')[0]}" if error.name else "a package"
        raise MsencError(
            f"{what} needs {package}, which cannot be imported ({error}). Install it with an extra of msenc: "
            f"pip install -e '.[{extra}]'"
        ) from error


@dataclass(frozen=True)
class Mark:
    """A span of a target with known information content, on which a model can be scored separately.

    Args:
        kind: the stream that reveals this span's content: ``text``, ``audio``, ``video`` or ``both``.
        field: the part of the target it is in: ``text`` or ``description``.
        start: first character of the span in that field.
        end: one past the last character.
        bits: information of the span in bits, given everything before it in the target.
    """

    kind: str
    field: str
    start: int
    end: int
    bits: float = 1.0


@dataclass(frozen=True)
class VoiceAttributes:
    """How something is spoken, in words; ``unknown`` if not measured or not stated.

    `msenc.speech.description` has the words of each attribute, and turns them into sentences and back.

    Args:
        gender: of the voice.
        pitch: level of the voice's pitch among voices of its gender.
        range: how far the pitch moves (expressivity).
        rate: syllables per second of speech.
        loudness: level of the speech.
        pauses: share of silence between the first and the last word.
        noise: level of background noise.
    """

    gender: str = UNKNOWN
    pitch: str = UNKNOWN
    range: str = UNKNOWN
    rate: str = UNKNOWN
    loudness: str = UNKNOWN
    pauses: str = UNKNOWN
    noise: str = UNKNOWN


@dataclass(frozen=True)
class Utterance:
    """What one speaker says in one turn of a dialogue.

    Args:
        id: the utterance's id in its data set, unique in its dialogue.
        speaker: name or number of the speaker, as in the data set.
        text: what is said; never empty.
        description: how it is said (the voice description), or None if the data set has none.
        start_s: start in the source recording, in seconds, or None if unknown.
        end_s: end in the source recording, in seconds, or None if unknown.
        clip: the media file, relative to the dataset's root, or a part of one (``talk.mp4#t=1.500,3.000``: from second
            1.5 to 3); None if there is none.
        marks: spans of known information, for when this utterance is a target (only generated data have them).
        attributes: the description's attributes, or None if there is no description.
        audio: the media file of the turn's audio, named as `clip`, where that is another one; None: `clip`.
    """

    id: str
    speaker: str
    text: str
    description: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    clip: str | None = None
    marks: tuple[Mark, ...] = ()
    attributes: VoiceAttributes | None = None
    audio: str | None = None

    def clip_of(self, stream: str) -> str | None:
        """The media file that a stream is read from, or None if there is none."""
        return self.audio or self.clip if stream == "audio" else self.clip

    @property
    def clips(self) -> tuple[str, ...]:
        """The turn's media files: none, one, or one for each stream."""
        return tuple(dict.fromkeys(name for name in (self.clip, self.audio) if name))


@dataclass(frozen=True)
class Dialogue:
    """Turns in order: the unit of storage, shuffling and splitting.

    Args:
        id: ``dataset/split/dialogue``, for example ``meld/train/dia12``.
        split: ``train``, ``val`` or ``test``.
        utterances: the turns, in the order in which they are spoken.
    """

    id: str
    split: str
    utterances: tuple[Utterance, ...]

    @property
    def num_samples(self) -> int:
        """Targets of the dialogue: every turn but the first."""
        return max(len(self.utterances) - 1, 0)

    def to_json(self) -> dict[str, Any]:
        """The dialogue as plain values; `from_json` reads it back to an equal object."""
        value = asdict(self)
        for utterance in value["utterances"]:
            for key in ("attributes", "audio"):  # data without them keeps its bytes and its hash
                if utterance[key] is None:
                    del utterance[key]
        return value

    @staticmethod
    def from_json(value: dict[str, Any]) -> Dialogue:
        """Rebuild a dialogue from `to_json`'s value.

        Example:
            >>> d = Dialogue("demo/train/dia0", "train", (Utterance("0", "Ana", "Hi!"),))
            >>> Dialogue.from_json(d.to_json()) == d
            True
        """
        return msgspec.convert(value, Dialogue)


@dataclass(frozen=True)
class Reply:
    """What the agent says: words, and how they are spoken (None without a description)."""

    text: str
    description: str | None = None


@dataclass(frozen=True)
class Rejection:
    """An unusable item of a data set, and why. Listed in ``rejected.csv``, counted by `reason`.

    Args:
        id: the utterance or dialogue, as far as it is known.
        what: ``row`` (the utterance is dropped) or the stream that it lacks (``audio``, ``video``).
        reason: a short fixed phrase, by which rejections are counted.
        file: the file it concerns.
        row: line of that file (the header is line 1), or None.
        found: what was found there.
    """

    id: str
    what: str
    reason: str
    file: str
    row: int | None = None
    found: str = ""


class Segment(NamedTuple):
    """The position and structure of one row of a packed batch: a trunk, then its branches one after another.

    Args:
        start: first token of the trunk.
        trunk: tokens of the trunk; each sees the trunk up to itself.
        branches: (tokens, cut) of each branch; its tokens see the first `cut` tokens of the trunk, and their own branch
            up to themselves.
    """

    start: int
    trunk: int
    branches: tuple[tuple[int, int], ...] = ()

    @property
    def stop(self) -> int:
        """One past the row's last token."""
        return self.start + self.trunk + sum(tokens for tokens, _ in self.branches)


@dataclass
class StreamBatch:
    """One stream's features in a batch, each utterance once, and the positions that its query vectors fill.

    Utterances of similar length are grouped, so that there is little padding.

    Args:
        features: per group (N, T, D) float16, padded with zeros.
        lengths: per group (N,) real frames of each utterance.
        places: (P,) index into the flattened (B*L) token positions.
        sources: (P,) index into the flattened connector outputs of all groups (sum of N * Q), for each place.
    """

    features: list[Tensor]
    lengths: list[Tensor]
    places: Tensor
    sources: Tensor


@dataclass
class Batch:
    """Tokenized dialogues, and the K tokens to be predicted.

    Packed: all rows follow each other in a single line (B = 1) without padding, and `segments` defines which tokens
    attend to which. Otherwise each row is a plain causal sequence, padded, and `attention_mask` marks real tokens.

    Args:
        input_ids: (B, L) token ids, 0 where a media slot or padding stands.
        position_ids: (B, L) each token's position in its own sample.
        segments: the rows of a packed batch, or None.
        attention_mask: (B, L) bool, True for real tokens; None in a packed batch.
        predictors: (K,) index into the flattened (B*L) positions: the token before each target token.
        labels: (K,) the target tokens.
        kinds: (K,) index into `prompt.TOKEN_KINDS`.
        targets: (K,) index into `target_ids`.
        streams: stream name -> its features and positions; streams without any utterance are omitted.
        target_ids: (dialogue id, turn) of each target; of a turn with preferences, each of its replies is one.
        pairs: (P, 2) index into `target_ids` of a reply, and of one that it is to be preferred to; None without
            preferences.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: list[Segment] | None
    attention_mask: Tensor | None
    predictors: Tensor
    labels: Tensor
    kinds: Tensor
    targets: Tensor
    streams: dict[str, StreamBatch]
    target_ids: list[tuple[str, int]]
    pairs: Tensor | None = None

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while it computes; torch's loaders call it."""
        import torch
        from lightning.fabric.utilities.apply_func import apply_to_collection

        return apply_to_collection(self, torch.Tensor, torch.Tensor.pin_memory)
