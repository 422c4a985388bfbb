"""Speech of Kokoro: refusals without a model, and with the local one all attributes on one sentence."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from msenc.speech.synthesizers.kokoro import PROSODY, VOICES, Kokoro
from msenc.speech.voice import measure
from msenc.types import MsencError, VoiceAttributes

FOLDER = Path(os.environ.get("MSENC_MODELS", "")) / "kokoro-82m"
TEXT = "We get up early, at seven."


def test_a_folder_without_a_model_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(MsencError, match=r"no model\.onnx and no voices\. .*speech\.folder="):
        Kokoro(tmp_path)
    (tmp_path / "voices").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(MsencError, match="Kokoro cannot be loaded"):
        Kokoro(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MsencError, match=r"Kokoro.*onnxruntime.*pip install -e '\.\[kokoro\]'"):
        Kokoro(tmp_path)


@pytest.fixture(scope="module")
def kokoro():
    if not FOLDER.is_dir():
        pytest.skip("MSENC_MODELS names no folder with kokoro-82m")
    pytest.importorskip("onnxruntime")
    return Kokoro(FOLDER)


@pytest.mark.real
def test_voices_are_there(kokoro):
    for name in (*VOICES["woman"], *VOICES["man"], *PROSODY["woman"].values(), *PROSODY["man"].values()):
        assert kokoro._style(name).shape == (510, 256)
    with pytest.raises(MsencError, match="cannot be read as a voice"):
        kokoro._style("nobody")


@pytest.mark.real
def test_punctuation_reaches_the_model(kokoro):
    tokens = kokoro._tokens('Well, "yes"... No?')
    marks = {kokoro.vocabulary[mark] for mark in ',".?'}
    assert marks <= set(tokens)
    assert kokoro._tokens("?") == [kokoro.vocabulary["?"]]


@pytest.mark.real
def test_a_call_is_a_function_of_its_arguments(kokoro):
    voice = VoiceAttributes(gender="woman", rate="fast")
    first, sample_rate = kokoro("Yes.", voice, "Ana")
    kokoro("Something else.", voice, "Ben")
    np.testing.assert_array_equal(first, kokoro("Yes.", voice, "Ana")[0])
    assert sample_rate == 24_000


@pytest.mark.real
def test_the_words_of_attributes_are_heard(kokoro):
    """All low or all high at once; the benchmark takes them one by one."""
    low = VoiceAttributes("woman", "low", "flat", "slow", "quiet", "few", "noisy")
    high = VoiceAttributes("woman", "high", "expressive", "fast", "loud", "many", "clean")
    low, high = (measure(*kokoro(TEXT, voice, "Ana")) for voice in (low, high))
    assert low.f0_hz < high.f0_hz
    assert low.f0_range_st < high.f0_range_st
    assert low.speech_s > high.speech_s
    assert low.loudness_lufs < high.loudness_lufs
    assert low.pause_share < high.pause_share
    assert low.snr_db < high.snr_db
    man = measure(*kokoro(TEXT, VoiceAttributes("man"), "Ana"))
    assert man.f0_hz < 150 < measure(*kokoro(TEXT, VoiceAttributes("woman"), "Ana")).f0_hz
