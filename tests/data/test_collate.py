import copy
import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from random_dialogues import NUM_QUERIES, draw_dialogue

from msenc.data.collate import MIN_FILL, collate, dialogue_rows, history_starts
from msenc.prompt import Slot, Target

BUDGETS = (10**6, 20, 9)


def draw_batch(seed, num=3, budget=10**6, layout="dialogue", padding_side="right", **options):
    rng = np.random.default_rng(seed)
    drawn = [draw_dialogue(rng, int(rng.integers(2, 7)), f"d{i}", **options) for i in range(num)]
    dialogues, features = [d for d, _ in drawn], [f for _, f in drawn]
    with_targets = padding_side == "right"
    rows = [dialogue_rows(d, budget, NUM_QUERIES, layout, with_targets=with_targets) for d in dialogues]
    batch = collate(dialogues, features, rows, NUM_QUERIES, layout == "dialogue", padding_side)
    return batch, dialogues, features, rows


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
        labels = [[row.labels for row in found] for found in rows.values()]
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
            at = row.trunk
            for number, (target, (tokens, cut)) in enumerate(zip(row.target_turns, row.branches, strict=True)):
                own = range(at, at + tokens)
                at += tokens
                assert cut <= row.trunk
                seen = [*range(cut), *own]
                ids, _ = sample_of(dialogue, target, starts[target - 1])
                assert [row.ids[i] for i in seen] == ids
                assert [row.positions[i] for i in seen] == list(range(len(ids)))
                reply = dialogue.targets[target - 1]
                mine = [k for k, owner in enumerate(row.owners) if owner == number]
                assert tuple(row.labels[k] for k in mine) == reply.ids
                assert tuple(row.kinds[k] for k in mine) == reply.kinds
                assert [row.ids[row.predictors[k] + 1] for k in mine] == list(reply.ids)
                # a response comes first, and is not predicted
                assert [row.predictors[k] for k in mine] == list(own)[-len(reply.ids) - 1 : -1]
            assert at == len(row.ids)
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
        assert not short.labels
        assert not short.predictors


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(("layout", "padding_side"), [("dialogue", "right"), ("sample", "right"), ("sample", "left")])
def test_every_place_gets_its_utterance(layout, padding_side):
    for seed in range(10):
        batch, dialogues, features, rows = draw_batch(seed, budget=15, layout=layout, padding_side=padding_side)
        flat = [(d, row) for d, found in enumerate(rows) for row in found]
        length = batch.input_ids.shape[1]
        used = {stream: set() for stream in batch.streams}
        is_real = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        at = 0
        for b, (d, row) in enumerate(flat):
            if layout == "sample":
                at = b * length + (length - len(row.ids) if padding_side == "left" else 0)
            span = slice(at, at + len(row.ids))
            assert batch.input_ids.flatten()[span].tolist() == row.ids
            assert batch.position_ids.flatten()[span].tolist() == row.positions
            is_real[span] = True
            start = history_starts(dialogues[d].turn_tokens, 15)[row.target_turns[-1] - 1]
            _, media = sample_of(dialogues[d], row.target_turns[-1], start)
            for place, what in enumerate(media):
                if what is None:
                    continue
                turn, stream, query = what
                found = batch.streams[stream]
                index = (found.places == at + place).nonzero()
                assert index.numel() == 1
                n, q = divmod(found.sources[index].item(), NUM_QUERIES[stream])
                assert q == query
                assert torch.equal(utterances(found)[n], torch.from_numpy(features[d][stream][turn]))
                used[stream].add((d, turn))
            at += len(row.ids)
        if layout == "sample":
            assert torch.equal(batch.attention_mask.flatten(), is_real)
        else:
            assert is_real.all()
            assert [s.stop for s in batch.segments[:-1]] == [s.start for s in batch.segments[1:]]
        for stream, found in batch.streams.items():
            # every utterance once, however many rows use it
            assert len(utterances(found)) == len(used[stream])
            assert sorted(set(found.places.tolist())) == sorted(found.places.tolist())


def utterances(stream):
    """The real frames of each utterance, in the order of the connector's outputs."""
    return [f[:n] for group in zip(stream.features, stream.lengths, strict=True) for f, n in zip(*group, strict=True)]


