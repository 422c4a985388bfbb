"""The batches of an epoch: a function of (seed, epoch) alone, the same on every process and machine.

DialogueLengths -> units -> batches of all processes together -> the share of each process
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from msenc.data.collate import Layout
from msenc.data.lengths import DialogueLengths, row_tokens
from msenc.types import MsencError

BUCKET_RATIO, BUCKET_SIZE = 1.03, 4
"""Units whose lengths differ by at most this ratio are exchangeable, as are always a few similar ones."""


class Unit(NamedTuple):
    """Something that enters a batch as a whole.

    Args:
        dialogue: index into the split's dialogues.
        turns: the targets it trains; None for all of the dialogue's.
        tokens: length of its rows, all together.
    """

    dialogue: int
    turns: tuple[int, ...] | None
    tokens: int


def whole_dialogues(
    lengths: Sequence[DialogueLengths], max_history_tokens: int, num_queries: Mapping[str, int], layout: Layout
) -> list[Unit]:
    """One unit per dialogue."""
    return [
        Unit(i, None, sum(row_tokens(known, max_history_tokens, num_queries, layout)))
        for i, known in enumerate(lengths)
    ]


def budget_units(
    lengths: Sequence[DialogueLengths],
    max_history_tokens: int,
    num_queries: Mapping[str, int],
    layout: Layout,
    max_tokens: int,
    ids: Sequence[str],
) -> list[Unit]:
    """Units of at most `max_tokens`.

    In the dialogue layout a unit is a dialogue, or a run of its targets if all of them together are too long; the
    history of a target is the same either way. In the sample layout every target is a unit, so that rows of similar
    length can be padded together.

    Args:
        lengths: of the split's dialogues.
        max_history_tokens: see `collate.history_starts`.
        num_queries: tokens that each stream's slot takes.
        layout: see `collate.dialogue_rows`.
        max_tokens: the budget of a batch.
        ids: the dialogues' ids, for messages.

    Raises:
        MsencError: a target that does not fit the budget by itself.
    """

    def tokens(i: int, turns: Sequence[int]) -> int:
        return sum(row_tokens(lengths[i], max_history_tokens, num_queries, layout, turns))

    turns = [range(1, len(known.turns)) for known in lengths]
    return parts_within(turns, tokens, layout, max_tokens, ids, max_history_tokens)


def parts_within(
    turns_of: Sequence[Sequence[int]],
    tokens: Callable[[int, Sequence[int]], int],
    layout: Layout,
    max_tokens: int,
    ids: Sequence[str],
    max_history_tokens: int,
) -> list[Unit]:
    """`budget_units` of any rows.

    Args:
        turns_of: the targets of each dialogue; a unit of all of them has None.
        tokens: (dialogue, some of its targets) -> length of their rows, all together.
        layout: see `collate.dialogue_rows`.
        max_tokens: the budget of a batch.
        ids: the dialogues' ids, for messages.
        max_history_tokens: for messages.

    Raises:
        MsencError: a target that does not fit the budget by itself.
    """
    units: list[Unit] = []
    too_long: list[tuple[int, str, int]] = []
    for i, turns in enumerate(turns_of):
        if layout == "dialogue" and (total := tokens(i, turns)) <= max_tokens:
            units.append(Unit(i, None, total))
            continue
        part: list[int] = []
        for turn in turns:
            if part and (layout == "sample" or tokens(i, [*part, turn]) > max_tokens):
                units.append(Unit(i, tuple(part), tokens(i, part)))
                part = []
            part.append(turn)
            if (alone := tokens(i, [turn])) > max_tokens:
                too_long.append((alone, ids[i], turn))
        units.append(Unit(i, tuple(part), tokens(i, part)))
    if too_long:
        most, id, turn = max(too_long)
        raise MsencError(
            f"data.max_tokens_per_batch={max_tokens}: {len(too_long)} targets exceed it on their own; the longest is "
            f"turn {turn} of {id} with {most} tokens (history, query vectors, reply). Set "
            f"data.max_tokens_per_batch={most} or more, or a lower data.max_history_tokens (now {max_history_tokens})."
        )
    return units


@dataclass(frozen=True)
class EpochBatches:
    """Batches of units, composed anew each epoch, equal in number and pattern.

    A pattern says which bucket each place of a batch takes its unit from; an epoch fills the places with a permutation
    of every bucket, and shuffles the batches. So no unit is lost or repeated, and a budget that holds for the buckets
    holds in every epoch.

    Args:
        buckets: units by bucket; those of one bucket are exchangeable.
        pattern: per batch the bucket of each of its places.
        seed: of the order.
    """

    buckets: Sequence[Sequence[int]]
    pattern: Sequence[Sequence[int]]
    seed: int

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.pattern)

    def batches_of(self, epoch: int) -> list[list[int]]:
        """The units of each batch.

        Example:
            >>> batches = count_batches(5, 2, seed=1)
            >>> first, second = batches.batches_of(0), batches.batches_of(1)
            >>> [len(batch) for batch in first], first == second, first == batches.batches_of(0)
            ([2, 2, 1], False, True)
        """
        rng = np.random.default_rng([self.seed, epoch])
        queues = [iter(rng.permutation(bucket).tolist()) for bucket in self.buckets]
        batches = [[next(queues[bucket]) for bucket in places] for places in self.pattern]
        if len(self.buckets) == 1:  # that permutation has shuffled the batches already
            return batches
        return [batches[i] for i in rng.permutation(len(batches))]


def count_batches(num_units: int, batch_size: int, seed: int) -> EpochBatches:
    """Batches of `batch_size` units, the last one perhaps smaller."""
    return EpochBatches([range(num_units)], [[0] * len(batch) for batch in in_order(num_units, batch_size)], seed)


def in_order(num_units: int, batch_size: int) -> list[list[int]]:
    """Units in their order, `batch_size` at a time.

    Example:
        >>> in_order(5, 2)
        [[0, 1], [2, 3], [4]]
    """
    return [list(range(at, min(at + batch_size, num_units))) for at in range(0, num_units, batch_size)]


def budget_batches(tokens: Sequence[int], max_tokens: int, seed: int, is_padded: bool) -> EpochBatches:
    """Batches of at most `max_tokens`, units of like length exchangeable.

    Args:
        tokens: of each unit, none above the budget.
        max_tokens: the budget.
        seed: of the pattern and of the order.
        is_padded: a batch costs its units times its longest one, so similar lengths go together; else it costs the sum
            of its units, and any lengths go together.
    """
    buckets: list[list[int]] = []
    for unit in sorted(range(len(tokens)), key=lambda unit: tokens[unit]):
        is_full = buckets and len(buckets[-1]) >= BUCKET_SIZE
        if not buckets or (is_full and tokens[unit] > BUCKET_RATIO * tokens[buckets[-1][0]]):
            buckets.append([])
        buckets[-1].append(unit)
    edges = [tokens[members[-1]] for members in buckets]
    places = np.repeat(np.arange(len(edges)), [len(members) for members in buckets])
    if is_padded:
        pattern = _like_lengths(places.tolist(), edges, max_tokens)
    else:
        pattern = _best_fit(np.random.default_rng(seed).permutation(places).tolist(), edges, max_tokens)
    return EpochBatches(buckets, pattern, seed)


def _like_lengths(places: list[int], edges: list[int], max_tokens: int) -> list[list[int]]:
    """From the longest on, as many as the first of the batch leaves room for."""
    pattern: list[list[int]] = []
    for place in reversed(places):
        if not pattern or (len(pattern[-1]) + 1) * edges[pattern[-1][0]] > max_tokens:
            pattern.append([])
        pattern[-1].append(place)
    return pattern


def _best_fit(places: list[int], edges: list[int], max_tokens: int) -> list[list[int]]:
    """Each into the batch that it fills best."""
    pattern: list[list[int]] = []
    open_batches: list[tuple[int, int]] = []  # (tokens left, batch), ascending
    for place in places:
        at = bisect_left(open_batches, (edges[place], 0))
        if at < len(open_batches):
            left, batch = open_batches.pop(at)
        else:
            left, batch = max_tokens, len(pattern)
            pattern.append([])
        pattern[batch].append(place)
        insort(open_batches, (left - edges[place], batch))
    return pattern


def budget_in_order(tokens: Sequence[int], max_tokens: int, is_padded: bool) -> list[list[int]]:
    """Units in their order, as many at a time as the budget takes; arguments as of `budget_batches`.

    Example:
        >>> budget_in_order([3, 4, 2, 5], 8, is_padded=False), budget_in_order([3, 4, 2, 5], 8, is_padded=True)
        ([[0, 1], [2, 3]], [[0, 1], [2], [3]])
    """
    batches: list[list[int]] = []
    for i in range(len(tokens)):
        wanted = [tokens[k] for k in (*batches[-1], i)] if batches else []
        cost = len(wanted) * max(wanted, default=0) if is_padded else sum(wanted)
        if not batches or cost > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def share(batch: Sequence[int], tokens: Sequence[int], rank: int, world_size: int) -> list[int]:
    """One process's share of a batch; empty for some processes if there are fewer units than processes.

    The longest first, each to the process with the fewest tokens so far.

    Args:
        batch: units.
        tokens: of every unit of the split.
        rank: the process.
        world_size: number of processes.

    Example:
        >>> [share([0, 1, 2], [5, 9, 3], rank, 2) for rank in range(2)]
        [[1], [0, 2]]
    """
    loads = [0] * world_size
    own = set()
    for unit in sorted(batch, key=lambda unit: -tokens[unit]):
        taker = loads.index(min(loads))
        loads[taker] += tokens[unit]
        if taker == rank:
            own.add(unit)
    return [unit for unit in batch if unit in own]


@dataclass(frozen=True)
class SharedBatches:
    """One process's share of every batch.

    Args:
        batches: of all processes together.
        tokens: of every unit.
        rank: this process.
        world_size: number of processes.
    """

    batches: EpochBatches
    tokens: Sequence[int]
    rank: int
    world_size: int

    def __len__(self) -> int:
        """Batches of an epoch: as many as of all processes together, empty ones included."""
        return len(self.batches)

    def batches_of(self, epoch: int) -> list[list[int]]:
        """This process's units of each batch."""
        return [share(batch, self.tokens, self.rank, self.world_size) for batch in self.batches.batches_of(epoch)]
