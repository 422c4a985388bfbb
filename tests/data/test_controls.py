from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from msenc.data.controls import Control, ControlledDialogues, moments, read_controls
from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import DialogueDataset, StreamSpec
from msenc.models.llm import load_tokenizer
from msenc.prompt import DialogueTokenizer, Prompt
from msenc.types import MsencError

SPECS = {"audio": StreamSpec("logmel", 80, 2), "video": StreamSpec("pixels", 256, 3)}
PROMPT = Prompt(instruction="A talk.\n", turn="{speaker}:{video}{audio} {text}\n", response="{speaker}:")


@pytest.fixture(scope="module")
def tokenizer(demo_home):
    return DialogueTokenizer(PROMPT, load_tokenizer(str(demo_home / "data" / "tiny-llm")))


@pytest.fixture
def datamodule(demo_home, tokenizer):
    return build(demo_home, tokenizer)


def build(demo_home, tokenizer, **options):
    datamodule = DialogueDataModule(demo_home / "data" / "demo", SPECS, tokenizer, batch_size=4, **options)
    datamodule.setup()
    return datamodule


def frames_of(dataset, stream):
    """(index, turn) -> frames."""
    return {(i, k): f for i in range(len(dataset)) for k, f in enumerate(dataset[i][1][stream]) if f is not None}


def test_a_shuffled_stream_is_another_dialogues_and_all_else_stays(datamodule):
    plain = datamodule.dataset("train")
    shuffled = datamodule.controlled(plain, Control("shuffle", "audio"))
    own = frames_of(plain, "audio")
    home = {frames.tobytes(): index for (index, _), frames in own.items()}
    moved = frames_of(shuffled, "audio")
    assert own.keys() == moved.keys()
    donors = {}
    for (index, _), frames in moved.items():
        donors.setdefault(index, set()).add(home[frames.tobytes()])
    assert all(len(found) == 1 and index not in found for index, found in donors.items())
    assert sorted(*zip(*donors.values(), strict=True)) == sorted(donors)  # each dialogue gives once
    for index in range(len(plain)):
        assert plain[index][0] == shuffled[index][0]
        for a, b in zip(plain[index][1]["video"], shuffled[index][1]["video"], strict=True):
            np.testing.assert_array_equal(a, b)


def test_draws_take_from_other_dialogues_and_a_seed_repeats_them(demo_home, tokenizer, datamodule):
    plain = datamodule.dataset("val")
    assert len(plain) == 4
    control = Control("shuffle", "video")
    first = [datamodule.controlled(plain, control, draw)[0][1]["video"][0].tobytes() for draw in range(3)]
    assert len(set(first)) == 3
    again = build(demo_home, tokenizer)
    assert again.controlled(again.dataset("val"), control, 1)[0][1]["video"][0].tobytes() == first[1]
    others = [build(demo_home, tokenizer, seed=seed) for seed in range(2, 8)]
    assert any(m.controlled(m.dataset("val"), control)[0][1]["video"][0].tobytes() != first[0] for m in others)


def test_zeros_and_noise_keep_the_form(datamodule):
    plain = datamodule.dataset("val")
    own = frames_of(plain, "audio")
    zero = frames_of(datamodule.controlled(plain, Control("zero", "audio")), "audio")
    noise = frames_of(datamodule.controlled(plain, Control("noise", "audio")), "audio")
    other = frames_of(datamodule.controlled(plain, Control("noise", "audio"), 1), "audio")
    for place, frames in own.items():
        assert frames.shape == zero[place].shape == noise[place].shape
        assert noise[place].dtype == frames.dtype
        assert not zero[place].any()
        assert not np.array_equal(noise[place], other[place])
    train = np.concatenate([*frames_of(datamodule.dataset("train"), "audio").values()]).astype(np.float64)
    drawn = np.concatenate([*noise.values()]).astype(np.float64)
    error = train.std(axis=0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(axis=0) - train.mean(axis=0)) < 5 * error).all()
    np.testing.assert_allclose(drawn.std(axis=0), train.std(axis=0), rtol=0.1)