def test_groups_of_frames_are_padded_with_few_zeros():
    batch, *_ = draw_batch(2, num=6)
    for stream in batch.streams.values():
        assert len(stream.features) > 1
        for features, lengths in zip(stream.features, stream.lengths, strict=True):
            assert features.dtype == torch.float16
            assert lengths.max() == features.shape[1]
            assert lengths.min() >= MIN_FILL * lengths.max()
            for frames, length in zip(features, lengths, strict=True):
                assert not frames[length:].any()


def test_every_target_is_named_once():
    for layout in ("dialogue", "sample"):
        batch, dialogues, _, _ = draw_batch(3, budget=15, layout=layout)
        wanted = {(d.id, t): d.targets[t - 1] for d in dialogues for t in range(1, len(d.turns))}
        assert sorted(batch.target_ids) == sorted(wanted)
        assert torch.equal(batch.input_ids.flatten()[batch.predictors + 1], batch.labels)
        for number, name in enumerate(batch.target_ids):
            mine = batch.targets == number
            assert tuple(batch.labels[mine].tolist()) == wanted[name].ids
            assert tuple(batch.kinds[mine].tolist()) == wanted[name].kinds


def test_rows_that_branch_cannot_be_padded():
    dialogue, features = draw_dialogue(np.random.default_rng(0), 4)
    rows = [dialogue_rows(dialogue, 10**6, NUM_QUERIES)]
    with pytest.raises(AssertionError, match="pack=True"):
        collate([dialogue], [features], rows, NUM_QUERIES)


def test_streams_that_no_turn_has_are_left_out():
    batch, *_ = draw_batch(0, streams=("audio",))
    assert set(batch.streams) == {"audio"}
    batch, *_ = draw_batch(0, present=0.0)
    assert batch.streams == {}


def test_inputs_are_left_as_they_were():
    batch, dialogues, features, rows = draw_batch(5)
    before = copy.deepcopy((dialogues, features, rows))
    again = collate(dialogues, features, rows, NUM_QUERIES, pack=True)
    assert torch.equal(again.input_ids, batch.input_ids)
    for now, then in zip(rows, before[2], strict=True):
        assert now == then
    assert dialogues == before[0]
    for now, then in zip(features, before[1], strict=True):
        for stream in now:
            for a, b in zip(now[stream], then[stream], strict=True):
                np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------ preferences


@pytest.mark.parametrize("layout", ["dialogue", "sample"])
def test_rejected_replies_are_further_branches_of_their_target(layout):
    dialogue, features = draw_dialogue(np.random.default_rng(1), 4)
    others = [Target((40 + k, 2), (0, 2)) for k in range(3)]
    preferred = dataclasses.replace(dialogue, rejected=((others[0],), (), (others[1], others[2])))
    rows = dialogue_rows(preferred, 10**6, NUM_QUERIES, layout)
    assert [turn for row in rows for turn in row.target_turns] == [1, 1, 2, 3, 3, 3]
    assert len(rows) == (1 if layout == "dialogue" else 6)
    batch = collate([preferred], [features], [rows], NUM_QUERIES, pack=layout == "dialogue")
    assert batch.pairs.tolist() == [[0, 1], [3, 4], [3, 5]]
    said = [tuple(batch.labels[batch.targets == number].tolist()) for number in range(6)]
    own = [target.ids for target in dialogue.targets]
    assert said == [own[0], (40, 2), own[1], own[2], (41, 2), (42, 2)]
    # Each replies to the same: what comes before it is that of the target's own sample.
    for number, row in enumerate(dialogue_rows(preferred, 10**6, NUM_QUERIES, "sample")):
        (alone, *_) = dialogue_rows(dialogue, 10**6, NUM_QUERIES, "sample", row.target_turns)
        assert row.ids[: -len(said[number])] == alone.ids[: -len(own[row.target_turns[0] - 1])]
    plain = dialogue_rows(dialogue, 10**6, NUM_QUERIES, layout)
    assert collate([dialogue], [features], [plain], NUM_QUERIES, pack=layout == "dialogue").pairs is None
    assert dialogue_rows(preferred, 10**6, NUM_QUERIES, layout, with_targets=False) == dialogue_rows(
        dialogue, 10**6, NUM_QUERIES, layout, with_targets=False
    )
