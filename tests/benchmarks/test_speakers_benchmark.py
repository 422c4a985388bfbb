import numpy as np
import pytest
import real
import speakers

from msenc.raw.segment import SAMPLE_RATE


def test_the_error_rate_is_that_of_cases_counted_by_hand():
    pytest.importorskip("pyannote.metrics")
    true = [(0.0, 6.0, "Ana"), (6.0, 10.0, "Ben"), (9.0, 10.0, "Ana")]  # 11 s of speech in 10 s
    perfect = speakers.score([(0.0, 6.0, "0"), (6.0, 10.0, "1")], true, 12)
    assert perfect["error rate"] == pytest.approx(1 / 11)  # nobody names the second of two
    assert perfect["right"] == pytest.approx(1)
    one = speakers.beside_one_speaker([(0.0, 6.0, "1"), (6.0, 10.0, "0")], true, 12)
    assert one["error rate"] == perfect["error rate"]  # names do not matter
    assert one["error rate, one speaker"] == pytest.approx(4 / 11)  # 3 s confused, 1 s missed
    assert one["right, one speaker"] == pytest.approx(7 / 10)
    late = speakers.score([(0.0, 6.0, "0"), (6.0, 12.0, "1")], true, 12)
    assert late["error rate"] == pytest.approx(3 / 11)  # 2 s of false alarm


def test_a_meeting_is_as_long_as_it_says_and_holds_its_speakers():
    clips = {name: [np.ones(SAMPLE_RATE, np.float32)] for name in "abc"}
    sound, truth = speakers.make_meeting(clips, 3, seed=1)
    assert len(sound) == speakers.MEETING_S * SAMPLE_RATE
    assert {speaker for *_, speaker in truth} == set("abc")
    assert max(end_s for _, end_s, _ in truth) <= speakers.MEETING_S


def test_a_name_of_grid_spells_its_sentence():
    assert real.grid_sentence("bbaf2n") == "bin blue at f two now"
    assert real.grid_sentence("lgwzzs") == "lay green with z zero soon"
