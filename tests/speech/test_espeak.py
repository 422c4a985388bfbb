"""Speech of eSpeak NG: each attribute is heard, and a call is a function of its arguments."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from msenc.speech.attributes import estimate_gender, measured_values
from msenc.speech.description import VOCABULARY, describe, parse
from msenc.speech.synthesis import choose
from msenc.speech.synthesizers.espeak import VOICES, ESpeak
from msenc.speech.voice import measure
from msenc.types import MsencError, VoiceAttributes

TEXT = "The train leaves at seven in the morning, so we get up early."
SYLLABLES = 16


def heard(samples: np.ndarray, sample_rate: int) -> dict[str, float | None]:
    return measured_values(measure(samples, sample_rate), SYLLABLES)


@pytest.mark.parametrize("name", [name for name in VOCABULARY if name != "gender"])
@pytest.mark.parametrize(("gender", "speaker"), [("woman", "Anna"), ("man", "Leo")])
def test_the_words_of_an_attribute_are_heard_in_order(name, gender, speaker):
    speak = ESpeak()
    values = [
        heard(*speak(TEXT, VoiceAttributes(**{"gender": gender, name: w}), speaker))[name] for w in VOCABULARY[name]
    ]
    assert None not in values
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("pitch", VOCABULARY["pitch"])
def test_genders_are_heard_at_any_pitch(pitch):
    for gender, variants in VOICES.items():
        for variant in variants:
            speaker = next(n for n in map(str, range(99)) if choose(VOICES[gender], n) == variant)
            measures = measure(*ESpeak()(TEXT, VoiceAttributes(gender=gender, pitch=pitch), speaker))
            assert estimate_gender([measures]) in (gender, "unknown")
            if pitch != "low":
                assert estimate_gender([measures]) == gender


def test_a_call_is_a_function_of_its_arguments():
    speak, voice = ESpeak(), "a man speaks quickly, with lively melody, in a slightly noisy recording"
    first, sample_rate = speak(TEXT, voice, "Leo")
    speak("Something else.", "a woman speaks at a high pitch", "Anna")
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: speak(TEXT, voice, "Leo")[0], range(8)))
    assert all(np.array_equal(first, samples) for samples in again)
    assert sample_rate == 22_050
    assert first.dtype == np.float32
    assert np.abs(first).max() <= 1
    np.testing.assert_array_equal(first, ESpeak()(TEXT, parse(voice), "Leo")[0])
    assert not np.array_equal(first, speak(TEXT, voice, "Oscar")[0])


def test_a_speaker_without_a_known_gender_has_a_voice_too():
    speak = ESpeak()
    genders = {estimate_gender([measure(*speak(TEXT, "someone speaks fast", str(n)))]) for n in range(8)}
    assert genders == {"woman", "man"}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MsencError, match=r"eSpeak NG.*espeakng_loader.*pip install -e '\.\[demo\]'"):
        ESpeak()("Hello.", "a man speaks")
    monkeypatch.undo()
    with pytest.raises(MsencError, match="no voice 'xx"):
        ESpeak(language="xx")("Hello.", "a man speaks")


def test_all_words_at_once():
    from random import Random

    rng = Random(0)
    for _ in range(10):
        voice = VoiceAttributes(**{name: rng.choice(words) for name, words in VOCABULARY.items()})
        samples, _ = ESpeak()("Hi.", describe(voice, rng), "Anna")
        assert np.isfinite(samples).all()
        assert len(samples) > 3_000
