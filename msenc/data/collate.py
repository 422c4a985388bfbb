"""TokenizedDialogue and features -> Batch. Pure functions; the dialogue layout is decided here.

A dialogue becomes one or more rows. A row is a *trunk* (instruction and a run of turns) and one *branch* per target
(response prompt, reply, description, end). A branch sees the trunk up to the turn before its target, with the
positions that the single sample would have, so one row trains many targets exactly as single samples would. A target
that is to be preferred to other replies has a branch for each of these, too.

A packed batch puts all rows on one line; otherwise each row is a plain causal sequence of its own, padded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from msenc.prompt import History, Slot, Target, TokenizedDialogue
from msenc.types import Batch, Segment, StreamBatch

Layout = Literal["dialogue", "sample"]

MIN_FILL = 0.75
"""Utterances share a group while the shorter is at least this share of the longest: what bounds the padded frames."""


def history_starts(turn_tokens: Sequence[int], budget: int) -> list[int]:
    """History truncation: the first turn kept in each target's history.

    The oldest turns are dropped first, only whole turns, and the turn before the target is always kept. When the
    history exceeds the budget, the start moves until at most half of the budget is used, and then stays fixed: so
    several consecutive targets share one history start, and one trunk. Only text tokens count, so the result is the
    same for all streams, and modalities are compared on the same turns.

    Args:
        turn_tokens: text tokens of each turn.
        budget: maximum number of text tokens in a history.

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


def histories(
    turn_tokens: Sequence[int], budget: int, windows: Sequence[tuple[int, Sequence[tuple[str, int]]]] = ()
) -> list[History]:
    """The start of each target's history (turn 1, 2, ...): the later of those by budget and by windows.

    Args:
        turn_tokens: see `history_starts`.
        budget: see `history_starts`.
        windows: see `TokenizedDialogue`.
    """
    found = [History(start) for start in history_starts(turn_tokens, budget)]
    for i, (start, skips) in enumerate(windows):
        if start >= found[i].start:
            found[i] = History(start, tuple((stream, frames) for stream, frames in skips))
    return found


def group_targets(
    starts: Sequence[History], layout: Layout, turns: Sequence[int] | None = None
) -> list[tuple[History, list[int]]]:
    """The targets of each row, with the row's history.

    Args:
        starts: of each target of the dialogue, from `histories`.
        layout: see `dialogue_rows`.
        turns: the targets wanted (turn numbers from 1); all if None.

    Example:
        >>> [targets for _, targets in group_targets([History(0), History(0), History(2)], "dialogue")]
        [[1, 2], [3]]
    """
    groups: dict[tuple[History, int], list[int]] = {}
    for turn in range(1, len(starts) + 1) if turns is None else turns:
        groups.setdefault((starts[turn - 1], turn if layout == "sample" else 0), []).append(turn)
    return [(start, group) for (start, _), group in groups.items()]


