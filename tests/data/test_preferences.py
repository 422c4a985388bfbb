"""Preferences between replies, from conflicts and from tables, in the generated world of the conflict test."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conflict_world import MOODS, PROMPT, SPECS, write_world

from msenc.data.conflict import find_conflicts
from msenc.data.preferences import Context, Preference, PreferenceDataModule, keep_others
from msenc.models.llm import load_tokenizer
from msenc.prompt import DialogueTokenizer
from msenc.types import MsencError, Utterance


@pytest.fixture(scope="module")
def tokenizer(demo_home):
    return DialogueTokenizer(PROMPT, load_tokenizer(str(demo_home / "data" / "tiny-llm")))


def module_of(folder, tokenizer, pairs="conflict", streams=SPECS, **options):
    options = {"batch_size": 4, **options}
    datamodule = PreferenceDataModule(folder, streams, tokenizer, pairs=str(pairs), **options)
    datamodule.setup()
    return datamodule


def said_in(tokenizer, target):
    return tokenizer.tokenizer.decode(target.ids[:-1]).strip()


def contexts_of(datamodule, tokenizer):
    """Of each context: words and level of the voice of the first turn, the preferred reply, the rejected ones."""
    preferences = datamodule.preferences("test")
    for number in range(len(preferences)):
        tokens, features = preferences[number]
        words = tokenizer.tokenizer.decode([i for p in tokens.turns[0] if isinstance(p, tuple) for i in p])
        level = float(features["audio"][0][0, 0]) if features else 0.0
        yield words, level, said_in(tokenizer, tokens.targets[0]), [said_in(tokenizer, t) for t in tokens.rejected[0]]


def test_the_reply_to_the_voice_is_preferred_whatever_the_words_say(tmp_path, tokenizer):
    datamodule = module_of(write_world(tmp_path / "world", words_tell=True), tokenizer)
    items = find_conflicts(datamodule, "test")
    found = list(contexts_of(datamodule, tokenizer))
    assert len(found) == datamodule.num_pairs("test") == 4 * len(items) > 40
    count = Counter()
    for words, level, chosen, (rejected,) in found:
        is_happy, reads_happy = level > 0, "happy" in words
        assert (chosen, rejected) == (f"You are {MOODS[is_happy]}.", f"You are {MOODS[not is_happy]}.")
        count[is_happy, reads_happy] += 1
    assert set(count.values()) == {len(items)}  # the words tell nothing of what is preferred


def test_wrong_replies_are_rejected_where_nothing_contradicts(tmp_path, tokenizer):
    folder = write_world(tmp_path / "world", words_tell=True)
    datamodule = module_of(folder, tokenizer, "wrong")
    found = list(contexts_of(datamodule, tokenizer))
    assert len(found) == datamodule.num_pairs("test") == len(find_conflicts(datamodule, "test"))
    for words, level, chosen, (rejected,) in found:
        heard = MOODS[level > 0]
        assert MOODS["happy" in words] == heard
        assert (chosen, rejected) == (f"You are {heard}.", f"You are {MOODS[level < 0]}.")
    text = module_of(folder, tokenizer, "wrong", streams={})
    assert text.num_pairs("test") == datamodule.num_pairs("test")
    with pytest.raises(MsencError, match="this run reads text alone, and no turn of the split test whose words"):
        module_of(folder, tokenizer, streams={}).units("test")


def test_replies_that_no_preference_is_about_are_kept_once_in_their_dialogue_as_it_is():
    preference = Preference(Utterance("1", "Ben", "Yes."), (Utterance("1", "Ben", "No."),))
    contexts = [Context(0, {2: preference}, stream=s, words=w) for s, w in ((True, False), (False, False))]
    contexts += [Context(0, {4: preference}), Context(1, {1: preference}, words=True), Context(1, {1: preference})]
    found = keep_others(contexts, {0: 5, 1: 1}.get)
    assert [context.kept for context in found] == [(), (1, 3, 5), (), (), ()]
    assert [context.turns for context in found] == [(2,), (1, 2, 3, 5), (4,), (1,), (1,)]
    assert [replace(context, kept=()) for context in found] == contexts


def test_kept_replies_are_targets_without_a_pair(tmp_path, tokenizer):
    folder = write_world(tmp_path / "world", words_tell=True, more="It is late.")
    plain, keeping = (module_of(folder, tokenizer, keeps=keeps) for keeps in (False, True))
    numbers = []
    for datamodule in (plain, keeping):
        batches = list(datamodule._eval_loader("test", datamodule._eval_batches("test")))
        numbers.append([sum(len(b.pairs) for b in batches), sum(len(b.target_ids) for b in batches)])
        assert sum(batch.input_ids.numel() for batch in batches) == sum(u.tokens for u in datamodule.units("test"))
    (pairs, targets), (same_pairs, more_targets) = numbers
    assert pairs == same_pairs == datamodule.num_pairs("test")
    about = {context.dialogue for context in keeping.preferences("test").contexts}
    assert more_targets - targets == len(about) > 10  # one other reply each
    said = [said_in(tokenizer, keeping.preferences("test").tokens(n).targets[1]) for n in range(len(about))]
    assert set(said) == {"It is late."}


@pytest.mark.parametrize("budget", [None, 60])
def test_batches_hold_each_pair_once_and_keep_to_the_budget(tmp_path, tokenizer, budget):
    size = {"batch_size": None, "max_tokens_per_batch": budget} if budget else {}
    datamodule = module_of(write_world(tmp_path / "world"), tokenizer, "wrong", **size)
    batches = list(datamodule._eval_loader("test", datamodule._eval_batches("test")))
    assert sum(len(batch.pairs) for batch in batches) == datamodule.num_pairs("test") > 10
    assert sum(batch.input_ids.numel() for batch in batches) == sum(u.tokens for u in datamodule.units("test"))
    for unit in datamodule.units("test"):
        assert sum(datamodule.row_lengths("test", unit)) == unit.tokens
    if budget:
        assert max(batch.input_ids.numel() for batch in batches) <= budget
        with pytest.raises(MsencError, match=r"max_tokens_per_batch=20: .* targets exceed it on their own"):
            module_of(tmp_path / "world", tokenizer, "wrong", batch_size=None, max_tokens_per_batch=20).units("test")


# ------------------------------------------------------------------------------------------------ tables


def table(folder, *rows, header="dialogue,utterance,rejected"):
    path = folder / "pairs.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_table_names_replies_by_dialogue_and_utterance(tmp_path, tokenizer):
    folder = write_world(tmp_path / "world", is_described=True)
    header = "rejected_description, utterance,dialogue,rejected"
    rows = ["", ",1,dia3,No way.", "a man speaks loudly,utt1,world/test/dia3,", '"slow, dull",1,dia0,"Well, no."']
    datamodule = module_of(folder, tokenizer, table(tmp_path, *rows, header="\ufeff" + header))
    first, second = contexts_of(datamodule, tokenizer)
    own = [datamodule.dataset("test").dialogue(index).utterances[1] for index in (0, 3)]
    assert first[2:] == (f"{own[0].text} ({own[0].description})", ["Well, no. (slow, dull)"])
    replies = [f"No way. ({own[1].description})", f"{own[1].text} (a man speaks loudly)"]
    assert second[2:] == (f"{own[1].text} ({own[1].description})", replies)
    assert [np.sign(level) for _, level, *_ in (first, second)] == [
        np.sign(datamodule.dataset("test").features(index)["audio"][0][0, 0]) for index in (0, 3)
    ]
    before = datamodule.pairs_hash()
    table(tmp_path, "dia3,1,Never.")
    assert datamodule.pairs_hash() != before


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("dialogue,reply,rejected", "", r"row 1: found 'dialogue,reply,rejected', expected the columns dialogue,"),
        ("dialogue,utterance,rejected,rejected", "", "row 1: found"),
        (None, "dia3,1", r"row 2: found 2 values, expected 3"),
        (None, "dia99,1,No.", r"row 2: dialogue is 'dia99', expected one of the data .* such as world/test/dia0"),
        (None, "dia3,7,No.", r"row 2: utterance is '7'; expected a reply in world/test/dia3: one of 1"),
        (None, "dia3,0,No.", r"row 2: utterance is '0', the first turn, which replies to nothing; expected"),
        (None, "dia3,1,", r"row 2: the rejected reply is that of the data, 'You are "),
        ("dialogue,utterance,rejected,rejected_description", "dia3,1,No.,a (b)", r"row 2: .* none with brackets"),
        (None, 'dia3,1,"No', r"row 2: cannot be read as CSV"),
        (None, "", r"found no row of the split test, expected preferences to validate on"),
    ],
)
def test_a_table_that_says_nothing_is_refused_with_its_row(tmp_path, tokenizer, header, row, message):
    folder = write_world(tmp_path / "world")
    path = table(tmp_path, row, header=header or "dialogue,utterance,rejected")
    with pytest.raises(MsencError, match=message):
        module_of(folder, tokenizer, path).units("test")


def test_a_missing_table_is_refused(tmp_path, tokenizer):
    datamodule = module_of(write_world(tmp_path / "world"), tokenizer, tmp_path / "none.csv")
    with pytest.raises(MsencError, match=r"none\.csv: missing\. Expected a table with the columns dialogue"):
        datamodule.pairs_hash()
