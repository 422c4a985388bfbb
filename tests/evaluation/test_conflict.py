"""A generated world in which voice and words either tell the mood or not, and listeners whose habits are known."""

import dataclasses
import json
import os
from collections import Counter

import pytest
import torch
from conflict_world import MOODS, PROMPT, SPECS, write_world

from msenc.data.conflict import ConflictSamples, find_conflicts
from msenc.data.datamodule import DialogueDataModule
from msenc.evaluation.conflict import evaluate_conflict, read_conflict, shares_of, write_conflict
from msenc.models.conversation import TokenScores
from msenc.models.llm import load_tokenizer
from msenc.prompt import DialogueTokenizer
from msenc.types import MsencError


@pytest.fixture(scope="module")
def tokenizer(demo_home):
    return DialogueTokenizer(PROMPT, load_tokenizer(str(demo_home / "data" / "tiny-llm")))


def module_of(folder, tokenizer, streams=SPECS):
    datamodule = DialogueDataModule(folder, streams, tokenizer, batch_size=4)
    datamodule.setup()
    return datamodule


class Listener(torch.nn.Module):
    """Names the mood that it hears (in the level of the last clip) or reads; and likes short replies and some words."""

    def __init__(self, tokenizer, hears=0.0, reads=0.0):
        super().__init__()
        self.tokenizer, self.hears, self.reads = tokenizer, hears, reads
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def computing(self):
        return torch.inference_mode()

    def forward(self, batch):
        nll = torch.full(batch.labels.shape, 0.5)
        for number, segment in enumerate(batch.segments):
            mine = batch.targets == number
            read = self.tokenizer.decode(batch.input_ids[0, segment.start : int(batch.predictors[mine][0])])
            said = self.tokenizer.decode(batch.labels[mine])
            belief = 0.0
            if self.reads:
                belief += self.reads * (("happy" in read) - ("sad" in read))
            if self.hears:
                stream = batch.streams["audio"]
                clips = [clip for group in stream.features for clip in group]
                (here,) = ((stream.places >= segment.start) & (stream.places < segment.stop)).nonzero().T
                belief += self.hears * float(clips[stream.sources[here[-1]]][0, 0])
            first = int(mine.nonzero()[0])
            nll[first] += 3 * ("happy" in said)  # a habit that is no evidence
            nll[first] -= belief * (("happy" in said) - ("sad" in said))
        return TokenScores(nll=nll, correct=nll < 0)


def measure(folder, tokenizer, listener, streams=SPECS, names=None):
    datamodule = module_of(folder, tokenizer, streams)
    items = find_conflicts(datamodule, "test", names)
    shares, rows = evaluate_conflict(listener, datamodule, "test", items)
    assert len(rows) == len(items)
    return shares, rows


def test_a_listener_follows_the_voice_a_reader_the_words_and_habits_count_for_nothing(tmp_path, tokenizer):
    silent = write_world(tmp_path / "silent")
    telling = write_world(tmp_path / "telling", words_tell=True)
    for folder, habits, expected in (
        (silent, {"hears": 1.0}, (1.0, "the voice")),
        (silent, {}, (0.5, "not shown")),
        (silent, {"reads": 1.0}, (0.5, "not shown")),
        (telling, {"reads": 1.0}, (0.0, "the words")),
        (telling, {"reads": 1.0, "hears": 0.5}, (0.0, "the words")),
        (telling, {"reads": 0.5, "hears": 1.0}, (1.0, "the voice")),
    ):
        (found,), rows = measure(folder, tokenizer, Listener(tokenizer.tokenizer, **habits))
        assert (found["follows_stream"], found["verdict"]) == expected, habits
        assert found["compared"] == "planted word"
        assert found["items"] == len(rows) > 10
        assert found["follows_words"] == 1 - found["follows_stream"]


def test_a_text_run_has_the_same_items_and_follows_the_words_where_they_tell(tmp_path, tokenizer):
    telling = write_world(tmp_path / "telling", words_tell=True)
    _, heard = measure(telling, tokenizer, Listener(tokenizer.tokenizer, hears=1.0))
    (found,), read = measure(telling, tokenizer, Listener(tokenizer.tokenizer, reads=1.0), streams={})
    keys = ("stream", "label", "dialogue", "turn", "donor", "labels")
    assert [[row[k] for k in keys] for row in heard] == [[row[k] for k in keys] for row in read]
    assert found["verdict"] == "the words"


def test_items_pair_turns_of_one_speaker_whose_labels_differ(tmp_path, tokenizer):
    datamodule = module_of(write_world(tmp_path / "world"), tokenizer)
    dataset = datamodule.dataset("test")
    items = find_conflicts(datamodule, "test")
    assert len({item.place for item in items}) == len(items) > 10
    assert {(item.donor, item.place) for item in items} == {(item.place, item.donor) for item in items}
    speakers = [dataset.dialogue(i).utterances[0].speaker for i in range(len(dataset))]
    moods = [dataset.dialogue(i).utterances[1].text for i in range(len(dataset))]
    count = Counter(zip(speakers, moods, strict=True))
    possible = sum(2 * min(count[speaker, f"You are {mood}."] for mood in MOODS) for speaker in set(speakers))
    assert sum(item.same_speaker for item in items) == possible
    for item in items:
        assert item.same_speaker == (speakers[item.place[0]] == speakers[item.donor[0]])
        assert [reply.text for reply in item.replies] == [moods[item.place[0]], moods[item.donor[0]]]
        assert item.values[0] != item.values[1]
    assert find_conflicts(datamodule, "test", limit=6) != items


