"""Prepared shards -> batches. Checks at `setup` that what was prepared is what the model expects.

turns/, audio-<name>/, video-<name>/ -> DialogueDataset -> collate -> Batch
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from msenc.data.collate import Features, Layout, collate, dialogue_rows, history_starts
from msenc.data.location import Place, RemotePath
from msenc.data.manifest import DatasetManifest
from msenc.data.shards import ShardReader, read_index
from msenc.prompt import DialogueTokenizer, TokenizedDialogue
from msenc.types import SPLITS, Batch, Dialogue, MsencError


@dataclass(frozen=True)
class StreamSpec:
    """What the model expects of a stream.

    Args:
        name: the encoder's name; features lie in ``<stream>-<name>/``.
        dim: their width D.
        num_queries: tokens Q that its connector gives per utterance.
        settings: the encoder's config; the features must have been made with the same, but for `RUN_ONLY`.
    """

    name: str
    dim: int
    num_queries: int
    settings: Mapping[str, Any] = field(default_factory=dict)


RUN_ONLY = ("device", "batch_s", "batch_frames")
"""Settings of encoders that change how fast features are made, and not what they are."""

Sample = tuple[TokenizedDialogue, Features]


class DialogueDataset(Dataset):
    """The dialogues of a split that hold a target: index -> (tokens, features).

    Args:
        folder: the prepared data.
        split: ``train``, ``val`` or ``test``.
        streams: the streams to read; no other stream's file is opened.
        tokenizer: makes tokens of turns; every dialogue is tokenized once per process.
        verify: hash the shards first.
        hint: what to do where something is missing, for messages.
    """

    def __init__(
        self,
        folder: Place,
        split: str,
        streams: Mapping[str, StreamSpec],
        tokenizer: DialogueTokenizer,
        verify: bool = True,
        hint: str = "",
    ) -> None:
        self.split = split
        self.tokenizer = tokenizer
        self.turns = ShardReader(folder / "turns", split, verify, hint=hint)
        self.streams = {
            stream: ShardReader(folder / f"{stream}-{spec.name}", split, verify, hint=hint)
            for stream, spec in streams.items()
        }
        self.ids = [id for id, lengths in zip(self.turns.ids, self.turns.lengths, strict=True) if len(lengths) > 1]
        if not self.ids:
            raise MsencError(
                f"{folder}: the split {split!r} holds no dialogue of two turns or more, so nothing to learn or measure."
            )
        self._tokenized: dict[str, TokenizedDialogue] = {}

    def __len__(self) -> int:
        """Dialogues with at least one target."""
        return len(self.ids)

    def dialogue(self, index: int) -> Dialogue:
        """The turns as they were annotated."""
        return Dialogue.from_json(self.turns.read(self.ids[index])["turns.json"])

    def __getitem__(self, index: int) -> Sample:
        """Tokens, and per stream each turn's frames (T, D) float16, None where a turn has none."""
        id = self.ids[index]
        features = {}
        for stream, reader in self.streams.items():
            members = reader.read(id)
            frames, offsets = members["features.npy"], members["offsets.npy"]
            features[stream] = [frames[a:b] if b > a else None for a, b in pairwise(offsets)]
        if id not in self._tokenized:
            dialogue = self.dialogue(index)
            present = [
                [stream for stream in features if features[stream][k] is not None]
                for k in range(len(dialogue.utterances))
            ]
            self._tokenized[id] = self.tokenizer(dialogue, present)
        return self._tokenized[id], features


def collate_samples(
    samples: Sequence[Sample], budget: int, num_queries: Mapping[str, int], layout: Layout = "dialogue"
) -> Batch:
    """Samples -> training batch: every target of every dialogue."""
    dialogues = [dialogue for dialogue, _ in samples]
    rows = [dialogue_rows(dialogue, budget, num_queries, layout) for dialogue in dialogues]
    return collate(dialogues, [features for _, features in samples], rows, num_queries, pack=layout == "dialogue")


