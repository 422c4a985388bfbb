import numpy as np
import pytest
from random_dialogues import NUM_QUERIES, draw_dialogue

from msenc.data.batches import (
    SharedBatches,
    budget_batches,
    budget_in_order,
    budget_units,
    count_batches,
    share,
    whole_dialogues,
)
from msenc.data.collate import dialogue_rows, history_starts
from msenc.data.lengths import DialogueLengths, measure, row_tokens
from msenc.types import Dialogue, MsencError, Utterance


def draw_lengths(seed):
    """Random token counts, and a budget that none exceeds: short and long units, few and many, equal ones too."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 200))
    kind = seed % 4
    if kind == 0:
        tokens = np.exp(rng.normal(5, 1, num)).astype(int) + 1
    elif kind == 1:
        tokens = rng.integers(1, 2000, num)
    elif kind == 2:
        tokens = np.full(num, int(rng.integers(1, 50)))
    else:
        tokens = rng.choice([1, 2, 3, 997, 1000], num)
    tokens = tokens.tolist()
    return tokens, int(max(tokens) * rng.choice([1, 1.01, 2, 7, 40]))


def cost(batch, tokens, is_padded):
    own = [tokens[i] for i in batch]
    return len(own) * max(own) if is_padded else sum(own)


# ------------------------------------------------------------------------------------------------ an epoch's batches


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_no_unit_is_lost_or_repeated_and_the_budget_holds_in_every_epoch(seed, is_padded):
    tokens, max_tokens = draw_lengths(seed)
    batches = budget_batches(tokens, max_tokens, seed, is_padded)
    for epoch in (0, 1, 2, 77):
        found = batches.batches_of(epoch)
        assert sorted(i for batch in found for i in batch) == list(range(len(tokens)))
        assert len(found) == len(batches)
        assert all(batch and cost(batch, tokens, is_padded) <= max_tokens for batch in found)


@pytest.mark.parametrize("seed", range(8))
def test_count_batches_hold_all_units(seed):
    tokens, _ = draw_lengths(seed)
    batches = count_batches(len(tokens), 7, seed)
    for epoch in (0, 1, 5):
        found = batches.batches_of(epoch)
        assert sorted(i for batch in found for i in batch) == list(range(len(tokens)))
        assert [len(batch) for batch in found[:-1]] == [7] * (len(batches) - 1)


def make_batches(kind, seed):
    tokens = np.random.default_rng(0).integers(10, 300, 150).tolist()
    if kind == "count":
        return count_batches(len(tokens), 8, seed)
    return budget_batches(tokens, 1000, seed, kind == "padded")


@pytest.mark.parametrize("kind", ["count", "sum", "padded"])
def test_the_order_depends_on_seed_and_epoch_alone(kind):
    def orders():
        return [make_batches(kind, seed).batches_of(epoch) for seed in (1, 2) for epoch in (0, 1, 2)]

    np.random.seed(1)
    first = orders()
    np.random.seed(2)
    assert first == orders()
    assert len({str(order) for order in first}) == 6
    batches = make_batches(kind, 1)
    assert [batches.batches_of(epoch) for epoch in (2, 0, 1)] == [first[2], first[0], first[1]]


@pytest.mark.parametrize("is_padded", [False, True])
def test_epochs_mix_units_anew(is_padded):
    tokens = np.random.default_rng(0).integers(10, 300, 600).tolist()
    batches = budget_batches(tokens, 1000, 1, is_padded)
    together = [{frozenset(batch) for batch in batches.batches_of(epoch)} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < len(batches) / 20


def test_batches_are_full_and_hold_little_padding():
    tokens = np.exp(np.random.default_rng(3).normal(6, 0.7, 1000)).astype(int).clip(20, 3000).tolist()
    summed = budget_batches(tokens, 4096, 1, is_padded=False)
    assert len(summed) <= 1.06 * sum(tokens) / 4096
    padded = budget_batches(tokens, 4096, 1, is_padded=True).batches_of(0)
    costs = [cost(batch, tokens, True) for batch in padded]
    assert sum(tokens) / sum(costs) > 0.97


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_evaluation_batches_keep_order_and_budget(seed, is_padded):
    tokens, max_tokens = draw_lengths(seed)
    found = budget_in_order(tokens, max_tokens, is_padded)
    assert [i for batch in found for i in batch] == list(range(len(tokens)))
    assert all(batch and cost(batch, tokens, is_padded) <= max_tokens for batch in found)


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("kind", ["count", "sum", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_divide_each_batch(kind, world_size):
    batches = make_batches(kind, 1)
    tokens = np.random.default_rng(0).integers(10, 300, 150).tolist()
    shares = [SharedBatches(batches, tokens, rank, world_size) for rank in range(world_size)]
    for epoch in (0, 3):
        whole = batches.batches_of(epoch)
        parts = [s.batches_of(epoch) for s in shares]
        assert all(len(part) == len(s) == len(whole) for part, s in zip(parts, shares, strict=True))
        for i, batch in enumerate(whole):
            own = [part[i] for part in parts]
            assert sorted(unit for units in own for unit in units) == sorted(batch)
            assert all(units == [u for u in batch if u in units] for units in own)  # in the batch's order
            loads = [sum(tokens[u] for u in units) for units in own]
            assert max(loads) - min(loads) <= max(tokens[u] for u in batch)


def test_fewer_units_than_processes_leave_some_without():
    assert [share([4, 2], [0, 0, 9, 0, 5], rank, 4) for rank in range(4)] == [[2], [4], [], []]


# ------------------------------------------------------------------------------------------------ units


def draw_dialogues(seed, num=12):
    rng = np.random.default_rng(seed)
    dialogues = [draw_dialogue(rng, int(rng.integers(2, 25)), name=f"d{i}")[0] for i in range(num)]
    return dialogues, [measure(d, Dialogue(d.id, "train", ())) for d in dialogues]


@pytest.mark.parametrize("layout", ["dialogue", "sample"])
@pytest.mark.parametrize("budget", [1, 15, 40, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_lengths_are_those_of_the_rows(seed, budget, layout):
    rng = np.random.default_rng(seed)
    for dialogue, lengths in zip(*draw_dialogues(seed), strict=True):
        some = sorted(rng.choice(len(dialogue.targets), size=(len(dialogue.targets) + 1) // 2, replace=False) + 1)
        for turns in (None, some):
            rows = dialogue_rows(dialogue, budget, NUM_QUERIES, layout, turns)
            assert row_tokens(lengths, budget, NUM_QUERIES, layout, turns) == [len(row.ids) for row in rows]


@pytest.mark.parametrize("layout", ["dialogue", "sample"])
@pytest.mark.parametrize("history", [20, 60, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_units_hold_every_target_once_within_the_budget(seed, history, layout):
    dialogues, lengths = draw_dialogues(seed)
    ids = [d.id for d in dialogues]
    alone = max(n for known in lengths for n in row_tokens(known, history, NUM_QUERIES, "sample"))
    for max_tokens in (alone, 2 * alone, 10**6):
        units = budget_units(lengths, history, NUM_QUERIES, layout, max_tokens, ids)
        targets = []
        for unit in units:
            rows = dialogue_rows(dialogues[unit.dialogue], history, NUM_QUERIES, layout, unit.turns)
            assert sum(len(row.ids) for row in rows) == unit.tokens <= max_tokens
            targets += [(unit.dialogue, turn) for row in rows for turn in row.target_turns]
        assert targets == [(i, turn) for i, d in enumerate(dialogues) for turn in range(1, len(d.turns))]
        if layout == "sample":
            assert all(len(unit.turns) == 1 for unit in units)
        elif max_tokens == 10**6:
            assert units == whole_dialogues(lengths, history, NUM_QUERIES, layout)
        elif max_tokens == alone:
            assert any(unit.turns is not None for unit in units)


def test_a_split_shortens_no_history():
    dialogue, lengths = (found[0] for found in draw_dialogues(5, num=1))
    alone = max(row_tokens(lengths, 40, NUM_QUERIES, "sample"))
    starts = history_starts(dialogue.turn_tokens, 40)
    units = budget_units([lengths], 40, NUM_QUERIES, "dialogue", alone, ["d0"])
    assert len(units) > 2
    for unit in units:
        for row in dialogue_rows(dialogue, 40, NUM_QUERIES, turns=unit.turns):
            trunk = {turn for _, turn, *_ in row.slots}
            assert not trunk or min(trunk) >= starts[row.target_turns[0] - 1]
        one_by_one = [dialogue_rows(dialogue, 40, NUM_QUERIES, "sample", [turn])[0] for turn in unit.turns]
        whole = {t: r for r in dialogue_rows(dialogue, 40, NUM_QUERIES, "sample") for t in r.target_turns}
        assert all(row.ids == whole[row.target_turns[0]].ids for row in one_by_one)


def test_a_target_over_the_budget_is_refused_with_what_to_set():
    short = DialogueLengths(2, [3, 3], [[], []], [1], [4], [3, 3], 0)
    long = DialogueLengths(2, [30, 20, 9], [[], ["audio"], []], [1, 1], [4, 5], [30, 20, 9], 0)
    with pytest.raises(MsencError) as caught:
        budget_units([short, long], 100, NUM_QUERIES, "dialogue", 36, ["x/train/a", "x/train/b"])
    assert str(caught.value) == (
        "data.max_tokens_per_batch=36: 2 targets exceed it on their own; the longest is turn 2 of x/train/b with 60 "
        "tokens (history, query vectors, reply). Set data.max_tokens_per_batch=60 or more, or a lower "
        "data.max_history_tokens (now 100)."
    )
    assert budget_units([short, long], 100, NUM_QUERIES, "dialogue", 60, ["a", "b"])[0].turns is None


def test_descriptions_are_counted():
    utterances = tuple(Utterance(str(i), "Ana", "Hi.", d) for i, d in enumerate(["a man", None, "a woman"]))
    dialogue, _ = draw_dialogue(np.random.default_rng(0), 3)
    assert measure(dialogue, Dialogue("d", "train", utterances)).described == 1
