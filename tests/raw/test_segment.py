import numpy as np
import pytest

from msenc.raw.segment import SAMPLE_RATE, SegmentSettings, cut_utterances, quietest_moment
from msenc.types import MsencError


def _cut(speech, cuts=(), quietest=lambda a, b: (a + b) / 2, **settings):
    speech = [s if len(s) == 3 else (*s, "0") for s in speech]
    return [u[:2] for u in cut_utterances(speech, cuts, SegmentSettings(**settings), quietest)]


def test_a_long_pause_ends_an_utterance_and_a_short_one_does_not():
    assert _cut([(0, 1), (1.4, 2), (2.5, 3)]) == [(0, 2), (2.5, 3)]


def test_a_cut_of_the_picture_ends_an_utterance_only_in_a_pause():
    assert _cut([(0, 2), (2.3, 4)], cuts=[1.0]) == [(0, 4)]
    assert _cut([(0, 2), (2.3, 4)], cuts=[2.35]) == [(0, 2), (2.3, 4)]


def test_every_utterance_has_one_speaker():
    speech = [(0, 1, "0"), (1.2, 3, "0"), (3, 5, "1"), (5.1, 6, "0")]
    assert cut_utterances(speech, [], SegmentSettings(), max) == [(0, 3, "0"), (3, 5, "1"), (5.1, 6, "0")]


def test_a_long_utterance_is_parted_at_its_longest_pauses():
    speech = [(0, 4), (4.1, 8), (8.4, 11), (11.2, 14)]
    assert _cut(speech, max_utterance_s=10) == [(0, 8), (8.4, 14)]


def test_long_speech_without_a_pause_is_parted_where_it_is_quiet():
    sound = np.ones(30 * SAMPLE_RATE, np.float32)
    sound[round(15.6 * SAMPLE_RATE) : round(15.7 * SAMPLE_RATE)] = 0
    parts = _cut([(0, 30)], max_utterance_s=20, quietest=quietest_moment(sound))
    assert [round(t, 1) for part in parts for t in part] == [0, 15.6, 15.6, 30]


def test_longer_than_the_recogniser_hears_is_refused():
    with pytest.raises(MsencError, match=r"expected 0\.5 to 30 s"):
        SegmentSettings(max_utterance_s=40)
