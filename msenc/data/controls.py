"""Controls replace a stream's content but keep its form: what a model loses is what it had used.

sample of a `DialogueDataset` -> the same sample, its stream from another dialogue, zero, or noise. Targets stay, and so
do the turns that make up each history, and which of them have the stream.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from msenc.data.collate import Features
from msenc.data.dataset import DialogueDataset
from msenc.prompt import TokenizedDialogue
from msenc.types import Dialogue, MsencError

KINDS = {
    "shuffle": "of another dialogue",
    "zero": "zeros",
    "noise": "normal noise with the training data's mean and spread in each dimension",
}
"""Kind of control -> what replaces the stream."""

MOMENT_UTTERANCES = 1000
"""Number of training utterances from which a stream's mean and standard deviation are computed."""

Moments = tuple[np.ndarray, np.ndarray]
"""Mean and standard deviation of a stream's features, (D,) float32 each."""


@dataclass(frozen=True)
class Control:
    """Which stream is replaced by what.

    Args:
        kind: one of `KINDS`.
        stream: a stream of the run, or ``text``: the words of the history.
    """

    kind: str
    stream: str

    def __str__(self) -> str:
        return f"{self.kind}_{self.stream}"

    @property
    def is_drawn(self) -> bool:
        """Whether its draws differ."""
        return self.kind != "zero"


def read_controls(given: str | Sequence[str] | None, streams: Iterable[str]) -> list[Control]:
    """Names of controls, or ``shuffle`` for `shuffle_<stream>` of the text and of every stream.

    Raises:
        MsencError: an unknown control, or one of a stream that the run lacks; names those that exist.

    Example:
        >>> [str(c) for c in read_controls("shuffle", ["audio"])], read_controls(None, ["audio"])
        (['shuffle_text', 'shuffle_audio'], [])
    """
    known = [Control("shuffle", "text"), *(Control(kind, stream) for stream in streams for kind in KINDS)]
    by_name = {str(control): control for control in known}
    found = []
    for name in [given] if isinstance(given, str) else given or ():
        if name == "shuffle":
            found += [control for control in known if control.kind == "shuffle"]
        elif name in by_name:
            found.append(by_name[name])
        else:
            raise MsencError(
                f"control={name}: this run has no such control. Expected one of: shuffle (all streams), "
                f"{', '.join(by_name)}."
            )
    return list(dict.fromkeys(found))


def moments(features: Iterable[Features], stream: str) -> Moments:
    """Mean and standard deviation of a stream over the first `MOMENT_UTTERANCES` utterances that have it."""
    present = (frames for one in features for frames in one[stream] if frames is not None)
    count, total, squares = 0, 0.0, 0.0
    for frames in islice(present, MOMENT_UTTERANCES):
        count += len(frames)
        total = total + frames.sum(axis=0, dtype=np.float64)
        squares = squares + np.square(frames, dtype=np.float64).sum(axis=0)
    mean = np.asarray(total / count)
    spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), spread.astype(np.float32)


