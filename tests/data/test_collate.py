import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from random_dialogues import NUM_QUERIES, draw_dialogue

from msenc.data.collate import collate, dialogue_rows, history_starts
from msenc.prompt import Slot
from msenc.types import PADDING, TRUNK

BUDGETS = (10**6, 20, 9)


def draw_batch(seed, num=3, budget=10**6, layout="dialogue", padding_side="right", **options):
    rng = np.random.default_rng(seed)
    drawn = [draw_dialogue(rng, int(rng.integers(2, 7)), f"d{i}", **options) for i in range(num)]
    dialogues, features = [d for d, _ in drawn], [f for _, f in drawn]
    with_targets = padding_side == "right"
    rows = [dialogue_rows(d, budget, NUM_QUERIES, layout, with_targets=with_targets) for d in dialogues]
    return collate(dialogues, features, rows, NUM_QUERIES, padding_side), dialogues, features, rows


def sample_of(dialogue, target, start):
    """A single sample, written out: ids with 0 in slots, and the (turn, stream) of each slot's tokens."""
    ids, media = list(dialogue.instruction), [None] * len(dialogue.instruction)
    for turn in range(start, target):
        for piece in dialogue.turns[turn]:
            if isinstance(piece, Slot):
                ids += [0] * NUM_QUERIES[piece.stream]
                media += [(turn, piece.stream, q) for q in range(NUM_QUERIES[piece.stream])]
            else:
                ids += piece
                media += [None] * len(piece)
    response, reply = dialogue.responses[target - 1], dialogue.targets[target - 1].ids
    return [*ids, *response, *reply], media + [None] * (len(response) + len(reply))


# ------------------------------------------------------------------------------------------------ history


def test_histories_are_not_empty_and_fit_their_budget():
    rng = np.random.default_rng(0)
    num_cut = 0
    for _ in range(500):
        tokens = rng.integers(1, 12, size=rng.integers(2, 12)).tolist()
        budget = int(rng.integers(1, 40))
        starts = history_starts(tokens, budget)
        assert len(starts) == len(tokens) - 1
        assert starts == sorted(starts)
        for target, start in enumerate(starts, start=1):
            assert 0 <= start < target
            # only the turn before the target may be longer than the budget, and then it stands alone
            assert sum(tokens[start:target]) <= budget or start == target - 1
        for target, (before, start) in enumerate(pairwise(starts), start=2):
            if start > before:  # moved only where it had to, and far enough to rest
                assert sum(tokens[before:target]) > budget
                assert sum(tokens[start:target]) <= budget // 2 or start == target - 1
        num_cut += starts[-1] > 0
    assert 100 < num_cut < 450


def test_a_budget_that_holds_all_drops_nothing():
    assert history_starts([3, 4, 5], budget=7) == [0, 0]
    assert history_starts([3, 4, 5], budget=6) == [0, 1]


@pytest.mark.parametrize("budget", BUDGETS)
def test_kept_turns_do_not_depend_on_the_streams(budget):
    for seed in range(20):
        rows = {}
        for streams in ((), ("audio",), ("audio", "video")):
            dialogue, _ = draw_dialogue(np.random.default_rng(seed), 6, streams=streams)
            rows[streams] = dialogue_rows(dialogue, budget, NUM_QUERIES)
        groups = [[row.target_turns for row in found] for found in rows.values()]
        assert groups[0] == groups[1] == groups[2]
        labels = [[[x for x in row.labels if x != -100] for row in found] for found in rows.values()]
        assert labels[0] == labels[1] == labels[2]


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_branch_sees_its_single_sample_and_nothing_else(budget):
    num_shared = 0
    for seed in range(30):
        dialogue, _ = draw_dialogue(np.random.default_rng(seed), 6)
        starts = history_starts(dialogue.turn_tokens, budget)
        rows = dialogue_rows(dialogue, budget, NUM_QUERIES)
        assert sorted(t for row in rows for t in row.target_turns) == [1, 2, 3, 4, 5]
        for row in rows:
            num_shared += len(row.target_turns) > 1
            branch, cut = np.array(row.branch), np.array(row.cut)
            for number, target in enumerate(row.target_turns):
                own = np.flatnonzero(branch == number)
                assert len(set(cut[own])) == 1
                trunk = np.arange(cut[own[0]])
                assert (branch[trunk] == TRUNK).all()
                seen = [*trunk, *own]
                ids, _ = sample_of(dialogue, target, starts[target - 1])
                assert [row.ids[i] for i in seen] == ids
                assert [row.positions[i] for i in seen] == list(range(len(ids)))
                reply = dialogue.targets[target - 1]
                assert tuple(row.labels[i] for i in own if row.labels[i] != -100) == reply.ids
                assert tuple(row.kinds[i] for i in own if row.kinds[i] != -1) == reply.kinds
                assert row.labels[own[0]] == -100  # a response comes first, and counts nothing
    assert num_shared > 10