def test_samples_exchange_the_voice_or_the_words_and_nothing_else(tmp_path, tokenizer):
    datamodule = module_of(write_world(tmp_path / "world", words_tell=True), tokenizer)
    dataset = datamodule.dataset("test")
    items = find_conflicts(datamodule, "test")
    samples, decode = ConflictSamples(dataset, items), tokenizer.tokenizer.decode
    for item, four in zip(items, map(samples.__getitem__, range(len(samples))), strict=True):
        own, donor = dataset[item.place[0]], dataset[item.donor[0]]
        voices = [float(features["audio"][0][0, 0]) for _, features, _ in four]
        mine, theirs = (float(one[1]["audio"][0][0, 0]) for one in (own, donor))
        assert voices == [theirs, theirs, mine, mine]
        assert mine != theirs
        read = [decode([i for p in t.turns[0] if isinstance(p, tuple) for i in p]) for t, _, _ in four]
        assert [MOODS[0] in text for text in read] == [value == MOODS[0] for value in item.values for _ in range(2)]
        said = [decode(t.targets[0].ids) for t, _, _ in four]
        assert [MOODS[0] in text for text in said] == [value == MOODS[0] for value in item.values] * 2
        assert all(turns == (1,) for _, _, turns in four)
        assert all(dataclasses.replace(t, turns=own[0].turns, targets=own[0].targets) == own[0] for t, _, _ in four)


def test_labels_of_a_column_compare_descriptions_or_else_replies(tmp_path, tokenizer):
    described = module_of(write_world(tmp_path / "a", is_planted=False, is_described=True), tokenizer)
    items = find_conflicts(described, "test")
    assert {(i.label, i.compared) for i in items} == {("Mood", "description")}  # every Take is another one
    for item in items:
        own, other = item.replies
        assert own.text == other.text
        assert own.description != other.description
    plain = module_of(write_world(tmp_path / "b", is_planted=False), tokenizer)
    assert {(i.label, i.compared) for i in find_conflicts(plain, "test")} == {("Mood", "reply")}
    named = find_conflicts(plain, "test", ["Take", "Mood"])
    assert {i.label for i in named} == {"Take", "Mood"}
    planted = module_of(write_world(tmp_path / "c"), tokenizer)
    assert {i.label for i in find_conflicts(planted, "test")} == {"planted"}
    assert {i.label for i in find_conflicts(planted, "test", ["Mood"])} == {"Mood"}


def test_what_lacks_labels_or_streams_is_refused_in_a_line(tmp_path, tokenizer):
    datamodule = module_of(write_world(tmp_path / "world"), tokenizer)
    with pytest.raises(MsencError, match=r"found no label Pitch that varies\. Known: planted, Mood, Take"):
        find_conflicts(datamodule, "test", ["Pitch"])
    with pytest.raises(MsencError, match="found no two turns that differ in planted, have audio and get"):
        find_conflicts(datamodule, "test", limit=1)
    silent = module_of(write_world(tmp_path / "silent", is_spoken=False), tokenizer, {})
    with pytest.raises(MsencError, match="found no audio or video, expected turns whose"):
        find_conflicts(silent, "test")
    bare = write_world(tmp_path / "bare", is_planted=False)
    (bare / "labels.jsonl").unlink()
    with pytest.raises(MsencError, match=r"found no label of the turns\. Known: none\. Labels are columns"):
        find_conflicts(module_of(bare, tokenizer), "test")


def test_shares_of_several_runs_have_a_wider_interval_than_one(tmp_path, tokenizer):
    row = {"stream": "video", "label": "planted", "compared": "planted word", "turn": 0, "same_speaker": True}
    runs = [[{**row, "dialogue": str(k), "nats": -1.0 if k % 10 < many else 1.0} for k in range(60)] for many in (7, 9)]
    (one,), (both,) = shares_of(runs[:1]), shares_of(runs)
    assert (one["follows_stream"], both["follows_stream"]) == (0.7, 0.8)
    assert one["verdict"] == "the face"
    assert both["high"] - both["low"] > one["high"] - one["low"]
    assert both["high"] == 1.0  # a share is no more


def test_items_are_read_back_unless_the_evaluation_is_newer(tmp_path, tokenizer):
    folder = tmp_path / "evaluation"
    shares, rows = measure(write_world(tmp_path / "world"), tokenizer, Listener(tokenizer.tokenizer, hears=1.0))
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")
    write_conflict(folder, "true", shares, rows)
    assert shares_of([read_conflict(folder)]) == shares == json.loads((folder / "conflict.json").read_text())["shares"]
    os.utime(folder / "metrics.json", (2e9, 2e9))
    assert read_conflict(folder) == []
    os.utime(folder / "metrics.json", (1e9, 1e9))
    (folder / "conflict.jsonl").write_text(json.dumps({**rows[0], "stream": "smell"}) + "\n")
    with pytest.raises(MsencError, match=r"conflict\.jsonl, line 1, stream: found 'smell'"):
        read_conflict(folder)