class ControlledDialogues(Dataset):
    """A `DialogueDataset` under a control.

    Args:
        dialogues: of the split.
        control: which stream is replaced by what.
        seed: of the draws.
        draw: which of several draws; for ``shuffle``, no two of them take a turn from the same dialogue, as far as the
            split has enough dialogues.
        moments: of the stream; ``noise`` needs them.

    Raises:
        MsencError: ``shuffle`` with fewer than two dialogues that have the stream.
    """

    def __init__(
        self,
        dialogues: "DialogueDataset | ControlledDialogues",
        control: Control,
        seed: int,
        draw: int = 0,
        moments: Moments | None = None,
    ) -> None:
        self.dialogues = dialogues
        self.control = control
        self.seed, self.draw = seed, draw
        self.moments = moments
        self.split, self.tokenizer, self.ids = dialogues.split, dialogues.tokenizer, dialogues.ids
        self.turns, self.streams = dialogues.turns, dialogues.streams
        self._donors = self._choose_donors() if control.kind == "shuffle" else {}

    def _choose_donors(self) -> dict[int, int]:
        """Index -> the dialogue whose stream it gets: a random cycle through all dialogues that have the stream."""
        having = np.arange(len(self.ids))
        if self.control.stream != "text":
            having = np.array([i for i in having if any(self.control.stream in turn for turn in self.frames(i))], int)
        if len(having) < 2:
            raise MsencError(
                f"{self.control}: dialogues of the split {self.split!r} that have {self.control.stream}: "
                f"{len(having)}, expected two or more, to swap between."
            )
        order = np.random.default_rng(self.seed).permutation(having)
        step = 1 + self.draw % (len(order) - 1)
        return dict(zip(order.tolist(), np.roll(order, -step).tolist(), strict=True))

    def __len__(self) -> int:
        """Dialogues with at least one target."""
        return len(self.ids)

    def dialogue(self, index: int) -> Dialogue:
        """The turns as they were annotated."""
        return self.dialogues.dialogue(index)

    def frames(self, index: int) -> list[dict[str, int]]:
        """As `DialogueDataset.frames`: of the dialogue's own streams."""
        return self.dialogues.frames(index)

    def tokens(self, index: int) -> TokenizedDialogue:
        """As `DialogueDataset.tokens`, under the control."""
        tokens = self.dialogues.tokens(index)
        return self._shuffle_words(tokens, index) if self.control.stream == "text" else tokens

    def features(self, index: int) -> Features:
        """As `DialogueDataset.features`, under the control."""
        features, stream = self.dialogues.features(index), self.control.stream
        if stream == "text":
            return features
        if self.control.kind == "shuffle":
            keep_lengths = bool(self.dialogues.tokens(index).windows)
            replaced = self._shuffle(features[stream], index, keep_lengths)
        elif self.control.kind == "zero":
            replaced = [None if frames is None else np.zeros_like(frames) for frames in features[stream]]
        else:
            replaced = self._noise(features[stream], self.ids[index])
        return {**features, stream: replaced}

    def __getitem__(self, index: int) -> tuple[TokenizedDialogue, Features]:
        """As `DialogueDataset`, under the control."""
        return self.tokens(index), self.features(index)

    def _shuffle(self, turns: Sequence[Any], index: int, keep_lengths: bool) -> list[Any]:
        if index not in self._donors:  # it has nothing to replace
            return list(turns)
        donor = [f for f in self.dialogues.features(self._donors[index])[self.control.stream] if f is not None]
        replaced = [None if frames is None else donor[k % len(donor)] for k, frames in enumerate(turns)]
        if keep_lengths:  # the prompt's windows count frames, and should keep the same turns
            pairs = zip(turns, replaced, strict=True)
            replaced = [f if f is None else np.resize(f, (len(own), f.shape[1])) for own, f in pairs]
        return replaced

    def _noise(self, turns: Sequence[Any], id: str) -> list[Any]:
        mean, spread = self.moments
        random = np.random.default_rng([self.seed, self.draw, zlib.crc32(f"{id} {self.control}".encode())])
        return [
            f if f is None else (mean + spread * random.standard_normal(f.shape, np.float32)).astype(f.dtype)
            for f in turns
        ]

    def _shuffle_words(self, tokens: TokenizedDialogue, index: int) -> TokenizedDialogue:
        """The words come from another dialogue; the speakers and the target stay."""
        dialogue, donor = self.dialogue(index), self.dialogue(self._donors[index]).utterances
        said = tuple(replace(u, text=donor[k % len(donor)].text) for k, u in enumerate(dialogue.utterances))
        # `turn_tokens` and `windows` stay those of the dialogue's own words, so the history has the same turns.
        return replace(tokens, turns=self.tokenizer.turns(replace(dialogue, utterances=said), self.frames(index)))


@dataclass(frozen=True)
class Swap:
    """Which turns get the stream of which others.

    Args:
        stream: a stream of the run.
        donors: (index of a dialogue, turn) -> those of the turn whose frames it gets; both have the stream.
    """

    stream: str
    donors: Mapping[tuple[int, int], tuple[int, int]]


class SwappedTurns(Dataset):
    """A `DialogueDataset` after a swap; turns without a donor stay as they are.

    Args:
        dialogues: of the split.
        swap: the donors.
    """

    def __init__(self, dialogues: "DialogueDataset | ControlledDialogues", swap: Swap) -> None:
        self.dialogues, self.swap = dialogues, swap

    def __getitem__(self, index: int) -> tuple[TokenizedDialogue, Features]:
        """As `DialogueDataset`, with swapped frames."""
        tokens, features = self.dialogues[index]
        stream, replaced = self.swap.stream, []
        for turn, frames in enumerate(features[self.swap.stream]):
            if (index, turn) in self.swap.donors:
                donor, its_turn = self.swap.donors[index, turn]
                swapped = self.dialogues.features(donor)[stream][its_turn]
                # The prompt's windows count frames, and should keep the same turns.
                frames = np.resize(swapped, (len(frames), swapped.shape[1])) if tokens.windows else swapped
            replaced.append(frames)
        return tokens, {**features, stream: replaced}
