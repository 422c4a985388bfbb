import dataclasses
import itertools

import numpy as np
import pytest
import torch
from test_datamodule import SPECS, module_of

from msenc.data.missing import DroppedDialogues
from msenc.models.llm import load_tokenizer
from msenc.prompt import DialogueTokenizer, Prompt, Slot
from msenc.types import MsencError

PROMPT = Prompt(instruction="A talk.\n", turn="{speaker}:{video}{audio} {text}\n", response="{speaker}:")


@pytest.fixture(scope="module")
def tokenizer(demo_home):
    return DialogueTokenizer(PROMPT, load_tokenizer(str(demo_home / "data" / "tiny-llm")))


@pytest.fixture
def build(demo_home, tokenizer):
    def call(streams=tuple(SPECS), **options):
        datamodule = module_of(demo_home / "data" / "demo", tokenizer, streams, **options)
        datamodule.setup()
        return datamodule

    return call


def lacking(dialogues, stream):
    """(dialogue, turn) of the turns that have no such stream; all that says so agrees."""
    found = set()
    for index in range(len(dialogues)):
        tokens, features = dialogues[index]
        frames = dialogues.frames(index)
        for turn, block in enumerate(tokens.turns):
            is_gone = features[stream][turn] is None
            assert (Slot(stream) in block) is not is_gone
            assert (stream in frames[turn]) is not is_gone
            if is_gone:
                found.add((index, turn))
    return found


def test_turns_lose_a_stream_and_its_slot_and_keep_all_else(build, tokenizer):
    whole = build().dataset("train")
    turns = sum(len(whole.frames(index)) for index in range(len(whole)))
    half = DroppedDialogues(whole, {"audio": 0.5}, seed=1)
    gone = lacking(half, "audio")
    assert 0.3 < len(gone) / turns < 0.7
    assert not lacking(half, "video")
    text_only = build(()).dataset("train")
    video_only = build(("video",)).dataset("train")
    for index in range(len(whole)):
        (tokens, features), (own, _) = half[index], whole[index]
        assert (tokens.targets, tokens.turn_tokens) == (own.targets, own.turn_tokens)
        for turn, block in enumerate(tokens.turns):
            without = video_only.tokens(index).turns[turn]  # as a run reads it that has no audio
            assert block == (without if (index, turn) in gone else own.turns[turn])
        assert all(v is not None for v in features["video"])
    neither = DroppedDialogues(whole, {"audio": 1.0, "video": 1.0}, seed=1)
    assert all(neither.tokens(i).turns == text_only.tokens(i).turns for i in range(len(whole)))


def test_a_turn_that_lacks_a_stream_lacks_it_at_every_higher_share(build):
    whole = build().dataset("train")
    gone = [lacking(DroppedDialogues(whole, {"audio": share}, seed=1), "audio") for share in (0, 0.25, 0.5, 0.75, 1)]
    assert all(one < other for one, other in itertools.pairwise(gone))
    assert gone[0] == set()
    others = [DroppedDialogues(whole, {"audio": 0.5}, seed, epoch) for seed, epoch in ((1, 1), (2, 0))]
    assert all(lacking(other, "audio") != gone[2] for other in others)


def test_windows_keep_the_turns_that_they_keep_with_all_streams(build, demo_home, tokenizer):
    windowed = DialogueTokenizer(dataclasses.replace(PROMPT, windows={"audio": 60, "video": 9}), tokenizer.tokenizer)
    datamodule = module_of(demo_home / "data" / "demo", windowed, ("audio", "video"), drop={"audio": 0.5})
    datamodule.setup()
    whole = datamodule.dataset("train")
    half = DroppedDialogues(whole, {"audio": 0.5}, seed=1)
    assert all(half.tokens(i).windows == whole.tokens(i).windows for i in range(len(whole)))
    assert len(list(datamodule.train_dataloader())) == 4


def contents(batches):
    """What batches hold, to be compared bit by bit."""
    return [
        (
            batch.target_ids,
            batch.input_ids.tolist(),
            {name: [f.numpy().tobytes() for f in stream.features] for name, stream in batch.streams.items()},
        )
        for batch in batches
    ]


def epoch(loader, number):
    loader.set_epoch(number)
    return contents(loader)


def test_training_drops_by_seed_and_epoch_in_any_process_and_resumes_where_it_was(build):
    drop = {"audio": 0.5, "video": 0.2}
    one, other = (build(drop=drop, num_workers=workers).train_dataloader() for workers in (0, 2))
    first, second = epoch(one, 0), epoch(one, 1)
    assert [epoch(other, 0), epoch(other, 1)] == [first, second]
    assert epoch(build(drop=drop, seed=2).train_dataloader(), 0) != first
    whole = epoch(build().train_dataloader(), 0)
    assert sorted(sorted(ids) for ids, *_ in whole) == sorted(sorted(ids) for ids, *_ in first)
    assert sum(len(ids[0]) for _, ids, _ in first) < sum(len(ids[0]) for _, ids, _ in whole)
    resumed = build(drop=drop).train_dataloader()
    resumed.load_state_dict({"epoch": 1, "batches_done": 2})
    resumed.set_epoch(1)
    assert contents(resumed) == second[2:]


def test_nothing_is_dropped_when_it_is_validated(build):
    dropping, whole = build(drop={"audio": 0.9}), build()
    assert contents(dropping.val_dataloader()) == contents(whole.val_dataloader())
    without = next(iter(whole.eval_dataloader("val", drop={"audio": 1.0})))
    assert set(without.streams) == {"video"}
    assert not torch.equal(without.input_ids, next(iter(whole.val_dataloader())).input_ids)


def test_a_stream_that_the_run_does_not_read_is_refused(build):
    with pytest.raises(MsencError, match=r"data\.drop: found smell, .* Expected some of: audio, video\."):
        build(drop={"smell": 0.3})
    with pytest.raises(MsencError, match=r"data\.drop: found audio, .*: none, since its modality is text"):
        build((), drop={"audio": 0.3})


def test_draws_are_fair(build):
    whole = build().dataset("train")
    shares = []
    for seed in range(20):
        gone = lacking(DroppedDialogues(whole, {"video": 0.3}, seed), "video")
        shares.append(len(gone) / sum(len(whole.frames(i)) for i in range(len(whole))))
    assert np.mean(shares) == pytest.approx(0.3, abs=0.03)
