from dataclasses import astuple

import numpy as np
import pytest
from scipy.signal import lfilter, resample_poly
from test_pitch import vowel

from msenc.speech.synthesizers.libespeak import to_phonemes
from msenc.speech.voice import VoiceMeasures, count_syllables, guess_syllables, loudness_lufs, measure

RATE = 16_000


def phrase(seconds, f0=140.0, range_st=4.0, seed=0):
    """A voice whose pitch rises and falls by `range_st`, with weak breath between."""
    time = np.arange(round(seconds * RATE)) / RATE
    return vowel(f0 * 2 ** (range_st / 24 * np.sin(2 * np.pi * time)))


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def noise(samples, snr_db):
    rng = np.random.default_rng(1)
    return samples + (0.1 * 10 ** (-snr_db / 20) * rng.normal(size=len(samples))).astype(np.float32)


def test_each_measure_is_what_the_sound_was_made_with():
    samples = np.concatenate([silence(0.3), phrase(1.0), silence(0.5), phrase(1.0), silence(0.3)])
    measured = measure(noise(samples, 30), RATE)
    assert measured.f0_hz == pytest.approx(140, rel=0.02)
    assert measured.f0_range_st == pytest.approx(
        4 * np.sin(np.deg2rad(72)), abs=0.3
    )  # 10th to 90th percentile of a sine
    assert measured.speech_s == pytest.approx(2.0, abs=0.1)
    assert measured.pause_share == pytest.approx(0.5 / 2.5, abs=0.03)
    assert measured.snr_db == pytest.approx(30, abs=1.5)


def test_formants_are_where_the_vocal_tract_puts_them_at_any_pitch():
    wanted = (500.0, 1500.0, 2600.0, 3700.0)
    for f0 in (90, 130, 240):
        samples = np.zeros(RATE)
        samples[:: round(RATE / f0)] = 1  # a pulse per period
        for hertz in (*wanted, 4700.0):
            radius = np.exp(-np.pi * 90 / RATE)
            samples = lfilter([1], [1, -2 * radius * np.cos(2 * np.pi * hertz / RATE), radius**2], samples)
        samples = (0.3 * samples / np.abs(samples).max()).astype(np.float32)
        for rate, sound in ((RATE, samples), (24_000, resample_poly(samples, 3, 2).astype(np.float32))):
            measured = measure(sound, rate)
            assert measured.f3_hz == pytest.approx(wanted[2], rel=0.04)
            assert measured.f4_hz == pytest.approx(wanted[3], rel=0.04)
    assert measure(samples[: RATE // 20], RATE).f3_hz is None


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("f0_hz", phrase(1.2, f0=120), phrase(1.2, f0=180)),
        ("f0_range_st", phrase(1.2, range_st=1), phrase(1.2, range_st=8)),
        ("speech_s", phrase(0.8), phrase(1.2)),
        ("loudness_lufs", 0.1 * phrase(1.2), phrase(1.2)),
        (
            "pause_share",
            np.concatenate([phrase(0.6), silence(0.25), phrase(0.6)]),
            np.concatenate([phrase(0.6), silence(0.9), phrase(0.6)]),
        ),
        (
            "snr_db",
            noise(np.concatenate([silence(0.3), phrase(1), silence(0.3)]), 10),
            noise(np.concatenate([silence(0.3), phrase(1), silence(0.3)]), 40),
        ),
    ],
)
def test_more_of_something_measures_more(name, low, high):
    assert getattr(measure(low, RATE), name) < getattr(measure(high, RATE), name)


def test_a_closure_of_a_stop_is_no_pause_and_a_click_no_speech():
    stopped = np.concatenate([phrase(0.6), silence(0.1), phrase(0.6)])
    assert measure(stopped, RATE).pause_share == 0
    clicked = np.concatenate([phrase(0.8), silence(0.3), phrase(0.02), silence(0.3), phrase(0.8)])
    assert measure(clicked, RATE).pause_share == pytest.approx(0.62 / 2.22, abs=0.03)


