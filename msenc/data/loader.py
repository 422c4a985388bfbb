"""Units of dialogues -> batches of an epoch, from its middle if a run is resumed."""

import atexit
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from msenc.data.batches import Unit
from msenc.data.collate import Features, Layout, Row, collate, dialogue_rows
from msenc.data.dataset import DialogueDataset
from msenc.prompt import TokenizedDialogue
from msenc.types import Batch
from msenc.work.signals import ignore_termination

UnitSample = tuple[TokenizedDialogue, Features, tuple[int, ...] | None]


class UnitDataset(Dataset):
    """Unit -> (tokens, features, targets wanted): what the loaders read.

    Args:
        dialogues: of the split.
        units: of the split.
    """

    def __init__(self, dialogues: DialogueDataset, units: Sequence[Unit]) -> None:
        self.dialogues = dialogues
        self.units = units

    def __len__(self) -> int:
        """Units of the split."""
        return len(self.units)

    def __getitem__(self, index: int) -> UnitSample:
        """The unit's dialogue, and which of its targets belong to the unit (None: all)."""
        unit = self.units[index]
        return *self.dialogues[unit.dialogue], unit.turns


def collate_units(
    samples: Sequence[UnitSample], budget: int, num_queries: Mapping[str, int], layout: Layout = "dialogue"
) -> Batch:
    """Units -> training batch: every target of every unit.

    A process without a unit gets one token without a target: its loss is zero, and so are its gradients,
    for which the other processes wait.
    """
    if not samples:
        return collate([], [], [[Row(ids=[0], positions=[0], trunk=1)]], num_queries, pack=layout == "dialogue")
    dialogues = [dialogue for dialogue, _, _ in samples]
    rows = [dialogue_rows(dialogue, budget, num_queries, layout, turns) for dialogue, _, turns in samples]
    return collate(dialogues, [features for _, features, _ in samples], rows, num_queries, pack=layout == "dialogue")


class EpochLoader:
    """Iterates over the batches of an epoch, from the first one or, resumed, from the first that is not done yet.

    The order is given by `batches_of`, so only the position has to be saved; loader processes affect neither.
    A batch counts as done when the next one is requested. So `state_dict` is correct at the start of a batch, which is
    where `checkpoints.Checkpoints` saves.

    Args:
        dataset: index -> sample.
        batches_of: epoch -> its batches, as indices; every epoch has the same number of them.
        collate: samples -> batch.
        num_workers: loader processes, which live as long as the loader.
        pin_memory: see `make_loader`.

    Example:
        >>> loader = EpochLoader([1, 2, 3, 4], lambda epoch: [[0, epoch], [2, 3]], list)
        >>> loader.set_epoch(1)
        >>> list(loader)
        [[1, 2], [3, 4]]
        >>> loader.load_state_dict({"epoch": 1, "batches_done": 1})
        >>> len(loader), list(loader)
        (2, [[3, 4]])
    """

    def __init__(
        self,
        dataset: Any,
        batches_of: Callable[[int], list[list[int]]],
        collate: Callable[[list], Any],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.batches_of = batches_of
        self.epoch = 0
        self.batches_done = 0
        self._first = 0
        self._length = len(batches_of(0))
        self._batches: list[list[int]] = []
        self._loader = make_loader(dataset, self._batches, collate, num_workers, pin_memory)
        # The trainer and its loader refer to each other. Were the processes part of such a cycle, their queues would be
        # closed before they are told to end, and as they ignore SIGTERM, this process would wait for them for ever.
        weakref.finalize(self, _end_workers_of, self._loader)

    @property
    def sampler(self) -> "EpochLoader":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch, and after it has asked for the first epoch's iterator."""
        if epoch != self.epoch:
            self.epoch, self.batches_done, self._first = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that are done."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue there, if that epoch comes next."""
        self.epoch, self._first = state["epoch"], state["batches_done"]

    def __len__(self) -> int:
        """Batches of a whole epoch, also when only its rest is left."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """The epoch's remaining batches. The epoch is determined when the first batch is requested."""
        first, self._first = self._first, 0
        self.batches_done = first
        self._batches[:] = self.batches_of(self.epoch)[first:]
        for batch in self._loader:
            yield batch
            self.batches_done += 1


def make_loader(
    dataset: Any,
    batches: Sequence[list[int]],
    collate: Callable[[list], Any],
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of the batches in their order, which does not use the process's random generator.

    Args:
        dataset: index -> item.
        batches: indices of each.
        collate: items -> batch.
        num_workers: loader processes.
        pin_memory: batches go to a GPU, and are copied there while it computes.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_termination,
        # Each iterator draws a seed for its workers, which need none: without its own generator it would draw
        # from the process's, and dropout would depend on when an iterator was created.
        generator=torch.Generator(),
    )
    if num_workers:
        _open.add(loader)
    return loader


_open: weakref.WeakSet[DataLoader] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Those of an epoch that was interrupted: they ignore the signal by which Python would end them, and waits then."""
    for loader in list(_open):
        _end_workers_of(loader)


def _end_workers_of(loader: DataLoader) -> None:
    if (iterator := loader._iterator) is not None:
        iterator._shutdown_workers()
