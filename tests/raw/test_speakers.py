from itertools import pairwise

import numpy as np
import pytest

from msenc.raw.segment import SAMPLE_RATE
from msenc.raw.speakers import find_speakers
from msenc.types import UNKNOWN_SPEAKER


def _voice(hertz, seconds, level=0.1):
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def _sound(*parts):
    return np.concatenate(parts).astype(np.float32)


def encode(sound):
    """Where a sound's energy lies, whatever its level: of two at once, something between."""
    power = np.abs(np.fft.rfft(sound, SAMPLE_RATE))[:2000].reshape(40, 50).sum(axis=1)
    return (power / np.linalg.norm(power)).astype(np.float32)


def test_a_change_inside_speech_is_found_and_speakers_are_numbered_as_they_appear():
    sound = _sound(_voice(225, 3), _voice(725, 4), _voice(225, 3))
    stretches = find_speakers(sound, [(0.0, 10.0)], encode)
    assert [speaker for *_, speaker in stretches] == ["0", "1", "0"]
    assert [end_s for _, end_s, _ in stretches] == pytest.approx([3, 7, 10], abs=0.4)  # less than half a window
    assert stretches[0][0] == 0
    assert all(before[1] == behind[0] for before, behind in pairwise(stretches))


def test_speakers_are_known_again_across_pauses_and_nothing_but_speech_is_given_away():
    sound = _sound(_voice(225, 2), np.zeros(2 * SAMPLE_RATE), _voice(725, 2), np.zeros(SAMPLE_RATE), _voice(225, 2))
    speech = [(0.0, 2.0), (4.0, 6.0), (7.0, 9.0)]
    assert find_speakers(sound, speech, encode) == [(*s, n) for s, n in zip(speech, "010", strict=True)]


@pytest.mark.parametrize("seconds", [0.1, 0.6, 3.0, 20.0])
def test_one_voice_is_one_speaker_however_short(seconds):
    sound = _sound(_voice(225, seconds / 2, level=0.2), _voice(225, seconds / 2, level=0.02))
    assert {speaker for *_, speaker in find_speakers(sound, [(0.0, seconds)], encode)} == {"0"}


def test_a_voice_that_is_heard_too_little_is_nobodys():
    sound = _sound(_voice(225, 4), np.zeros(SAMPLE_RATE), _voice(1725, 0.8), np.zeros(SAMPLE_RATE), _voice(725, 4))
    speech = [(0.0, 4.0), (5.0, 5.8), (6.8, 10.8)]
    assert [speaker for *_, speaker in find_speakers(sound, speech, encode)] == ["0", UNKNOWN_SPEAKER, "1"]


def test_without_speech_there_are_no_speakers():
    assert find_speakers(np.zeros(SAMPLE_RATE, np.float32), [], encode) == []


def test_a_long_sound_is_clustered_by_some_windows_and_all_of_it_has_speakers(monkeypatch):
    sound = _sound(*(_voice((225, 725)[k % 2], 3) for k in range(8)))
    speech = [(float(k * 3), float(k * 3 + 3)) for k in range(8)]
    monkeypatch.setattr("msenc.raw.speakers._MOST_CLUSTERED", 24)
    stretches = find_speakers(sound, speech, encode)
    assert [speaker for *_, speaker in stretches] == ["0", "1"] * 4