def test_loudness_alone_changes_nothing_else():
    samples = noise(np.concatenate([silence(0.3), phrase(1.2), silence(0.3)]), 30)
    loud, quiet = measure(samples, RATE), measure(samples / 8, RATE)
    assert loud.loudness_lufs - quiet.loudness_lufs == pytest.approx(20 * np.log10(8), abs=0.1)
    np.testing.assert_allclose(astuple(loud)[:3], astuple(quiet)[:3], rtol=1e-3)
    assert loud.noise_db - quiet.noise_db == pytest.approx(20 * np.log10(8), abs=0.1)
    assert quiet.snr_db == pytest.approx(loud.snr_db, abs=0.1)


def test_noise_is_that_of_the_recording_however_the_clip_was_cut():
    recording = noise(np.concatenate([silence(1), phrase(1.5), silence(1)]), 30)
    found = [
        measure(recording[round((1 - before) * RATE) : round((2.5 + behind) * RATE)], RATE, recording).snr_db
        for before, behind in ((0, 0), (0.05, 0.02), (0.3, 0.1), (1, 1))
    ]
    assert max(found) - min(found) < 1
    assert found[0] == pytest.approx(30, abs=1.5)


@pytest.mark.parametrize(
    "samples",
    [
        silence(0),
        silence(3),
        phrase(0.1),
        0.1 * np.random.default_rng(0).normal(size=3 * RATE).astype(np.float32),
        np.full(RATE, 0.5, np.float32),
    ],
    ids=["empty", "silence", "too short", "noise", "offset"],
)
def test_without_a_voice_nothing_is_measured(samples):
    assert measure(samples, RATE) == VoiceMeasures()


def test_what_a_short_clip_cannot_tell_is_none():
    measured = measure(phrase(0.42), RATE)
    assert measured.f0_hz is not None
    assert (measured.f0_range_st, measured.speech_s, measured.pause_share, measured.snr_db) == (None,) * 4
    assert measure(phrase(1.5), RATE).snr_db is None  # no moment without speech


def test_loudness_is_that_of_the_standard():
    """BS.1770-4: a 997 Hz sine at 0 dBFS in one channel reads -3.01 LUFS; EBU 3341's gating cases, in one channel."""
    time = np.arange(20 * RATE) / RATE
    sine = np.sin(2 * np.pi * 997 * time)
    assert loudness_lufs(sine, RATE) == pytest.approx(-3.01, abs=0.05)
    at = {db: sine * 10 ** (db / 20) for db in (-20, -36, -72)}
    gated = np.concatenate([at[-36][: 10 * RATE], at[-20], at[-36][: 10 * RATE]])
    assert loudness_lufs(gated, RATE) == pytest.approx(-23.01, abs=0.1)  # the quiet ends are gated out
    gated = np.concatenate([at[-72], at[-20], at[-72]])
    assert loudness_lufs(gated, RATE) == pytest.approx(-23.01, abs=0.1)
    low, high = (loudness_lufs(np.sin(2 * np.pi * f * time), RATE) for f in (40, 4000))
    assert low < -7.0  # the high pass
    assert high == pytest.approx(-3.01 + 3.3, abs=0.3)  # the shelf, relative to 997 Hz
    assert loudness_lufs(sine[: RATE // 3], RATE) is None
    assert loudness_lufs(silence(1), RATE) is None


def test_syllables_by_espeak_and_by_letters():
    words = {"Hello.": 2, "library": 3, "idea": 3, "create": 2, "Do face and voice agree?": 6, "table": 2, "queue": 1}
    assert dict(zip(words, map(count_syllables, to_phonemes(list(words))), strict=True)) == words
    for word in ("Hello.", "library", "Do face and voice agree?", "table", "queue"):
        assert guess_syllables(word) == words[word]
    assert guess_syllables("") == guess_syllables("?!") == count_syllables("") == 0
    assert to_phonemes(["", "One. Two."])[0] == ""
    assert count_syllables(to_phonemes(["One. Two, three; four!"])[0]) == 4  # every clause


def test_phonemes_leave_the_synthesizer_as_it_was():
    from msenc.speech.synthesizers.libespeak import VoiceSettings, speak

    before, _ = speak("Hello.", VoiceSettings("en-us+m1"))
    to_phonemes(["Hello."])
    after, _ = speak("Hello.", VoiceSettings("en-us+m1"))
    np.testing.assert_array_equal(before, after)
