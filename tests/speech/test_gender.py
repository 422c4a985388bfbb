import numpy as np
import pytest

from msenc.speech.attributes import HIGHEST_MAN_HZ, LOWEST_WOMAN_HZ, estimate_gender
from msenc.speech.voice import VoiceMeasures

MAN, EITHER, WOMAN = (2500.0, 3550.0), (2850.0, 3900.0), (3300.0, 4500.0)


def _estimate(f0_hz, formants, **more):
    return estimate_gender([VoiceMeasures(f0_hz=f0_hz, f3_hz=formants[0], f4_hz=formants[1], **more)])


@pytest.mark.parametrize("formants", [MAN, EITHER, WOMAN, (1500.0, 2500.0), (4200.0, 5300.0)])
def test_no_formant_makes_a_woman_of_a_low_voice_or_a_man_of_a_high_one(formants):
    for f0_hz in np.arange(60, LOWEST_WOMAN_HZ, 5):
        assert _estimate(f0_hz, formants) != "woman"
    for f0_hz in np.arange(HIGHEST_MAN_HZ + 1, 490, 10):
        assert _estimate(f0_hz, formants) != "man"


def test_voices_whose_pitch_and_formants_agree_are_known():
    assert {_estimate(f0_hz, MAN) for f0_hz in (85, 100, 120, 140)} == {"man"}
    assert {_estimate(f0_hz, WOMAN) for f0_hz in (170, 200, 240, 300)} == {"woman"}


def test_a_man_at_100_hz_before_a_distant_microphone_is_none_the_less_a_man():
    assert _estimate(100.0, (3312.0, 4529.0)) == "man"  # as measured in a meeting


def test_a_harmonic_that_is_taken_for_the_pitch_makes_no_woman():
    assert _estimate(380.0, (2500.0, 3450.0)) == "unknown"  # as measured of a man's voice in the band of a telephone


def test_doubt_is_unknown():
    assert _estimate(155.0, EITHER) == "unknown"
    assert _estimate(120.5, WOMAN) == "unknown"
    assert estimate_gender([VoiceMeasures(f0_hz=90.0)]) == estimate_gender([]) == "unknown"


def test_several_clips_of_a_speaker_outvote_an_error():
    good, wrong = VoiceMeasures(f0_hz=105.0, f3_hz=2600.0, f4_hz=3600.0), VoiceMeasures(210.0, f3_hz=3300.0, f4_hz=4400)
    assert estimate_gender([good, wrong, good]) == "man"
