"""A control against a model whose use of the audio is known: a listener that is right about what it hears so often."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from msenc.data.controls import Control
from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import StreamSpec
from msenc.demo.world import draw_dialogues
from msenc.evaluation.losses import evaluate_control, evaluate_split, loss_metrics
from msenc.models.conversation import TokenScores
from msenc.models.llm import load_tokenizer
from msenc.prompt import TOKEN_KINDS, DialogueTokenizer, Prompt
from msenc.store.manifest import DatasetManifest, StreamInfo
from msenc.store.shards import ShardReader, write_stream

PLANTED = TOKEN_KINDS.index("planted_audio")
PROMPT = Prompt(instruction="A talk.\n", turn="{speaker}:{audio} {text}\n", response="{speaker}:")
NUM_DIALOGUES = 150
SHUFFLE = Control("shuffle", "audio")


class Listener(nn.Module):
    """Bets on a planted word by the sign of the first feature of the turn before; any other token costs 0.5 nats.

    Args:
        moods: (dialogue id, turn) -> whether that turn sounds excited, which is what the word says.
        odds: nats per unit of the feature that the listener puts on the mood that it hears.
    """

    def __init__(self, moods, odds):
        super().__init__()
        self.moods = moods
        self.odds = nn.Parameter(torch.tensor(float(odds)))

    def computing(self):
        return nullcontext()

    def forward(self, batch):
        audio = batch.streams["audio"]
        heard = torch.cat([group[:, 0, 0].float() for group in audio.features])  # (utterances,), one query each
        length = batch.input_ids.shape[1]
        rows = audio.places // length
        last = {row: n for n, row in enumerate(rows.tolist())}  # the slots of a row stand in the order of its turns
        logits = []
        for target, predictor in zip(batch.targets.tolist(), batch.predictors.tolist(), strict=True):
            dialogue, turn = batch.target_ids[target]
            feature = heard[audio.sources[last[predictor // length]]]
            logits.append(feature * self.odds * (1 if self.moods[dialogue, turn - 1] else -1))
        nll = -nn.functional.logsigmoid(torch.stack(logits))
        nll = torch.where(batch.kinds == PLANTED, nll, torch.full_like(nll, 0.5))
        return TokenScores(nll=nll, correct=nll < math.log(2))


@pytest.fixture(scope="module")
def talks():
    return draw_dialogues("train", NUM_DIALOGUES, seed=3)


@pytest.fixture(scope="module")
def moods(talks):
    return {(t.dialogue.id, k): turn.is_excited for t in talks for k, turn in enumerate(t.turns)}


@pytest.fixture(scope="module")
def build(demo_home, talks, tmp_path_factory):
    """The demo's dialogues, whose audio is one frame a turn: 1 where it is excited, else -1, and a dimension apart."""
    folder = tmp_path_factory.mktemp("listened") / "demo"
    dialogues = [t.dialogue for t in talks]
    turns = write_stream(folder / "turns", [(d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues], {})
    signs = [np.array([[1.0 if turn.is_excited else -1.0, 3.0] for turn in t.turns], np.float16) for t in talks]
    samples = [
        (d.id, d.split, {"features.npy": features, "offsets.npy": np.arange(len(features) + 1)})
        for d, features in zip(dialogues, signs, strict=True)
    ]
    audio = write_stream(folder / "audio-sign", samples, {})
    info = StreamInfo("audio", "sign", 2, {}, audio["hash"], {"train": sum(map(len, signs))})
    DatasetManifest("demo", {}, {"audio-sign": info}, turns_hash=turns["hash"]).write(folder)
    tokenizer = DialogueTokenizer(PROMPT, load_tokenizer(str(demo_home / "data" / "tiny-llm")))

    def call(**options):
        streams = {"audio": StreamSpec("sign", 2, 1)}
        datamodule = DialogueDataModule(folder, streams, tokenizer, layout="sample", batch_size=16, **options)
        datamodule.setup()
        return datamodule

    return call


def measure(model, datamodule, draws=8):
    plain, predictions = evaluate_split(model, datamodule, "train", None, seed=1)
    controlled, _ = evaluate_control(model, datamodule, "train", SHUFFLE, predictions, draws)
    return plain, controlled


@pytest.mark.parametrize("odds", [4, 2])
def test_shuffled_audio_costs_the_bits_that_a_listener_takes_from_it(build, moods, talks, odds):
    plain, controlled = measure(Listener(moods, odds), build())
    bits = sum(m.bits for t in talks for u in t.dialogue.utterances for m in u.marks if m.kind == "audio")
    heard = math.log1p(math.exp(-odds))  # the loss per planted bit with the right audio; ln 2 without any
    assert plain["planted/audio/recovered"] == pytest.approx(1 - heard / math.log(2), abs=1e-5)
    taken = bits * (math.log(2) - heard) / plain["tokens"]
    assert controlled["control/low"] < taken < controlled["control/high"]
    assert controlled["control/high"] - controlled["control/low"] < taken / 2
    assert controlled["control/verdict"] == "used"
    assert controlled["planted/audio/recovered"] == pytest.approx(0, abs=0.1)
    assert controlled["nll/reply"] == plain["nll/reply"] == pytest.approx(0.5)


def test_what_is_recovered_in_words_is_told_apart_from_descriptions(build, moods):
    plain, predictions = evaluate_split(Listener(moods, 3), build(), "train", None, seed=1)
    heard = 1 - math.log1p(math.exp(-3)) / math.log(2)
    assert plain["planted/audio/in_words"] == pytest.approx(heard, abs=1e-5)
    assert plain["planted/audio/in_descriptions"] == pytest.approx(heard, abs=1e-5)
    assert "planted/both/recovered" in plain
    assert "planted/both/in_words" not in plain
    for prediction in predictions:
        for place in range(prediction["words"], len(prediction["nll"])):
            if prediction["kinds"][place] == "planted_audio":
                prediction["nll"][place] = math.log(2)
    deaf = loss_metrics(predictions)
    assert deaf["planted/audio/in_words"] == pytest.approx(heard, abs=1e-5)
    assert deaf["planted/audio/in_descriptions"] == pytest.approx(0, abs=1e-5)
    for prediction in predictions:  # as earlier versions wrote them
        del prediction["words"], prediction["bits_in_words"]
    assert loss_metrics(predictions) == {name: v for name, v in deaf.items() if "/in_" not in name}


def test_each_feature_is_read_once_per_scoring(build, moods, talks, monkeypatch):
    reads = []
    original = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, id: reads.append(self.stream) or original(self, id))
    datamodule = build()
    datamodule.units("train")
    reads.clear()
    _, predictions = evaluate_split(Listener(moods, 2), datamodule, "train", None, seed=1)
    assert reads.count("audio-sign") == len(talks)
    reads.clear()
    evaluate_control(Listener(moods, 2), datamodule, "train", Control("zero", "audio"), predictions, draws=1)
    assert reads.count("audio-sign") == len(talks)


def test_one_draw_costs_more_than_was_taken(build, moods):
    _, drawn_once = measure(Listener(moods, 4), build(), draws=1)
    _, drawn_often = measure(Listener(moods, 4), build())
    assert drawn_once["control/low"] > 1.5 * drawn_often["control/high"]


def test_audio_that_a_model_has_learned_nothing_from_is_not_used(build, moods):
    _, deaf = measure(Listener(moods, 0), build())
    assert deaf["control/verdict"] == "not used"
    assert deaf["control/delta"] == 0
    # Of noise it has learned a little that holds for no other data.
    plain, controlled = measure(Listener(moods, 0.1), build(control="noise_audio"))
    assert plain["planted/audio/recovered"] == pytest.approx(0, abs=0.02)
    assert controlled["control/verdict"] == "not used"
    assert controlled["control/low"] < 0 < controlled["control/high"]
