"""Attributes of neural speech, by the benchmark's own renderer: one woman and one man, one sentence."""

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def voice_attributes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield pytest.importorskip("voice_attributes")
    for name in ("voice_attributes", "measure"):
        sys.modules.pop(name, None)


def test_order_counts_the_pairs_that_rise(voice_attributes):
    order = voice_attributes.order_kept
    assert order([[1.0], [2.0], [3.0]]) == 1
    assert order([[1.0], [3.0], [2.0]]) == pytest.approx(2 / 3)
    assert order([[1.0, None], [2.0, 2.0]]) == 0.5


def test_speaker_tables_tell_a_leak(voice_attributes):
    """A word that follows the speaker is foretold by the name alone; one that does not is not."""
    from msenc.demo.world import draw_dialogues

    dialogues = [d.dialogue for split in ("train", "test") for d in draw_dialogues(split, 60, seed=1)]
    truth, turns = {}, {}
    for dialogue in dialogues:
        for number, u in enumerate(dialogue.utterances):
            id = f"{dialogue.id}/utt{u.id}"
            truth[id] = {"pitch": ("low", "high")[len(u.text) % 2]}
            turns[id] = {"measured": {"pitch": ("low", "high")[number % 2], "noise": "unknown"}}
    table = voice_attributes.predictability(dialogues, turns, truth)
    assert set(table) == {"pitch", "pitch, truth"}
    assert table["pitch"]["speaker's number"] == 1
    assert table["pitch"]["speaker's name"] < 0.8
    assert table["pitch, truth"]["speaker's number"] < 0.7


@pytest.mark.real
def test_kokoro_speech_is_measured_in_the_order_it_was_set(voice_attributes):
    folder = Path(os.environ.get("MSENC_MODELS", "")) / "kokoro-82m"
    if not os.environ.get("MSENC_MODELS") or not folder.is_dir():
        pytest.skip("MSENC_MODELS names no folder with kokoro-82m")
    pytest.importorskip("onnxruntime")
    shares = voice_attributes.kokoro_orders(
        folder, voice_attributes.WOMEN[:1], voice_attributes.MEN[:1], voice_attributes.SENTENCES[:1]
    )
    wrong = shares.pop("gender: wrong, by voice")
    assert wrong == 0
    assert set(shares.values()) == {1.0}, shares
