import numpy as np
import pytest

from msenc.speech.pitch import HOP_S, track_pitch
from msenc.speech.voice import track_voice

RATE = 16_000


def vowel(f0, rate=RATE):
    """A periodic sound with the harmonics and two formants of a vowel; f0 (S,) in Hz."""
    phase = 2 * np.pi * np.cumsum(f0) / rate
    samples = np.zeros(len(f0))
    for k in range(1, 60):
        frequency = k * f0
        gain = sum(1 / (1 + ((frequency - formant) / 120) ** 2) for formant in (600, 1500)) + 0.02
        samples += np.where(frequency < 0.45 * rate, gain * np.sin(k * phase) / np.sqrt(k), 0)
    return (0.1 * samples / np.sqrt(np.mean(samples**2))).astype(np.float32)


def semitones_off(track, f0):
    """Deviation of voiced frames from the truth at the middle of their windows; f0 (S,)."""
    centre = (len(f0) - (len(track) - 1) * round(HOP_S * RATE)) // 2
    truth = f0[centre + round(HOP_S * RATE) * np.arange(len(track))]
    return np.abs(12 * np.log2(track[track > 0] / truth[track > 0]))


@pytest.mark.parametrize("base", [70, 110, 170, 260, 400])
def test_a_moving_pitch_is_followed(base):
    time = np.arange(RATE) / RATE
    f0 = base * 2 ** (2 / 12 * np.sin(2 * np.pi * 1.5 * time))
    track = track_voice(vowel(f0), RATE)
    assert np.mean(track > 0) > 0.99
    off = semitones_off(track, f0)
    assert np.median(off) < 0.2
    assert np.mean(off > 1) < 0.02


def test_noise_at_ten_decibels_is_borne_and_alone_has_no_pitch():
    rng = np.random.default_rng(0)
    voice = vowel(np.full(RATE, 140.0))
    noise = rng.normal(size=RATE).astype(np.float32)
    track = track_pitch(voice + 0.1 * 10**-0.5 * noise, RATE)
    assert np.mean(track > 0) > 0.95
    assert abs(np.median(track[track > 0]) - 140) < 1
    assert np.mean(track_pitch(0.1 * noise, RATE) > 0) < 0.05


def test_silence_has_no_pitch_and_ends_the_voice():
    voice = vowel(np.full(RATE // 2, 140.0))
    samples = np.concatenate([voice, np.zeros(RATE // 2, np.float32)])
    track = track_pitch(samples, RATE)
    half = len(track) // 2
    assert np.all(track[: half - 5] > 0)
    assert not track[half + 5 :].any()
    assert not track_pitch(np.zeros(RATE, np.float32), RATE).any()


def test_loudness_offset_and_sampling_rate_do_not_matter():
    f0 = np.full(RATE, 200.0)
    track = track_pitch(vowel(f0), RATE)
    np.testing.assert_allclose(track_pitch(0.01 * vowel(f0) + 0.3, RATE), track, rtol=1e-3)
    double = track_pitch(vowel(np.full(2 * RATE, 200.0), 2 * RATE), 2 * RATE)
    assert abs(np.median(double) - 200) < 0.5


def test_a_sound_shorter_than_a_window_has_no_frame():
    assert track_pitch(np.zeros(0, np.float32), RATE).shape == (0,)
    assert track_pitch(np.ones(500, np.float32), RATE).shape == (0,)
