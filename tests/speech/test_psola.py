"""Another pitch and melody, on a voice whose pitch is known."""

import numpy as np
import pytest

from msenc.speech.synthesizers.libespeak import VoiceSettings, speak
from msenc.speech.synthesizers.psola import change_melody
from msenc.speech.voice import measure

RATE = 16_000


def glide() -> np.ndarray:
    """A buzz with formants whose pitch rises and falls by 4 semitones around 150 Hz, with silence in the middle."""
    time = np.arange(3 * RATE) / RATE
    hertz = 150 * 2 ** (np.sin(2 * np.pi * time) * 4 / 12)
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    buzz = sum(np.sin(k * phase) * np.exp(-(((k * 150 - 600) / 500) ** 2)) for k in range(1, 20))
    buzz[RATE + 2000 : RATE + 6000] = 0
    return (0.2 * buzz).astype(np.float32)


@pytest.mark.parametrize("hertz", [110.0, 150.0, 210.0])
@pytest.mark.parametrize("spread", [0.3, 1.0, 1.5])
def test_median_and_spread_are_what_was_asked(hertz, spread):
    before, after = measure(glide(), RATE), measure(change_melody(glide(), RATE, hertz, spread), RATE)
    assert after.f0_hz == pytest.approx(hertz, rel=0.03)
    assert after.f0_range_st == pytest.approx(spread * before.f0_range_st, abs=0.7)


def test_duration_silence_and_formants_stay():
    sound = glide()
    after = change_melody(sound, RATE, 220.0, 1.0)
    assert after.shape == sound.shape
    assert after.dtype == np.float32
    assert np.abs(after[RATE + 2600 : RATE + 5400]).max() < 0.01

    def middle_hz(samples):
        power = np.abs(np.fft.rfft(samples)) ** 2
        return (power * np.fft.rfftfreq(len(samples), 1 / RATE)).sum() / power.sum()

    assert middle_hz(after) == pytest.approx(middle_hz(sound), rel=0.1)
    assert np.sqrt(np.mean(after**2)) == pytest.approx(np.sqrt(np.mean(sound**2)), rel=0.1)


def test_what_is_not_asked_or_has_no_voice_comes_back():
    sound = glide()
    assert change_melody(sound, RATE, None, 1.0) is sound
    noise = np.random.default_rng(0).normal(0, 0.05, RATE).astype(np.float32)
    for samples in (noise, np.zeros(RATE, np.float32), np.zeros(10, np.float32)):
        np.testing.assert_array_equal(change_melody(samples, RATE, 200.0, 0.5), samples)


def test_real_speech_keeps_its_words_in_place():
    samples, sample_rate = speak("The train leaves at seven in the morning.", VoiceSettings("en-us+m1"))
    after = change_melody(samples, sample_rate, 140.0, 0.5)
    before, now = measure(samples, sample_rate), measure(after, sample_rate)
    assert now.f0_hz == pytest.approx(140, rel=0.03)
    assert now.f0_range_st < 0.7 * before.f0_range_st
    assert now.speech_s == pytest.approx(before.speech_s, abs=0.1)
