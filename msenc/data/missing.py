"""Turns without a stream: dropped at random in training (modality dropout), or in an evaluation of what they are worth.

A turn whose stream is dropped is a turn that never had it: its slot is missing from the prompt, too. What is dropped
depends only on the seed, the epoch and the turn, so a resumed run drops the same.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from msenc.data.batches import Unit
from msenc.data.collate import Features
from msenc.data.controls import ControlledDialogues
from msenc.data.dataset import DialogueDataset
from msenc.data.loader import UnitSample
from msenc.prompt import TokenizedDialogue
from msenc.types import Dialogue, MsencError


def check_drop(drop: Mapping[str, float], streams: Sequence[str], key: str = "data.drop") -> None:
    """Refuse a stream that the run does not read.

    Raises:
        MsencError: names the run's streams.
    """
    for stream in drop:
        if stream not in streams:
            raise MsencError(
                f"{key}: found {stream}, but this run reads no such stream. Expected some of: "
                f"{', '.join(streams) or 'none, since its modality is text'}."
            )


class DroppedDialogues(Dataset):
    """A `DialogueDataset` in which a random share of the turns lacks a stream.

    A turn that lacks it at one share lacks it at all higher ones, too.

    Args:
        dialogues: of the split.
        drop: stream -> share of its turns that are dropped.
        seed: of the draws.
        epoch: other epochs drop other turns.
    """

    def __init__(
        self,
        dialogues: "DialogueDataset | ControlledDialogues",
        drop: Mapping[str, float],
        seed: int,
        epoch: int = 0,
    ) -> None:
        self.dialogues = dialogues
        self.drop = drop
        self.seed, self.epoch = seed, epoch
        self.split, self.tokenizer, self.ids = dialogues.split, dialogues.tokenizer, dialogues.ids
        self.turns, self.streams = dialogues.turns, dialogues.streams

    def __len__(self) -> int:
        """Dialogues with at least one target."""
        return len(self.ids)

    def dialogue(self, index: int) -> Dialogue:
        """The turns as they were annotated."""
        return self.dialogues.dialogue(index)

    def _lacking(self, stream: str, index: int, turns: int) -> np.ndarray:
        """Which turns are dropped, (turns,) bool."""
        name = zlib.crc32(f"{self.ids[index]} {stream}".encode())
        return np.random.default_rng([self.seed, self.epoch, name]).random(turns) < self.drop[stream]

    def frames(self, index: int) -> list[dict[str, int]]:
        """As `DialogueDataset.frames`, without what is dropped."""
        frames = self.dialogues.frames(index)
        lacking = {stream: self._lacking(stream, index, len(frames)) for stream in self.drop}
        return [
            {stream: count for stream, count in turn.items() if stream not in lacking or not lacking[stream][k]}
            for k, turn in enumerate(frames)
        ]

    def tokens(self, index: int) -> TokenizedDialogue:
        """As `DialogueDataset.tokens`; histories keep the turns that they have with all streams."""
        tokens, before, after = self.dialogues.tokens(index), self.dialogues.frames(index), self.frames(index)
        if before == after:
            return tokens
        blocks = self.tokenizer.turns(self.dialogue(index), after)
        kept = (own if a == b else new for own, new, a, b in zip(tokens.turns, blocks, before, after, strict=True))
        return replace(tokens, turns=tuple(kept))

    def features(self, index: int) -> Features:
        """As `DialogueDataset.features`, None where a stream is dropped."""
        features = dict(self.dialogues.features(index))
        for stream in self.drop:
            lacking = self._lacking(stream, index, len(features[stream]))
            features[stream] = [None if gone else f for f, gone in zip(features[stream], lacking, strict=True)]
        return features

    def __getitem__(self, index: int) -> tuple[TokenizedDialogue, Features]:
        """As `DialogueDataset`, without what is dropped."""
        return self.tokens(index), self.features(index)


class DroppedUnits(Dataset):
    """Number of a unit in an epoch -> (tokens, features, targets wanted), as `UnitDataset` of `DroppedDialogues`.

    Loader processes outlive an epoch, so the epoch is part of the number: ``epoch * len(units) + unit``.

    Args:
        dialogues: of the split.
        units: of the split.
        drop: as in `DroppedDialogues`.
        seed: as in `DroppedDialogues`.
    """

    def __init__(
        self,
        dialogues: DialogueDataset | ControlledDialogues,
        units: Sequence[Unit],
        drop: Mapping[str, float],
        seed: int,
    ) -> None:
        self.dialogues = dialogues
        self.units = units
        self.drop, self.seed = drop, seed

    def numbers(self, batches: Sequence[Sequence[int]], epoch: int) -> list[list[int]]:
        """Batches of units -> of their numbers in the epoch."""
        return [[epoch * len(self.units) + unit for unit in batch] for batch in batches]

    def __getitem__(self, number: int) -> UnitSample:
        """The unit's dialogue, and which of its targets belong to the unit (None: all)."""
        epoch, place = divmod(number, len(self.units))
        unit = self.units[place]
        return *DroppedDialogues(self.dialogues, self.drop, self.seed, epoch)[unit.dialogue], unit.turns
