"""Prepared shards -> batches. `setup` checks that the prepared data match the model.

turns/, audio-<name>/, video-<name>/ -> DialogueDataset -> collate -> Batch
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from msenc.data.batches import (
    SharedBatches,
    Unit,
    budget_batches,
    budget_in_order,
    budget_units,
    count_batches,
    in_order,
    share,
    whole_dialogues,
)
from msenc.data.collate import Layout, histories
from msenc.data.controls import Control, ControlledDialogues, Moments, Swap, SwappedTurns, moments, read_controls
from msenc.data.dataset import DialogueDataset, StreamSpec
from msenc.data.lengths import DialogueLengths, row_tokens, split_lengths
from msenc.data.loader import EpochLoader, UnitDataset, UnitSample, collate_units, make_loader
from msenc.data.missing import DroppedDialogues, DroppedUnits, check_drop
from msenc.models.layers import layers_of
from msenc.prompt import DialogueTokenizer
from msenc.store.flags import FilteredReader, left_out
from msenc.store.location import Place, RemotePath
from msenc.store.manifest import DatasetManifest
from msenc.store.shards import ShardReader, read_index
from msenc.types import SPLITS, Batch, Dialogue, MsencError

NAMED_DIALOGUES = 1000  # the most frequent names are counted in these
RUN_ONLY = ("device", "batch_s", "batch_frames")
"""Encoder settings that affect the speed of extraction, but not the features."""


class DialogueDataModule(L.LightningDataModule):
    """Loaders of a prepared data set.

    Args:
        folder: the prepared data (`prepare.py` wrote it), or a copy of it behind a URL.
        streams: expected by the model; checked against the prepared data.
        tokenizer: of the run's prompt and LLM.
        layout: see `collate.dialogue_rows`.
        batch_size: dialogues per batch of all processes together, or None if `max_tokens_per_batch` is given.
        max_tokens_per_batch: tokens per batch of all processes together, media queries and padding included; a
            dialogue that takes more is split between its targets.
        num_workers: loader processes.
        max_history_tokens: see `collate.history_starts`.
        seed: of the order of training dialogues.
        verify: hash the shards before their first use.
        filters: ``no_<flag>`` each; flagged items are excluded.
        control: replaces a stream in everything that is read, including training; see `data.controls`.
        drop: stream -> share of the turns that lack it in training; see `data.missing`.
        prepare_command: command that creates missing data, for messages.
    """

    def __init__(
        self,
        folder: Place,
        streams: Mapping[str, StreamSpec],
        tokenizer: DialogueTokenizer,
        layout: Layout = "dialogue",
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        num_workers: int = 0,
        max_history_tokens: int = 1024,
        seed: int = 1,
        verify: bool = True,
        filters: Sequence[str] = (),
        control: str | None = None,
        drop: Mapping[str, float] | None = None,
        prepare_command: str = "python prepare.py",
    ) -> None:
        super().__init__()
        _check_size(batch_size, max_tokens_per_batch)
        self.folder = folder
        self.streams = dict(streams)
        self.tokenizer = tokenizer
        self.layout: Layout = layout
        self.batch_size = batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.num_workers = num_workers
        self.max_history_tokens = max_history_tokens
        self.seed = seed
        self.verify = verify
        self.filters = filters
        self.controls = read_controls(control, streams)
        self.drop = dict(drop or {})
        check_drop(self.drop, list(streams))
        self.hint = preparing_hint(folder, prepare_command)
        self._datasets: dict[str, DialogueDataset | ControlledDialogues] = {}
        self._moments: dict[str, Moments] = {}
        self._lengths: dict[str, list[DialogueLengths]] = {}
        self._units: dict[str, list[Unit]] = {}

    @property
    def num_queries(self) -> dict[str, int]:
        """Tokens that each stream's slot takes."""
        return {stream: spec.num_queries for stream, spec in self.streams.items()}

    @cached_property
    def left_out(self) -> frozenset[str]:
        """Ids excluded by the filters."""
        if not self.filters:
            return frozenset()
        return left_out(self.folder, self.filters, DatasetManifest.read(self.folder, self.hint), self.hint)

    def setup(self, stage: str | None = None) -> None:
        """Check the prepared data, before any weight is loaded."""
        self.manifest = check_prepared(self.folder, self.streams, self.hint)
        self.left_out  # noqa: B018 (a filter that cannot be applied is refused here)

    def dataset(self, split: str) -> DialogueDataset | ControlledDialogues:
        """The split's dialogues; opened, and verified, at the first call."""
        if split not in SPLITS:
            raise MsencError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}.")
        if split not in self._datasets:
            dataset = DialogueDataset(
                self.folder, split, self.streams, self.tokenizer, self.verify, self.hint, self.left_out
            )
            for control in self.controls:
                dataset = self.controlled(dataset, control)
            self._datasets[split] = dataset
        return self._datasets[split]

    def controlled(
        self, dialogues: DialogueDataset | ControlledDialogues, control: Control | Swap, draw: int = 0
    ) -> ControlledDialogues | SwappedTurns:
        """The same dialogues under a control; see `ControlledDialogues` and `SwappedTurns`."""
        if isinstance(control, Swap):
            return SwappedTurns(dialogues, control)
        stream = control.stream
        if control.kind == "noise" and stream not in self._moments:
            own = dialogues
            if own.split != "train":
                own = DialogueDataset(
                    self.folder, "train", self.streams, self.tokenizer, self.verify, self.hint, self.left_out
                )
            self._moments[stream] = moments(map(own.features, range(len(own))), stream)
        return ControlledDialogues(dialogues, control, self.seed, draw, self._moments.get(stream))

    def dialogues(self, split: str) -> Iterator[Dialogue]:
        """The split's dialogues as annotated; none if the data has no such split.

        Only opens the turns, no stream's files.
        """
        if self.manifest.splits.get(split) is None:
            return
        turns = ShardReader(self.folder / "turns", split, self.verify, hint=self.hint)
        if self.left_out:
            turns = FilteredReader(turns, turns, self.left_out)
        for id in turns.ids:
            yield Dialogue.from_json(turns.read(id)["turns.json"])

    def check_split(self, split: str) -> None:
        """Refuse a split without a target.

        Raises:
            MsencError: says why there is none, and what to do.
        """
        facts = self.manifest.splits.get(split)
        if (
            facts is not None
            and facts.samples
            and (not self.left_out or any(d.num_samples for d in self.dialogues(split)))
        ):
            return
        has = ", ".join(f"{name}: {n.samples:,}" for name, n in self.manifest.splits.items())
        if facts is None:
            found = f"the split {split} has no dialogues"
        elif not facts.samples:
            found = f"no dialogue of the split {split} has a target (a second turn)"
        else:
            found = f"data.filter excludes every target of the split {split}"
        raise MsencError(
            f"{self.folder}: {found}; targets found: {has}. Set split={split} in rows of the table, or remove its "
            "column split to split dialogues automatically (data.recordings.split.fractions), and prepare again."
            + _WITHOUT.get(split, "")
        )

    def lengths(self, split: str) -> list[DialogueLengths]:
        """Tokens of the split's dialogues; see `split_lengths`.

        Raises:
            MsencError: the prompt's windows count frames of a stream that is not read.
        """
        if split not in self._lengths:
            unread = sorted((self.tokenizer.prompt.windows or {}).keys() - self.streams.keys())
            if unread:
                raise MsencError(
                    f"prompt.windows: {', '.join(unread)} is not a stream of this modality, so its frames cannot be "
                    "counted, and different turns would be kept. Choose a modality that has it, or "
                    "prompt.windows=null."
                )
            dataset = self.dataset(split)
            self._lengths[split] = split_lengths(
                self.folder, dataset.ids, dataset.turns, dataset.streams, self.tokenizer
            )
        return self._lengths[split]

    def units(self, split: str) -> list[Unit]:
        """The units of the split's batches: dialogues, or parts of them under a token budget.

        Raises:
            MsencError: a target that takes more than the budget by itself.
        """
        if split not in self._units:
            known, history = self.lengths(split), self.max_history_tokens
            if self.max_tokens_per_batch is None:
                units = whole_dialogues(known, history, self.num_queries, self.layout)
            else:
                ids = self.dataset(split).ids
                units = budget_units(known, history, self.num_queries, self.layout, self.max_tokens_per_batch, ids)
            self._units[split] = units
        return self._units[split]

    def row_lengths(self, split: str, unit: Unit) -> list[int]:
        """Tokens of each row of a unit."""
        known = self.lengths(split)[unit.dialogue]
        return row_tokens(known, self.max_history_tokens, self.num_queries, self.layout, unit.turns)

    def collate_fn(self) -> Callable[[Sequence[UnitSample]], Batch]:
        """Units -> Batch, with this module's history budget and layout."""
        return partial(collate_units, budget=self.max_history_tokens, num_queries=self.num_queries, layout=self.layout)

    def train_batches(self, rank: int = 0, world_size: int = 1) -> SharedBatches:
        """The units of each training batch, in an order of (seed, epoch) alone, and a process's share of them."""
        tokens = [unit.tokens for unit in self.units("train")]
        if self.max_tokens_per_batch is None:
            batches = count_batches(len(tokens), self.batch_size, self.seed)
        else:
            batches = budget_batches(tokens, self.max_tokens_per_batch, self.seed, self.layout == "sample")
        return SharedBatches(batches, tokens, rank, world_size)

    def train_batch(self, units: Sequence[int]) -> Batch:
        """The training batch of these units."""
        dataset = self._unit_dataset("train")
        return self.collate_fn()([dataset[i] for i in units])

    def train_dataloader(self) -> EpochLoader:
        """Shuffled anew each epoch; each process gets its share of every batch. Resumes in the middle of an epoch."""
        batches_of, dataset = self.train_batches(*self._process()).batches_of, self._unit_dataset("train")
        if self.drop:
            dropped = DroppedUnits(dataset.dialogues, dataset.units, self.drop, self.seed)
            return EpochLoader(
                dropped,
                lambda epoch: dropped.numbers(batches_of(epoch), epoch),
                self.collate_fn(),
                self.num_workers,
                self._is_for_gpu(),
            )
        return EpochLoader(dataset, batches_of, self.collate_fn(), self.num_workers, self._is_for_gpu())

    def val_dataloader(self) -> DataLoader:
        """In the order of the shards; each process gets its share of every batch."""
        return self._eval_loader("val", self._eval_batches("val", *self._process()))

    def eval_dataloader(
        self,
        split: str,
        limit: int | None = None,
        control: Control | Swap | None = None,
        draw: int = 0,
        chosen: Sequence[int] | None = None,
        drop: Mapping[str, float] | None = None,
        collate_fn: Callable[[Sequence[UnitSample]], Any] | None = None,
    ) -> DataLoader:
        """A split in order; of it, the first dialogues (`limit`), the batches of these numbers (`chosen`).

        `collate_fn` makes something else than a Batch of each.
        """
        dialogues = self.dataset(split)
        if control is not None:
            dialogues = self.controlled(dialogues, control, draw)
        if drop:
            dialogues = DroppedDialogues(dialogues, drop, self.seed)
        batches = self._eval_batches(split, limit=limit)
        if chosen is not None:
            batches = [batches[i] for i in chosen]
        collate_fn = collate_fn or self.collate_fn()
        return make_loader(UnitDataset(dialogues, self.units(split)), batches, collate_fn, self.num_workers)

    def eval_tokens(self, split: str, limit: int | None = None) -> list[int]:
        """Tokens of each batch of `eval_dataloader`."""
        units = self.units(split)
        return [sum(units[i].tokens for i in batch) for batch in self._eval_batches(split, limit=limit)]

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _eval_batches(
        self, split: str, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> list[list[int]]:
        tokens = [unit.tokens for unit in self.units(split) if limit is None or unit.dialogue < limit]
        if self.max_tokens_per_batch is None:
            batches = in_order(len(tokens), self.batch_size)
        else:
            batches = budget_in_order(tokens, self.max_tokens_per_batch, self.layout == "sample")
        return [share(batch, tokens, rank, world_size) for batch in batches]

    def _unit_dataset(self, split: str) -> UnitDataset:
        return UnitDataset(self.dataset(split), self.units(split))

    def _eval_loader(self, split: str, batches: Sequence[list[int]]) -> DataLoader:
        return make_loader(self._unit_dataset(split), batches, self.collate_fn(), self.num_workers, self._is_for_gpu())

    def _is_for_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def dropped_turns(self, split: str) -> dict[str, int]:
        """How many turns of history the split's targets have, and how many of them are truncated."""
        count = {"targets": 0, "targets_cut": 0, "history_turns": 0, "dropped_turns": 0}
        for known in self.lengths(split):
            starts = histories(known.turn_tokens, self.max_history_tokens, known.windows)
            for turn, (start, _) in enumerate(starts, start=1):
                count["targets"] += 1
                count["targets_cut"] += start > 0
                count["history_turns"] += turn
                count["dropped_turns"] += start
        return count

    def described_targets(self, split: str) -> int:
        """How many of the split's targets have a voice description."""
        return sum(known.described for known in self.lengths(split))

    def common_speakers(self, split: str) -> list[str]:
        """The most frequent speakers in the split's first dialogues, most frequent first."""
        dataset = self.dataset(split)
        dialogues = (dataset.dialogue(index) for index in range(min(len(dataset), NAMED_DIALOGUES)))
        turns = Counter(utterance.speaker for dialogue in dialogues for utterance in dialogue.utterances)
        return [name for name, _ in turns.most_common(2)]


_WITHOUT = {
    "test": " Or train without a last evaluation: evaluate=null.",
    "val": " Or draw it from train when preparing (data.val=0.1), or train without validation, to the last step "
    "(data.val=null).",
}


def _check_size(batch_size: int | None, max_tokens_per_batch: int | None) -> None:
    given = f"data.batch_size={batch_size} and data.max_tokens_per_batch={max_tokens_per_batch}"
    if (batch_size is None) == (max_tokens_per_batch is None):
        raise MsencError(
            f"{given.replace('None', 'null')}: set exactly one of them as the size of a batch. For a token budget: "
            "data.batch_size=null data.max_tokens_per_batch=4096"
        )
    for name, value in (("batch_size", batch_size), ("max_tokens_per_batch", max_tokens_per_batch)):
        if value is not None and value < 1:
            raise MsencError(f"data.{name}={value}: expected 1 or more.")


def preparing_hint(folder: Place, command: str) -> str:
    """What to do where prepared data are missing.

    Args:
        folder: where they should be.
        command: that prepares them.
    """
    return f"Run: {command}" + (f", and copy the folder to {folder}" if isinstance(folder, RemotePath) else "")


def _check_layers(what: str, stream: str, wanted: Mapping[str, Any], made_with: Mapping[str, Any], hint: str) -> None:
    """Refuse features that lack a layer that is asked for, or hold layers where one output is asked for."""
    there, asked = layers_of(made_with), layers_of(wanted)
    key = f"model.streams.{stream}.encoder.layers"
    if there and not asked:
        raise MsencError(
            f"{what} hold the layers {list(there)}, the config asks for one output. Choose among them "
            f"({key}=[{there[-1]}]), or prepare that output under another model.streams.{stream}.name. {hint}"
        )
    if missing := [layer for layer in asked if layer not in there]:
        found = f"the layers {list(there)}" if there else f"one output (layer={made_with.get('layer', -1)})"
        every = ",".join(map(str, [*there, *missing]))
        raise MsencError(
            f"{what} hold {found}, the config asks for {list(asked)}: missing are {missing} (numbers are compared as "
            f"they are written). Prepare them: {key}=[{every}] keeps all. {hint}"
        )


def check_prepared(folder: Place, streams: Mapping[str, StreamSpec], hint: str) -> DatasetManifest:
    """Compare the prepared data with what the model expects.

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
            raise MsencError(f"{folder}: found {there}; the config needs {wanted} ({spec.dim} wide). {hint}")
        made_with = manifest.streams[wanted].settings
        dim = prepared[wanted] / (len(layers_of(made_with)) or 1)
        if dim != spec.dim:
            raise MsencError(
                f"{folder}: the features {wanted} are {dim:g} wide, the config says "
                f"model.streams.{stream}.dim={spec.dim}. Correct the config, or prepare again. {hint}"
            )
        _check_layers(f"{folder}: the features {wanted}", stream, spec.settings, made_with, hint)
        differ = [
            f"{key}={made_with.get(key)}, the config says {value}"
            for key, value in spec.settings.items()
            if key not in (*RUN_ONLY, "layers") and made_with.get(key) != value
        ]
        if differ:
            raise MsencError(
                f"{folder}: the features {wanted} were made with {'; '.join(differ)}. Correct the config, or prepare "
                f"again, under another model.streams.{stream}.name to keep the old ones. {hint}"
            )
        counts = manifest.streams[wanted].utterances
        # Without a train split, the data are only for evaluation.
        is_for_training = "train" in manifest.splits
        if not (counts.get("train") if is_for_training else any(counts.values())):
            where = "the split train" if is_for_training else "any split"
            left = [s for s in streams if s != stream]
            raise MsencError(
                f"{folder}: no utterance of {where} has {stream}: {folder / 'rejected.csv'} says why. Does "
                "data.root name the folder of the clips? If there are none, train without them: modality="
                f"{'_'.join(['text', *left])}"
            )
        hashes[wanted] = manifest.streams[wanted].hash
    dialogues: dict[str, dict[str, tuple[str, int]]] = {}  # by stream: id -> split, utterances
    for name, expected in hashes.items():
        index = read_index(folder / name, hint)
        found = index["hash"]
        if found != expected:
            raise MsencError(
                f"{folder / name}: found shards with hash {found[:12]}, dataset.json expects {expected[:12]}: a "
                f"preparation was interrupted, so turns and features may not belong together. {hint}"
            )
        utterances = Counter()
        for sample in index["samples"]:
            utterances[sample["split"]] += sum(length > 0 for length in sample["lengths"])
        if name in manifest.streams and +utterances != +Counter(manifest.streams[name].utterances):
            raise MsencError(
                f"{folder / name}: its index names {dict(utterances)} utterances, dataset.json "
                f"{manifest.streams[name].utterances}. Prepare the data again. {hint}"
            )
        dialogues[name] = {s["id"]: (s["split"], len(s["lengths"])) for s in index["samples"]}
        lacking = [id for id, facts in dialogues["turns"].items() if dialogues[name].get(id) != facts]
        if lacking:
            raise MsencError(
                f"{folder / name}: its index has no dialogue {lacking[0]} of {dialogues['turns'][lacking[0]][1]} "
                f"utterances, though the index of the turns does. Prepare the data again. {hint}"
            )
    return manifest
