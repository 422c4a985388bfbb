"""Speech of Hibari: refusals, and with the package all attributes on one sentence."""

import sys

import numpy as np
import pytest

from msenc.speech.synthesizers.hibari import Hibari
from msenc.speech.voice import measure
from msenc.types import MsencError, VoiceAttributes

TEXT = "We get up early, at seven, because the train does not wait."
OWN = {"woman": ["heart"], "man": ["heart"]}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hibari", None)
    with pytest.raises(MsencError, match=r"Hibari.*hibari.*pip install -e '\.\[hibari\]'"):
        Hibari(OWN)


@pytest.fixture(scope="module")
def speak():
    pytest.importorskip("hibari", reason="needs the extra hibari")
    return Hibari(OWN)


def test_voices_that_are_none_or_cannot_be_had_are_refused(speak, tmp_path, monkeypatch):
    with pytest.raises(MsencError, match=r"speech\.voices\.man: found 'bob', expected some of heart, "):
        Hibari({"woman": ["heart"], "man": ["bob"]})
    with pytest.raises(MsencError, match=r"speech\.voices\.man: found no voice"):
        Hibari({"woman": ["heart"]})
    monkeypatch.setenv("HIBARI_HOME", str(tmp_path))
    monkeypatch.setattr("hibari.voices.BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(MsencError, match=r"speech\.voices\.man: fenrir cannot be had\. .*could not download"):
        Hibari({"woman": ["heart"], "man": ["fenrir"]})


def test_a_call_is_a_function_of_its_arguments(speak):
    voice = VoiceAttributes("man", rate="fast")
    np.testing.assert_array_equal(speak(TEXT, voice, "Leo")[0], speak(TEXT, voice, "Leo")[0])
    assert {speak.models[name].sample_rate for name in speak.models} == {24_000}


def test_a_man_s_voice_has_a_man_s_pitch_and_formants(speak):
    for name in ("Ana", "Ben", "Clara"):
        woman, man = (measure(*speak(TEXT, VoiceAttributes(gender), name)) for gender in ("woman", "man"))
        assert man.f0_hz < 130 < 160 < woman.f0_hz
        assert man.f3_hz < woman.f3_hz
        assert man.f4_hz < 3900 < woman.f4_hz


@pytest.mark.parametrize("gender", ["woman", "man"])
def test_attributes_are_heard(speak, gender):
    def heard(**words):
        samples, sample_rate = speak(TEXT, VoiceAttributes(gender, **words), "Ana")
        return measure(samples, sample_rate), len(samples)

    pitches = [heard(pitch=word)[0].f0_hz for word in ("low", "medium", "high")]
    assert pitches == sorted(pitches)
    assert heard(range="flat")[0].f0_range_st < heard(range="expressive")[0].f0_range_st / 2
    assert heard(rate="slow")[1] > 1.3 * heard(rate="fast")[1]
    assert heard(loudness="quiet")[0].loudness_lufs < heard(loudness="loud")[0].loudness_lufs - 10


def test_what_has_no_words_of_english_is_refused(speak):
    with pytest.raises(MsencError, match=r"Hibari found nothing to say in"):
        speak.synthesize("\u4f60\u597d", VoiceAttributes(), None)
