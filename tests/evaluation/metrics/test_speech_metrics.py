"""Error rates of understood words, and shares of heard voices."""

import math

import pytest

from msenc.evaluation.metrics.speech import heard_voice, score_voices, score_words
from msenc.speech.attributes import Bin
from msenc.speech.voice import VoiceMeasures
from msenc.types import VoiceAttributes


def test_rates_are_errors_over_all_words():
    pytest.importorskip("jiwer")
    texts = ["I'm here, in the garden.", "We will go at seven.", "Yes!", "..."]
    understood = ["I am here in a garden", "we'll go at 7", "", ""]
    scores = score_words(understood, texts)
    assert scores.corpus["speech/wer"] == pytest.approx(2 / 12)  # 6 + 5 + 1 words; "the", and all of "Yes"
    assert scores.items["speech/wer"][:3] == pytest.approx([1 / 6, 0, 1])
    assert math.isnan(scores.items["speech/wer"][3])
    assert 0 < scores.corpus["speech/cer"] < scores.corpus["speech/wer"]
    assert score_words(["a b c d"], ["x"]).corpus["speech/wer"] > 1
    assert score_words([""], ["..."]) == ({}, {})


def test_only_what_is_asked_counts_and_silence_is_wrong():
    low, high, silent = VoiceAttributes(pitch="low", rate="fast"), VoiceAttributes(pitch="high"), VoiceAttributes()
    asked = [VoiceAttributes(pitch="low"), VoiceAttributes(pitch="low"), VoiceAttributes(pitch="high")]
    assert score_voices([low, high, silent], asked, "as_written") == {"speech/pitch/as_written": pytest.approx(1 / 3)}
    assert score_voices([low], [silent], "as_written") == {}


def test_a_voice_gets_the_words_of_the_data():
    rate = Bin((4.0,), ("slow", "fast"), "given", 0, None)
    other = Bin(None, ("a", "b"), "does not vary", 0, None)
    bins = dict.fromkeys(("pitch/woman", "pitch/man", "range", "loudness", "pauses", "noise"), other) | {"rate": rate}
    heard = heard_voice(VoiceMeasures(f0_hz=210.0, speech_s=2.0, f3_hz=3000.0, f4_hz=4100.0), 10, bins)
    assert heard == VoiceAttributes(gender="woman", rate="fast")
    assert heard_voice(VoiceMeasures(), 10, bins) == VoiceAttributes()
