"""TokenizedDialogue and features -> Batch. Pure functions; the dialogue layout is decided here.

A dialogue becomes one or more rows. A row is a *trunk* (instruction and a run of turns) and one *branch* per target
(response prompt, reply, description, end). A branch sees the trunk up to the turn before its target, with the
positions that the single sample would have, so one row trains many targets exactly as single samples would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from msenc.prompt import Slot, TokenizedDialogue
from msenc.types import PADDING, TRUNK, Batch, StreamBatch

Layout = Literal["dialogue", "sample"]


def history_starts(turn_tokens: Sequence[int], budget: int) -> list[int]:
    """The first turn that each target's history keeps.

    The oldest turns are dropped first, whole turns only, and the turn before the target always stays. When the
    history outgrows the budget, the start moves on until at most half of the budget is used, and then rests: so
    several targets in a row share one history, and one trunk. The count is of text tokens alone; it is the same
    whatever streams are on, so modalities are compared on the same turns.

    Args:
        turn_tokens: text tokens of each turn.
        budget: most text tokens of a history.

    Returns:
        For targets 1, 2, ... (every turn but the first) the index of the first turn kept.

    Example:
        >>> history_starts([4, 4, 4, 4, 4], budget=10)
        [0, 0, 2, 2]
    """
    starts, start, total = [], 0, 0
    for target in range(1, len(turn_tokens)):
        total += turn_tokens[target - 1]
        if total > budget:
            while start < target - 1 and total > budget // 2:
                total -= turn_tokens[start]
                start += 1
        starts.append(start)
    return starts


@dataclass
class Row:
    """One row of a batch before padding; lists of equal length, and the media slots in it.

    Args:
        slots: (stream, turn, first token of the slot).
        target_turns: the turn of each branch.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    slots: list[tuple[str, int, int]] = field(default_factory=list)
    target_turns: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], position: int, branch: int, cut: int, kinds: Sequence[int] | None = None) -> None:
        """Append tokens; those with kinds are targets."""
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.branch += [branch] * len(ids)
        self.cut += [cut] * len(ids)
        self.labels += ids if kinds is not None else [-100] * len(ids)
        self.kinds += kinds if kinds is not None else [-1] * len(ids)


def dialogue_rows(
    dialogue: TokenizedDialogue,
    budget: int,
    num_queries: Mapping[str, int],
    layout: Layout = "dialogue",
    turns: Sequence[int] | None = None,
    with_targets: bool = True,
) -> list[Row]:
    """Lay a dialogue out.

    Args:
        dialogue: its tokens.
        budget: see `history_starts`.
        num_queries: tokens that each stream's slot takes.
        layout: ``dialogue`` puts all targets with the same history start into one row; ``sample`` gives each its own.
        turns: the targets wanted (turn numbers from 1); all if None.
        with_targets: False leaves the reply out, for generation.
    """
    starts = history_starts(dialogue.turn_tokens, budget)
    wanted = range(1, len(dialogue.turns)) if turns is None else turns
    groups: dict[tuple[int, int], list[int]] = {}
    for turn in wanted:
        groups.setdefault((starts[turn - 1], turn if layout == "sample" else 0), []).append(turn)
    return [_row(dialogue, start, group, num_queries, with_targets) for (start, _), group in groups.items()]


def _row(
    dialogue: TokenizedDialogue, start: int, turns: list[int], num_queries: Mapping[str, int], with_targets: bool
) -> Row:
    row = Row()
    row.add(dialogue.instruction, 0, TRUNK, 0)
    cuts = {}
    for turn in range(start, max(turns)):
        for piece in dialogue.turns[turn]:
            if isinstance(piece, Slot):
                row.slots.append((piece.stream, turn, len(row.ids)))
                piece = (0,) * num_queries[piece.stream]
            row.add(piece, len(row.ids), TRUNK, 0)
        cuts[turn + 1] = len(row.ids)
    for number, turn in enumerate(turns):
        response, target, cut = dialogue.responses[turn - 1], dialogue.targets[turn - 1], cuts[turn]
        row.add(response, cut, number, cut)
        if with_targets:
            row.add(target.ids, cut + len(response), number, cut, target.kinds)
        row.target_turns.append(turn)
    return row


Features = Mapping[str, Sequence[np.ndarray | None]]
"""Stream -> per turn its frames (T, D), or None where the turn lacks the stream."""


def collate(
    dialogues: Sequence[TokenizedDialogue],
    features: Sequence[Features],
    rows: Sequence[Sequence[Row]],
    num_queries: Mapping[str, int],
    padding_side: Literal["left", "right"] = "right",
) -> Batch:
    """Pad rows to a batch; every utterance's features enter once, however many rows use them.

    Args:
        dialogues: the dialogues of the batch.
        features: for each, its frames.
        rows: for each, its rows from `dialogue_rows`.
        num_queries: tokens that each stream's slot takes.
        padding_side: ``left`` for generation, so that every row ends where the reply begins.
    """
    flat = [(d, row) for d, dialogue_rows_ in enumerate(rows) for row in dialogue_rows_]
    length = max(len(row.ids) for _, row in flat)
    fill = {"ids": 0, "positions": 0, "branch": PADDING, "cut": 0, "labels": -100, "kinds": -1, "targets": -1}
    arrays = {name: np.full((len(flat), length), value, dtype=np.int64) for name, value in fill.items()}
    target_ids: list[tuple[str, int]] = []
    utterances: dict[str, dict[tuple[int, int], int]] = {}
    places: dict[str, list[np.ndarray]] = {}
    sources: dict[str, list[np.ndarray]] = {}
    for b, (d, row) in enumerate(flat):
        at = length - len(row.ids) if padding_side == "left" else 0
        span = slice(at, at + len(row.ids))
        for name in ("ids", "positions", "branch", "cut", "labels", "kinds"):
            arrays[name][b, span] = getattr(row, name)
        is_target = arrays["labels"][b] != -100
        arrays["targets"][b, is_target] = arrays["branch"][b, is_target] + len(target_ids)
        target_ids += [(dialogues[d].id, turn) for turn in row.target_turns]
        for stream, turn, start in row.slots:
            seen = utterances.setdefault(stream, {})
            n = seen.setdefault((d, turn), len(seen))
            span_q = np.arange(num_queries[stream])
            places.setdefault(stream, []).append(b * length + at + start + span_q)
            sources.setdefault(stream, []).append(n * num_queries[stream] + span_q)
    streams = {}
    for stream, seen in utterances.items():
        frames = [features[d][stream][turn] for d, turn in seen]
        lengths = [len(f) for f in frames]
        padded = np.zeros((len(frames), max(lengths), frames[0].shape[1]), dtype=np.float16)  # (N, T, D)
        for n, f in enumerate(frames):
            padded[n, : len(f)] = f
        streams[stream] = StreamBatch(
            features=torch.from_numpy(padded),
            lengths=torch.tensor(lengths),
            places=torch.from_numpy(np.concatenate(places[stream])),
            sources=torch.from_numpy(np.concatenate(sources[stream])),
        )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(
        input_ids=tensors["ids"],
        position_ids=tensors["positions"],
        branch=tensors["branch"],
        cut=tensors["cut"],
        labels=tensors["labels"],
        kinds=tensors["kinds"],
        targets=tensors["targets"],
        streams=streams,
        target_ids=target_ids,
    )
