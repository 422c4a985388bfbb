"""Pauses, loudness and noise of a sound whose parts are known."""

import numpy as np
import pytest

from msenc.speech.acting import HEAD_S, TAIL_S, act, add_noise, set_loudness, set_pauses, trim
from msenc.speech.voice import loudness_lufs, measure
from msenc.types import VoiceAttributes

RATE = 16_000


def buzz(seconds: float, hertz: float = 150.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.05 * sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 9))).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def runs_of_silence(samples: np.ndarray) -> list[float]:
    """Lengths in seconds, of those above 20 ms, at any place."""
    quiet = np.concatenate([[False], np.abs(samples) < 1e-4, [False]])
    starts, ends = (np.flatnonzero(np.diff(quiet.astype(int)) == sign) for sign in (1, -1))
    return [round(float(s), 2) for s in (ends - starts) / RATE if s > 0.02]


SOUND = np.concatenate(
    [silence(0.4), buzz(0.6), silence(0.2), buzz(0.5), silence(0.06), buzz(0.5), silence(0.9), buzz(0.3), silence(0.1)]
)


def test_silence_at_the_ends_goes_and_the_rest_stays():
    assert len(trim(SOUND, RATE)) == pytest.approx(len(SOUND) - 0.5 * RATE, abs=2 * RATE / 100)
    assert len(trim(silence(1), RATE)) == RATE
    assert len(trim(silence(0), RATE)) == 0


@pytest.mark.parametrize("pause_s", [0.12, 0.5])
def test_pauses_get_their_length_and_closures_keep_theirs(pause_s):
    sound = trim(SOUND, RATE)
    after = set_pauses(sound, RATE, pause_s)
    assert runs_of_silence(after) == pytest.approx([pause_s, 0.06, pause_s], abs=0.021)
    assert len(after) == pytest.approx(len(sound) + (2 * pause_s - 1.1) * RATE, abs=0.05 * RATE)
    np.testing.assert_array_equal(set_pauses(buzz(1), RATE, pause_s), buzz(1))


@pytest.mark.parametrize("lufs", [-33.0, -23.0, -15.0])
def test_loudness_is_what_was_asked(lufs):
    for gain in (0.01, 1.0, 15.0):
        after = set_loudness(gain * SOUND, RATE, lufs)
        assert loudness_lufs(after, RATE) == pytest.approx(lufs, abs=0.1)
        assert after.dtype == np.float32
    loud = set_loudness(SOUND * 9, RATE, 0.0)
    assert np.abs(loud).max() < 1
    short = set_loudness(buzz(0.2), RATE, lufs)
    assert 10 < np.abs(short).max() / np.abs(buzz(0.2)).max() * 10 ** (-lufs / 20) < 1000
    assert not set_loudness(silence(1), RATE, lufs).any()


@pytest.mark.parametrize("snr_db", [8.0, 22.0])
def test_noise_has_the_power_that_was_asked(snr_db):
    noise = add_noise(SOUND, RATE, snr_db) - SOUND
    speech = np.concatenate([buzz(0.6), buzz(0.5), buzz(0.5), buzz(0.3)])
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.5)
    power = np.abs(np.fft.rfft(noise)) ** 2
    hertz = np.fft.rfftfreq(len(noise), 1 / RATE)
    low, high = (power[(hertz > f) & (hertz < 2 * f)].mean() for f in (500, 4000))
    assert 10 * np.log10(low / high) == pytest.approx(9, abs=1)  # 3 dB per octave
    np.testing.assert_array_equal(noise, add_noise(SOUND, RATE, snr_db) - SOUND)


def test_a_voice_is_heard_in_all_of_them():
    quiet = measure(act([SOUND], RATE, VoiceAttributes(loudness="quiet", pauses="few", noise="clean")), RATE)
    loud = measure(act([SOUND], RATE, VoiceAttributes(loudness="loud", pauses="many", noise="noisy")), RATE)
    assert quiet.loudness_lufs < -30 < -20 < loud.loudness_lufs
    assert quiet.pause_share == 0 < loud.pause_share
    assert loud.snr_db == pytest.approx(8, abs=2)
    sound = act([SOUND], RATE, VoiceAttributes())
    ends = runs_of_silence(sound)
    assert (ends[0], ends[-1]) == pytest.approx((HEAD_S, TAIL_S["some"]), abs=0.02)
    assert HEAD_S + TAIL_S["few"] < 0.2 < HEAD_S + TAIL_S["some"]  # what counts as a pause between two sentences
