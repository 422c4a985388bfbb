"""Shards of a split -> dialogues: turns -> tokens, features -> frames per turn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch.utils.data import Dataset

from msenc.data.collate import Features
from msenc.models.layers import layers_of, select_layers
from msenc.prompt import DialogueTokenizer, TokenizedDialogue
from msenc.store.flags import FilteredReader
from msenc.store.location import Place
from msenc.store.shards import ShardReader
from msenc.types import Dialogue, MsencError


@dataclass(frozen=True)
class StreamSpec:
    """What the model expects of a stream.

    Args:
        name: the encoder's name; features are in ``<stream>-<name>/``.
        dim: their width D; of several layers of an encoder, that of each.
        num_queries: tokens Q that its connector gives per utterance.
        settings: the encoder's config; the features must have been made with the same, but for `RUN_ONLY`, and may
            hold more layers.
    """

    name: str
    dim: int
    num_queries: int
    settings: Mapping[str, Any] = field(default_factory=dict)


Sample = tuple[TokenizedDialogue, Features]


class DialogueDataset(Dataset):
    """The dialogues of a split that have a target: index -> (tokens, features).

    Args:
        folder: the prepared data.
        split: ``train``, ``val`` or ``test``.
        streams: the streams to read; no other stream's file is opened.
        tokenizer: for the turns; every dialogue is tokenized once per process.
        verify: hash the shards first.
        hint: what to do if something is missing, for messages.
        left_out: ids excluded by a filter; see `msenc.store.flags.left_out`.
    """

    def __init__(
        self,
        folder: Place,
        split: str,
        streams: Mapping[str, StreamSpec],
        tokenizer: DialogueTokenizer,
        verify: bool = True,
        hint: str = "",
        left_out: frozenset[str] = frozenset(),
    ) -> None:
        self.split = split
        self.tokenizer = tokenizer
        self.turns = ShardReader(folder / "turns", split, verify, hint=hint)
        self.streams = {
            stream: ShardReader(folder / f"{stream}-{spec.name}", split, verify, hint=hint)
            for stream, spec in streams.items()
        }
        if left_out:
            turns = self.turns
            self.turns = FilteredReader(turns, turns, left_out)
            self.streams = {name: FilteredReader(reader, turns, left_out) for name, reader in self.streams.items()}
        self.ids = [id for id, lengths in zip(self.turns.ids, self.turns.lengths, strict=True) if len(lengths) > 1]
        if not self.ids:
            raise MsencError(
                f"{folder}: the split {split!r} has no dialogue of two or more turns"
                f"{' that data.filter keeps' if left_out else ''}, so there is nothing to train or evaluate on."
            )
        self._lengths = {s: dict(zip(r.ids, r.lengths, strict=True)) for s, r in self.streams.items()}
        self._layers = {
            stream: (layers_of(self.streams[stream].settings), layers_of(spec.settings))
            for stream, spec in streams.items()
        }
        self._dims = {s: spec.dim * (len(self._layers[s][0]) or 1) for s, spec in streams.items()}
        self._tokenized: dict[str, TokenizedDialogue] = {}

    def __len__(self) -> int:
        """Dialogues with at least one target."""
        return len(self.ids)

    def dialogue(self, index: int) -> Dialogue:
        """The turns as they were annotated."""
        return Dialogue.from_json(self.turns.read(self.ids[index])["turns.json"])

    def frames(self, index: int) -> list[dict[str, int]]:
        """Per turn the frames of each stream that it has, by the indexes; no feature is read."""
        lengths = {stream: known[self.ids[index]] for stream, known in self._lengths.items()}
        num_turns = len(self.dialogue(index).utterances)
        return [{stream: known[k] for stream, known in lengths.items() if known[k]} for k in range(num_turns)]

    def tokens(self, index: int) -> TokenizedDialogue:
        """The turns as the model reads them; no feature is read."""
        id = self.ids[index]
        if id not in self._tokenized:
            self._tokenized[id] = self.tokenizer(self.dialogue(index), self.frames(index))
        return self._tokenized[id]

    def features(self, index: int) -> Features:
        """Per stream each turn's frames (T, D) float16, or (T, K*D) of K layers; None where a turn has none."""
        features = {}
        for stream, reader in self.streams.items():
            members = reader.read(self.ids[index])
            frames, offsets = members["features.npy"], members["offsets.npy"]
            if frames.shape[1] != self._dims[stream]:
                raise MsencError(
                    f"{reader.folder}, {self.ids[index]}: found features {frames.shape[1]} wide, dataset.json says "
                    f"{self._dims[stream]}. Prepare the data again."
                )
            frames = select_layers(frames, *self._layers[stream])
            features[stream] = [frames[a:b] if b > a else None for a, b in pairwise(offsets)]
        return features

    def __getitem__(self, index: int) -> Sample:
        """Tokens and features."""
        return self.tokens(index), self.features(index)