class EpochShuffle(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone; of several processes, each takes every n-th of it.

    Where the number does not divide by the processes, the first ones of the order come again.

    Example:
        >>> sampler = EpochShuffle(4, seed=1)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(first) == sorted(sampler), list(sampler) == list(sampler)
        (True, True)
    """

    def __init__(self, num: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num = num
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of indices that this process gets."""
        return -(-self.num // self.world_size)

    def __iter__(self) -> Iterator[int]:
        """The epoch's order."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num).tolist()
        order += order[: len(self) * self.world_size - self.num]
        return iter(order[self.rank :: self.world_size])


class DialogueDataModule(L.LightningDataModule):
    """Loaders of a prepared data set.

    Args:
        folder: the prepared data (`prepare.py` wrote it), or a copy of it behind a URL.
        streams: what the model expects; checked against what was prepared.
        tokenizer: of the run's prompt and LLM.
        layout: see `collate.dialogue_rows`.
        batch_size: dialogues per batch and process.
        num_workers: loader processes.
        max_history_tokens: see `collate.history_starts`.
        seed: of the order of training dialogues.
        verify: hash the shards before their first use.
        prepare_command: what to run where data is missing, for messages.
    """

    def __init__(
        self,
        folder: Place,
        streams: Mapping[str, StreamSpec],
        tokenizer: DialogueTokenizer,
        layout: Layout = "dialogue",
        batch_size: int = 8,
        num_workers: int = 0,
        max_history_tokens: int = 1024,
        seed: int = 1,
        verify: bool = True,
        prepare_command: str = "python prepare.py",
    ) -> None:
        super().__init__()
        self.folder = folder
        self.streams = dict(streams)
        self.tokenizer = tokenizer
        self.layout: Layout = layout
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_history_tokens = max_history_tokens
        self.seed = seed
        self.verify = verify
        self.hint = f"Run: {prepare_command}"
        if isinstance(folder, RemotePath):
            self.hint += f", and copy the folder to {folder}"
        self._datasets: dict[str, DialogueDataset] = {}

    @property
    def num_queries(self) -> dict[str, int]:
        """Tokens that each stream's slot takes."""
        return {stream: spec.num_queries for stream, spec in self.streams.items()}

    def setup(self, stage: str | None = None) -> None:
        """Check what was prepared, before any weight is loaded."""
        self.manifest = check_prepared(self.folder, self.streams, self.hint)

    def dataset(self, split: str) -> DialogueDataset:
        """The split's dialogues; opened, and verified, at the first call."""
        if split not in SPLITS:
            raise MsencError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}.")
        if split not in self._datasets:
            self._datasets[split] = DialogueDataset(
                self.folder, split, self.streams, self.tokenizer, self.verify, self.hint
            )
        return self._datasets[split]

    def collate_fn(self) -> Callable[[Sequence[Sample]], Batch]:
        """Samples -> Batch, with this module's budget and layout."""
        return partial(
            collate_samples, budget=self.max_history_tokens, num_queries=self.num_queries, layout=self.layout
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew each epoch."""
        dataset = self.dataset("train")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        shuffle = EpochShuffle(len(dataset), self.seed, rank, world_size)
        return self._loader(dataset, BatchSampler(shuffle, self.batch_size, drop_last=False))

    def val_dataloader(self) -> DataLoader:
        """In the order of the shards."""
        return self.eval_dataloader("val")

    def eval_dataloader(self, split: str, limit: int | None = None) -> DataLoader:
        """A split in order; with `limit`, its first dialogues."""
        dataset = self.dataset(split)
        order = range(min(len(dataset), limit or len(dataset)))
        return self._loader(dataset, batch_sampler=BatchSampler(order, self.batch_size, drop_last=False))

    def _loader(self, dataset: DialogueDataset, batch_sampler: BatchSampler) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn(),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def dropped_turns(self, split: str, limit: int | None = None) -> dict[str, int]:
        """How many turns of history the split's targets have, and how many of them the budget drops."""
        dataset = self.dataset(split)
        count = {"targets": 0, "targets_cut": 0, "history_turns": 0, "dropped_turns": 0}
        for index in range(min(len(dataset), limit or len(dataset))):
            dialogue = dataset.dialogue(index)
            turn_tokens = self.tokenizer(dialogue, [()] * len(dialogue.utterances)).turn_tokens
            for turn, start in enumerate(history_starts(turn_tokens, self.max_history_tokens), start=1):
                count["targets"] += 1
                count["targets_cut"] += start > 0
                count["history_turns"] += turn
                count["dropped_turns"] += start
        return count

    def described_targets(self, split: str) -> int:
        """How many of the split's targets have a voice description."""
        dataset = self.dataset(split)
        return sum(
            utterance.description is not None
            for index in range(len(dataset))
            for utterance in dataset.dialogue(index).utterances[1:]
        )


def check_prepared(folder: Place, streams: Mapping[str, StreamSpec], hint: str) -> DatasetManifest:
    """Compare what was prepared with what the model expects.

    Raises:
        MsencError: nothing prepared, a stream that was not, or for no clip; features of another width or made
            with other settings (it names both); shards other than the manifest's.
    """
    manifest = DatasetManifest.read(folder, hint)
    hashes = {"turns": manifest.turns_hash}
    for stream, spec in streams.items():
        wanted = f"{stream}-{spec.name}"
        prepared = {name: info.dim for name, info in manifest.streams.items() if info.kind == stream}
        if wanted not in prepared:
            there = ", ".join(f"{name} ({dim} wide)" for name, dim in prepared.items()) or f"no {stream} features"
            raise MsencError(f"{folder}: prepared is {there}; the config wants {wanted} ({spec.dim} wide). {hint}")
        if prepared[wanted] != spec.dim:
            raise MsencError(
                f"{folder}: the features {wanted} are {prepared[wanted]} wide, the config says "
                f"model.streams.{stream}.dim={spec.dim}. Correct the config, or prepare anew. {hint}"
            )
        made_with = manifest.streams[wanted].settings
        differ = [
            f"{key}={made_with.get(key)}, the config says {value}"
            for key, value in spec.settings.items()
            if key not in RUN_ONLY and made_with.get(key) != value
        ]
        if differ:
            raise MsencError(
                f"{folder}: the features {wanted} were made with {'; '.join(differ)}. Correct the config, or prepare "
                f"them anew, under another model.streams.{stream}.name if the old ones are to stay. {hint}"
            )
        if not manifest.streams[wanted].utterances.get("train"):
            raise MsencError(
                f"{folder}: no utterance of the split train has {stream}: {folder / 'rejected.csv'} says why. Does "
                "data.root name the folder that holds the clips?"
            )
        hashes[wanted] = manifest.streams[wanted].hash
    for name, expected in hashes.items():
        found = read_index(folder / name, hint)["hash"]
        if found != expected:
            raise MsencError(
                f"{folder / name}: found shards with hash {found[:12]}, dataset.json expects {expected[:12]}: a "
                f"preparation ended before its time, so turns and features may not belong together. {hint}"
            )
    return manifest