@dataclass
class Row:
    """A trunk and its branches, before they are put into a batch.

    Args:
        ids: token ids, 0 where a media slot stands.
        positions: each token's position in its own sample.
        trunk: number of tokens in the trunk; they come first.
        branches: (tokens, cut) of each branch, see `types.Segment`.
        predictors: for each token to be predicted, the place of the one before it.
        labels: the tokens to be predicted.
        kinds: index into `prompt.TOKEN_KINDS` of each.
        owners: the branch of each.
        slots: (stream, turn, frames to skip, first token) of each media slot.
        target_turns: the target turn of each branch.
        rejects: of each branch, whether the one before it that is none of these is to be preferred to it.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    trunk: int = 0
    branches: list[tuple[int, int]] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    slots: list[tuple[str, int, int, int]] = field(default_factory=list)
    target_turns: list[int] = field(default_factory=list)
    rejects: list[bool] = field(default_factory=list)

    @property
    def is_causal(self) -> bool:
        """Whether each token sees all tokens before it: a trunk with one branch, which continues it."""
        return not self.branches or (len(self.branches) == 1 and self.branches[0][1] == self.trunk)

    def segment(self, start: int) -> Segment:
        """How the row attends when placed at `start` of a packed line."""
        return Segment(start, len(self.ids)) if self.is_causal else Segment(start, self.trunk, tuple(self.branches))


def dialogue_rows(
    dialogue: TokenizedDialogue,
    budget: int,
    num_queries: Mapping[str, int],
    layout: Layout = "dialogue",
    turns: Sequence[int] | None = None,
    with_targets: bool = True,
) -> list[Row]:
    """Lay out a dialogue as rows.

    Args:
        dialogue: its tokens.
        budget: see `history_starts`.
        num_queries: tokens that each stream's slot takes.
        layout: ``dialogue`` puts all targets with the same history start into one row; ``sample`` gives each its own.
        turns: the targets wanted (turn numbers from 1); all if None.
        with_targets: False omits the reply, for generation.
    """
    starts = histories(dialogue.turn_tokens, budget, dialogue.windows)
    rows = []
    for start, group in group_targets(starts, layout, turns):
        branches = [branch for turn in group for branch in _branches(dialogue, turn, with_targets)]
        for together in [branches] if layout == "dialogue" else [[branch] for branch in branches]:
            rows.append(_row(dialogue, start, together, num_queries))
    return rows


_Branch = tuple[int, Target | None, bool]
"""A turn, a reply to generate there (None: it is left to be generated), and whether it is a rejected one."""


def _branches(dialogue: TokenizedDialogue, turn: int, with_targets: bool) -> list[_Branch]:
    if not with_targets:
        return [(turn, None, False)]
    rejected = dialogue.rejected[turn - 1] if dialogue.rejected else ()
    return [(turn, dialogue.targets[turn - 1], False), *((turn, target, True) for target in rejected)]


def _row(
    dialogue: TokenizedDialogue, history: History, branches: Sequence[_Branch], num_queries: Mapping[str, int]
) -> Row:
    ids, slots, cuts, skips = list(dialogue.instruction), [], {}, dict(history.skips)
    turns = [turn for turn, _, _ in branches]
    for turn in range(history.start, max(turns)):
        for piece in dialogue.turns[turn]:
            if isinstance(piece, Slot):
                skip = skips.get(piece.stream, 0) if turn == history.start else 0
                slots.append((piece.stream, turn, skip, len(ids)))
                piece = (0,) * num_queries[piece.stream]
            ids += piece
        cuts[turn + 1] = len(ids)
    row = Row(ids, list(range(len(ids))), trunk=len(ids), slots=slots, target_turns=turns)
    for number, (turn, target, is_rejected) in enumerate(branches):
        response, cut = dialogue.responses[turn - 1], cuts[turn]
        branch = [*response, *target.ids] if target is not None else response
        row.rejects.append(is_rejected)
        if target is not None:
            first = len(row.ids) + len(response) - 1
            row.predictors += range(first, first + len(target.ids))
            row.labels += target.ids
            row.kinds += target.kinds
            row.owners += [number] * len(target.ids)
        row.ids += branch
        row.positions += range(cut, cut + len(branch))
        row.branches.append((len(branch), cut))
    return row


Features = Mapping[str, Sequence[np.ndarray | None]]
"""Stream -> per turn its frames (T, D), or None where the turn lacks the stream."""


def collate(
    dialogues: Sequence[TokenizedDialogue],
    features: Sequence[Features],
    rows: Sequence[Sequence[Row]],
    num_queries: Mapping[str, int],
    pack: bool = False,
    padding_side: Literal["left", "right"] = "right",
) -> Batch:
    """Put rows into a batch; every utterance's features enter once, however many rows use them.

    Args:
        dialogues: the dialogues of the batch.
        features: for each, its frames.
        rows: for each, its rows from `dialogue_rows`.
        num_queries: tokens that each stream's slot takes.
        pack: all rows on one line; else one line per row, all of which have to be causal (`Row.is_causal`).
        padding_side: of lines; ``left`` for generation, so that every row ends where the reply begins.
    """
    flat = [(d, row) for d, dialogue_rows_ in enumerate(rows) for row in dialogue_rows_]
    sizes = np.array([len(row.ids) for _, row in flat])
    length = int(sizes.sum() if pack else sizes.max())
    if pack:
        offsets = np.cumsum(sizes) - sizes
    else:
        assert all(row.is_causal for _, row in flat), "a row with several branches needs pack=True"
        offsets = np.arange(len(flat)) * length + (length - sizes if padding_side == "left" else 0)
    ids, positions, real = (np.zeros(length if pack else len(flat) * length, dtype=t) for t in (int, int, bool))
    target_ids: list[tuple[str, int]] = []
    pairs: list[tuple[int, int]] = []
    preferred = 0
    wanted: dict[str, list[np.ndarray]] = {"predictors": [], "labels": [], "kinds": [], "targets": []}
    slots: dict[str, list[tuple[tuple[int, int, int], int]]] = {}
    for at, (d, row) in zip(offsets, flat, strict=True):
        span = slice(at, at + len(row.ids))
        ids[span], positions[span], real[span] = row.ids, row.positions, True
        wanted["predictors"].append(np.array(row.predictors, dtype=int) + at)
        wanted["labels"].append(np.array(row.labels, dtype=int))
        wanted["kinds"].append(np.array(row.kinds, dtype=int))
        wanted["targets"].append(np.array(row.owners, dtype=int) + len(target_ids))
        for turn, is_rejected in zip(row.target_turns, row.rejects, strict=True):
            if is_rejected:
                pairs.append((preferred, len(target_ids)))
            else:
                preferred = len(target_ids)
            target_ids.append((dialogues[d].id, turn))
        for stream, turn, skip, start in row.slots:
            slots.setdefault(stream, []).append(((d, turn, skip), int(at) + start))
    per_token = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in wanted.items()}
    return Batch(
        input_ids=torch.from_numpy(ids).reshape(-1, length),
        position_ids=torch.from_numpy(positions).reshape(-1, length),
        segments=[row.segment(int(at)) for at, (_, row) in zip(offsets, flat, strict=True)] if pack else None,
        attention_mask=None if pack else torch.from_numpy(real).reshape(-1, length),
        **per_token,
        streams={
            stream: _stream_batch(stream, found, features, num_queries[stream]) for stream, found in slots.items()
        },
        target_ids=target_ids,
        pairs=torch.tensor(pairs) if pairs else None,
    )


def _stream_batch(
    stream: str, slots: list[tuple[tuple[int, int, int], int]], features: Sequence[Features], num_queries: int
) -> StreamBatch:
    """Slots as ((dialogue, turn, skip), first token) -> the stream's features, grouped by length, and their places."""
    frames = {key: features[key[0]][stream][key[1]][key[2] :] for key in dict.fromkeys(key for key, _ in slots)}
    order = sorted(frames, key=lambda key: -len(frames[key]))
    groups: list[list[np.ndarray]] = []
    for key in order:
        if not groups or len(frames[key]) < MIN_FILL * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(frames[key])
    number = {key: n for n, key in enumerate(order)}
    queries = np.arange(num_queries)
    return StreamBatch(
        features=[_pad(group) for group in groups],
        lengths=[torch.tensor([len(f) for f in group]) for group in groups],
        places=torch.from_numpy(np.concatenate([start + queries for _, start in slots])),
        sources=torch.from_numpy(np.concatenate([number[key] * num_queries + queries for key, _ in slots])),
    )


def _pad(frames: list[np.ndarray]) -> torch.Tensor:
    """Frames (T, D), the longest first -> (N, T, D) float16, zeros behind the shorter."""
    padded = np.zeros((len(frames), *frames[0].shape), dtype=np.float16)
    for n, f in enumerate(frames):
        padded[n, : len(f)] = f
    return torch.from_numpy(padded)
