"""The shapes that every layer shares; nothing here imports the rest of msenc.

Letters used in all docstrings and shape comments:

    B batch rows      U utterances      T frames of one utterance     D feature width
    Q queries         L tokens of a row  H hidden width of the LLM     V vocabulary
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command lines' --help must not wait for torch
    from torch import Tensor

SPLITS = ("train", "val", "test")


class MsencError(Exception):
    """A refusal: says what was found, what was expected, and what to do. Shown without a traceback."""


@dataclass(frozen=True)
class Mark:
    """A span of a target whose information is known, so that a model can be scored on it alone.

    Args:
        kind: what tells this span's content: ``text``, ``audio``, ``video`` or ``both``.
        field: which part of the target holds it: ``text`` or ``description``.
        start: first character of the span in that field.
        end: one past the last character.
        bits: information of the span in bits, given all that stands before it in the target.
    """

    kind: str
    field: str
    start: int
    end: int
    bits: float = 1.0


@dataclass(frozen=True)
class Utterance:
    """One turn of a dialogue.

    Args:
        id: the utterance's own id in its dataset, unique in its dialogue.
        speaker: name or number of who speaks, as the dataset writes it.
        text: what is said; never empty.
        description: how it is said (the voice description), or None where the dataset has none.
        start_s: start in the source recording, in seconds, or None where unknown.
        end_s: end in the source recording, in seconds.
        clip: the media file, relative to the dataset's root, or None where there is none.
        marks: spans of known information, when this utterance is a target (only the demo has them).
    """

    id: str
    speaker: str
    text: str
    description: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    clip: str | None = None
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """Turns in order: the unit of storage, shuffling and split.

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
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Dialogue:
        """Rebuild a dialogue from `to_json`'s value.

        Example:
            >>> d = Dialogue("demo/train/dia0", "train", (Utterance("0", "Ana", "Hi!"),))
            >>> Dialogue.from_json(d.to_json()) == d
            True
        """
        utterances = tuple(
            Utterance(**{**u, "marks": tuple(Mark(**m) for m in u["marks"])}) for u in value["utterances"]
        )
        return Dialogue(id=value["id"], split=value["split"], utterances=utterances)


@dataclass(frozen=True)
class Reply:
    """What the agent says: words, and how they are spoken (None where no description is given)."""

    text: str
    description: str | None = None


@dataclass(frozen=True)
class Rejection:
    """Something of a dataset that was not used, and why. Listed in ``rejected.csv``, counted by `reason`.

    Args:
        id: the utterance or dialogue, as far as it is known.
        what: ``row`` (the utterance is dropped) or the stream that it lacks (``audio``, ``video``).
        reason: a short fixed phrase, the same for all of one kind, for counting.
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


TRUNK, PADDING = -1, -2
"""Values of `Batch.branch` for tokens that belong to no branch."""


@dataclass
class StreamBatch:
    """One stream's features of a batch, each utterance once, and the places that its queries fill.

    Args:
        features: (N, T, D) float16, padded with zeros.
        lengths: (N,) real frames of each utterance.
        places: (P,) index into the flattened (B*L) token positions.
        sources: (P,) index into the flattened (N*Q) connector outputs, for each place.
    """

    features: Tensor
    lengths: Tensor
    places: Tensor
    sources: Tensor


@dataclass
class Batch:
    """Dialogues in token form; one row is a trunk (instruction and turns) and the branches of its targets.

    Args:
        input_ids: (B, L) token ids, 0 where a media slot or padding stands.
        position_ids: (B, L) each token's position in its own sample.
        branch: (B, L) `TRUNK`, `PADDING`, or the number of the token's branch in its row.
        cut: (B, L) for branch tokens: how many tokens of the trunk they see.
        labels: (B, L) the token itself where it is a target, else -100 (the model shifts them).
        kinds: (B, L) index into `prompt.TOKEN_KINDS` where `labels` holds a target, else -1.
        targets: (B, L) index into `target_ids` where `labels` holds a target, else -1.
        streams: stream name -> its features and places; streams without any utterance are left out.
        target_ids: (dialogue id, turn) of each target.
    """

    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    cut: Tensor
    labels: Tensor
    kinds: Tensor
    targets: Tensor
    streams: dict[str, StreamBatch]
    target_ids: list[tuple[str, int]]
