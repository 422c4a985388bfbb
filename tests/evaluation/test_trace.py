"""Runs that are broken on purpose, each at another station: the trace of a model that has learned to listen."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import build_conversation
from torch import nn

from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import StreamSpec
from msenc.evaluation.trace import _bits_of, trace_split
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_tokenizer
from msenc.prompt import DialogueTokenizer, Prompt
from msenc.store.labels import write_labels
from msenc.store.manifest import DatasetManifest, StreamInfo
from msenc.store.shards import write_stream
from msenc.types import Dialogue, Mark, MsencError, Utterance

PROMPT = Prompt(instruction="A talk.\n", turn="{speaker}:{audio} {text}\n", response="{speaker}:")
NAMES = ("Anna", "Ben", "Clara", "Carl", "Elena", "David", "Grace", "Felix")
WORDS = ("calm", "excited")
SIZES = {"train": 192, "test": 320}
STEPS = 200


@pytest.fixture(scope="module")
def build(demo_home, tmp_path_factory):
    """Questions whose answer is the mood that the audio's first dimension shows; the weather shows nowhere."""
    folder = tmp_path_factory.mktemp("traced") / "moods"
    random = np.random.default_rng(0)
    dialogues, features, labels = [], [], {}
    for split, size in SIZES.items():
        for number in range(size):
            mood, id = int(random.integers(2)), f"moods/{split}/dia{number}"
            reply, marks = f"You sound {WORDS[mood]}.", (Mark("audio", "text", 10, 10 + len(WORDS[mood])),)
            speakers = (NAMES[number % len(NAMES)], "Hugo")
            turns = Utterance("0", speakers[0], "How do I sound?"), Utterance("1", speakers[1], reply, marks=marks)
            dialogues.append(Dialogue(id, split, turns))
            frames = random.normal(size=(4, 5)) * 0.3
            frames[:2, 0] += (-1, 1)[mood]
            features.append(frames.astype(np.float16))
            labels[f"{id}/utt0"] = {"Mood": WORDS[mood], "Weather": ("sun", "rain")[int(random.integers(2))]}
    turns = write_stream(folder / "turns", [(d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues], {})
    samples = [
        (d.id, d.split, {"features.npy": f, "offsets.npy": np.array([0, 2, 4])})
        for d, f in zip(dialogues, features, strict=True)
    ]
    audio = write_stream(folder / "audio-sign", samples, {})
    info = StreamInfo("audio", "sign", 5, {}, audio["hash"], {split: 2 * size for split, size in SIZES.items()})
    DatasetManifest("moods", {}, {"audio-sign": info}, turns_hash=turns["hash"]).write(folder)
    write_labels(folder, labels)
    tokenizer = DialogueTokenizer(PROMPT, load_tokenizer(str(demo_home / "data" / "tiny-llm")))

    def call(**options):
        options = {"layout": "sample", "batch_size": 32, **options}
        datamodule = DialogueDataModule(folder, {"audio": StreamSpec("sign", 5, 2)}, tokenizer, **options)
        datamodule.setup()
        return datamodule

    return call


@pytest.fixture(scope="module")
def trained(build, tiny_models):
    """A tiny LLM that has learned to say what it hears."""
    model = build_conversation(tiny_models["llama"], ("audio",), lora=None, connector="mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = list(build().eval_dataloader("train"))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batches[step % len(batches)]).nll.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval().state_dict()


class Collapsed(nn.Module):
    """A connector that gives the same for all."""

    def __init__(self, connector):
        super().__init__()
        self.connector = connector

    def forward(self, features, mask):
        return self.connector(features, mask)[:1].mean(1, keepdim=True).expand(len(features), 2, -1) * 0 + 0.5


class Masked(ConversationModel):
    """No token attends to a media slot."""

    def forward(self, batch):
        mask = batch.attention_mask.clone()
        mask.view(-1)[batch.streams["audio"].places] = False
        return super().forward(dataclasses.replace(batch, attention_mask=mask))


class Mixed(ConversationModel):
    """The connector's outputs get into other utterances' slots."""

    def embed(self, batch):
        return super().embed(self._mixed(batch))

    def forward(self, batch):
        return super().forward(self._mixed(batch))

    def _mixed(self, batch):
        stream = batch.streams["audio"]
        sources = stream.sources.view(-1, 2)
        order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(len(sources)))
        mixed = dataclasses.replace(stream, sources=sources[order].flatten())
        return dataclasses.replace(batch, streams={"audio": mixed})


@pytest.fixture
def load(trained, tiny_models):
    def call(kind=ConversationModel):
        model = build_conversation(tiny_models["llama"], ("audio",), lora=None, connector="mlp")
        model.load_state_dict(trained)
        model.__class__ = kind
        return model.eval()

    return call


def test_bits_of_a_reply_are_what_it_says_of_the_value_before_it():
    own = np.array([0, 0, 0, 1, -1])
    drawn = np.array([[0, 0, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, -1, 0, 0]])
    log_p = np.array([[0, -3, -30, 0, 0], [-30, -3, 0, -1, 0], [-30, -3, -9, -1, 0]], dtype=float)
    share = 3 / 4  # of the value 0
    wanted = [
        -np.log2(share),  # never so after the other value
        0,  # as likely after both
        np.log2(share),  # cut off; and the third draw has no label
        -np.log2(share * np.exp(-1) + 1 - share),
    ]
    bits = _bits_of(log_p, drawn, own)
    np.testing.assert_allclose(bits[:4], wanted, atol=1e-6)
    assert np.isnan(bits[4])


def trace(model, datamodule):
    (found,) = trace_split(model, datamodule, "test").values()
    return found["labels"]


def bits(label, station):
    return next(one for one in label["stations"] if one["station"] == station)["mean"]


@pytest.mark.parametrize("layout", ["sample", "dialogue"])
def test_in_an_intact_model_nothing_is_lost_that_the_audio_has(load, build, layout):
    labels = trace(load(), build(layout=layout))
    assert labels.keys() == {"Mood", "Weather", "planted in text"}
    for name in ("Mood", "planted in text"):
        assert labels[name]["lost_at"] == "nowhere"
        assert 0.8 < labels[name]["used"]["low"] <= labels[name]["used"]["high"] <= labels[name]["entropy"] + 0.05
        assert bits(labels[name], "encoder") > 0.9
    assert labels["Weather"]["lost_at"] == "encoder"
    assert "the encoder never had it" in labels["Weather"]["verdict"]
    assert labels["Weather"]["used"]["high"] < 0.1
    assert labels["Mood"]["unseen"] == "speakers"


def test_noise_in_place_of_the_encoder_is_named(load, build):
    labels = trace(load(), build(control="noise_audio"))
    assert labels["Mood"]["lost_at"] == "encoder"


def test_a_collapsed_connector_is_named(load, build):
    model = load()
    model.connectors["audio"] = Collapsed(model.connectors["audio"])
    mood = trace(model, build())["Mood"]
    assert mood["lost_at"] == "connector"
    assert mood["used"]["mean"] == 0
    assert "the connector lost it" in mood["verdict"]


@pytest.mark.parametrize("kind", [Masked, Mixed])
def test_an_llm_that_does_not_listen_is_named(load, build, kind):
    mood = trace(load(kind), build())["Mood"]
    assert mood["lost_at"] == "llm"
    assert bits(mood, "connector") > 0.9
    assert ("none of it is in the LLM's input" in mood["verdict"]) == (kind is Mixed)
    assert (bits(mood, "slots 0") > 0.9) == (kind is Masked)


def test_a_run_without_a_stream_is_refused(load, build):
    datamodule = build()
    datamodule.streams = {}
    with pytest.raises(MsencError, match="this run reads text alone"):
        trace_split(load(), datamodule, "test")