def test_layout_sample_is_one_target_a_row():
    dialogue, _ = draw_dialogue(np.random.default_rng(1), 5)
    rows = dialogue_rows(dialogue, 10**6, NUM_QUERIES, layout="sample")
    assert [row.target_turns for row in rows] == [[1], [2], [3], [4]]
    assert [row.ids for row in rows] == [sample_of(dialogue, t, 0)[0] for t in (1, 2, 3, 4)]
    chosen = dialogue_rows(dialogue, 10**6, NUM_QUERIES, layout="sample", turns=[3])
    assert [row.ids for row in chosen] == [rows[2].ids]


def test_rows_for_generation_end_where_the_reply_begins():
    dialogue, _ = draw_dialogue(np.random.default_rng(1), 4)
    full = dialogue_rows(dialogue, 10**6, NUM_QUERIES, layout="sample")
    asked = dialogue_rows(dialogue, 10**6, NUM_QUERIES, layout="sample", with_targets=False)
    for row, short, target in zip(full, asked, dialogue.targets, strict=True):
        assert short.ids == row.ids[: -len(target.ids)]
        assert set(short.labels) == {-100}


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("layout", ["dialogue", "sample"])
def test_every_place_gets_its_utterance(layout, padding_side):
    for seed in range(10):
        batch, dialogues, features, rows = draw_batch(seed, budget=15, layout=layout, padding_side=padding_side)
        flat = [(d, row) for d, found in enumerate(rows) for row in found]
        length = batch.input_ids.shape[1]
        used = {stream: set() for stream in batch.streams}
        for b, (d, row) in enumerate(flat):
            at = length - len(row.ids) if padding_side == "left" else 0
            assert batch.input_ids[b, at : at + len(row.ids)].tolist() == row.ids
            is_padding = torch.ones(length, dtype=torch.bool)
            is_padding[at : at + len(row.ids)] = False
            assert ((batch.branch[b] == PADDING) == is_padding).all()
            start = history_starts(dialogues[d].turn_tokens, 15)[row.target_turns[-1] - 1]
            _, media = sample_of(dialogues[d], row.target_turns[-1], start)
            for place, what in enumerate(media):
                if what is None:
                    continue
                turn, stream, query = what
                found = batch.streams[stream]
                index = (found.places == b * length + at + place).nonzero()
                assert index.numel() == 1
                n, q = divmod(found.sources[index].item(), NUM_QUERIES[stream])
                assert q == query
                frames = torch.from_numpy(features[d][stream][turn])
                assert torch.equal(found.features[n, : found.lengths[n]], frames)
                assert not found.features[n, found.lengths[n] :].any()
                used[stream].add((d, turn))
        for stream, found in batch.streams.items():
            # every utterance once, however many rows use it
            assert len(found.features) == len(found.lengths) == len(used[stream])
            assert sorted(set(found.places.tolist())) == sorted(found.places.tolist())


def test_every_target_is_named_once():
    for layout in ("dialogue", "sample"):
        batch, dialogues, _, _ = draw_batch(3, budget=15, layout=layout)
        wanted = {(d.id, t): d.targets[t - 1] for d in dialogues for t in range(1, len(d.turns))}
        assert sorted(batch.target_ids) == sorted(wanted)
        is_target = batch.labels != -100
        assert ((batch.targets >= 0) == is_target).all()
        assert ((batch.kinds >= 0) == is_target).all()
        for number, name in enumerate(batch.target_ids):
            mine = batch.targets == number
            assert tuple(batch.labels[mine].tolist()) == wanted[name].ids
            assert tuple(batch.kinds[mine].tolist()) == wanted[name].kinds


def test_streams_that_no_turn_has_are_left_out():
    batch, *_ = draw_batch(0, streams=("audio",))
    assert set(batch.streams) == {"audio"}
    batch, *_ = draw_batch(0, present=0.0)
    assert batch.streams == {}


def test_inputs_are_left_as_they_were():
    batch, dialogues, features, rows = draw_batch(5)
    before = copy.deepcopy((dialogues, features, rows))
    again = collate(dialogues, features, rows, NUM_QUERIES)
    assert torch.equal(again.input_ids, batch.input_ids)
    for now, then in zip(rows, before[2], strict=True):
        assert now == then
    assert dialogues == before[0]
    for now, then in zip(features, before[1], strict=True):
        for stream in now:
            for a, b in zip(now[stream], then[stream], strict=True):
                np.testing.assert_array_equal(a, b)