def test_moments_are_those_of_the_data(datamodule):
    dataset = datamodule.dataset("train")
    mean, spread = moments(map(dataset.features, range(len(dataset))), "video")
    frames = np.concatenate([*frames_of(dataset, "video").values()]).astype(np.float64)
    np.testing.assert_allclose(mean, frames.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(spread, frames.std(axis=0), atol=1e-4)


def test_shuffled_words_leave_speakers_targets_and_the_history_rule(datamodule, tokenizer):
    plain = datamodule.dataset("train")
    shuffled = datamodule.controlled(plain, Control("shuffle", "text"))
    spoken = {u.text for i in range(len(plain)) for u in plain.dialogue(i).utterances}
    for index in range(len(plain)):
        (a, _), (b, _) = plain[index], shuffled[index]
        assert a.turns != b.turns
        assert replace(b, turns=a.turns) == a
        own = plain.dialogue(index)
        for turn, block in enumerate(b.turns):
            text = tokenizer.tokenizer.decode([id for piece in block if isinstance(piece, tuple) for id in piece])
            speaker, _, said = text.strip().partition(":")
            assert speaker == own.utterances[turn].speaker
            assert said.strip() in spoken


def test_a_prompts_windows_see_as_many_frames_as_before(demo_home, tokenizer):
    windowed = DialogueTokenizer(replace(PROMPT, windows={"audio": 60, "video": 9}), tokenizer.tokenizer)
    datamodule = build(demo_home, windowed)
    plain = datamodule.dataset("val")
    shuffled = datamodule.controlled(plain, Control("shuffle", "audio"))
    assert {k: f.shape for k, f in frames_of(plain, "audio").items()} == {
        k: f.shape for k, f in frames_of(shuffled, "audio").items()
    }
    for batch in datamodule.eval_dataloader("val", control=Control("shuffle", "audio")):
        assert batch.target_ids


def test_a_control_of_the_data_holds_in_training_too(demo_home, tokenizer, datamodule):
    controlled = build(demo_home, tokenizer, control="zero_audio")
    for split in ("train", "val"):
        assert not any(f.any() for f in frames_of(controlled.dataset(split), "audio").values())
    (batch, *_), (plain, *_) = controlled.train_dataloader(), datamodule.train_dataloader()
    assert batch.target_ids == plain.target_ids
    assert not any(group.any() for group in batch.streams["audio"].features)
    twice = controlled.controlled(controlled.dataset("val"), Control("shuffle", "video"))  # one upon the other
    assert not any(f.any() for f in frames_of(twice, "audio").values())
    assert {f.tobytes() for f in frames_of(twice, "video").values()} <= {
        f.tobytes() for f in frames_of(datamodule.dataset("val"), "video").values()
    }


def test_lacking_turns_stay_lacking(datamodule):
    class Gaps(DialogueDataset):
        """The split, where every second turn has no sound, and the first dialogue none at all."""

        with_sound = range(1, 10**6)

        def keeps(self, index, turn):
            return index in self.with_sound and turn % 2 == 0

        def frames(self, index):
            return [
                {s: n for s, n in turn.items() if self.keeps(index, k)} for k, turn in enumerate(super().frames(index))
            ]

        def features(self, index):
            own = super().features(index)["audio"]
            return {"audio": [f if self.keeps(index, k) else None for k, f in enumerate(own)]}

    dialogues = Gaps(datamodule.folder, "train", datamodule.streams, datamodule.tokenizer)
    shuffled = ControlledDialogues(dialogues, Control("shuffle", "audio"), seed=1)
    for index in range(len(dialogues.ids)):
        own, found = dialogues[index][1]["audio"], shuffled[index][1]["audio"]
        assert [f is None for f in own] == [f is None for f in found]
    dialogues.with_sound = {1}
    with pytest.raises(MsencError, match="shuffle_audio: dialogues of the split 'train' that have audio: 1, expected"):
        ControlledDialogues(dialogues, Control("shuffle", "audio"), seed=1)


def test_unknown_controls_are_refused():
    assert read_controls(["zero_audio", "shuffle", "zero_audio"], ["audio"]) == [
        Control("zero", "audio"),
        Control("shuffle", "text"),
        Control("shuffle", "audio"),
    ]
    for wrong in ("shuffle_video", "mute_audio", "zero_text", ["shuffle_audio", "noise"]):
        with pytest.raises(
            MsencError, match=r"this run has no such control\. Expected one of: shuffle \(all streams\), shuff"
        ):
            read_controls(wrong, ["audio"])


def test_consecutive_draws_never_return_the_own_dialogue(datamodule):
    plain = datamodule.dataset("val")
    own = [plain[i][1]["audio"][0].tobytes() for i in range(len(plain))]
    for draw in range(9):  # more draws than there are other dialogues
        shuffled = datamodule.controlled(plain, Control("shuffle", "audio"), draw)
        assert all(shuffled[i][1]["audio"][0].tobytes() != own[i] for i in range(len(plain)))
    assert all(a != b for a, b in pairwise(own))
