"""eSpeak NG as a synthesizer: no model to fetch, a few milliseconds per sentence, and the voice of a machine."""

import math
from typing import NamedTuple

import numpy as np

from msenc.speech.synthesis import SentenceSynthesizer, choose
from msenc.speech.synthesizers.libespeak import VoiceSettings, load_espeak, speak
from msenc.types import UNKNOWN, VoiceAttributes


class _Variant(NamedTuple):
    """A variant as it is at eSpeak's settings 50 and 50: median pitch, and from its 10th to its 90th percentile."""

    name: str
    pitch_hz: float
    range_st: float


VOICES = {
    "woman": (
        _Variant("f1", 174, 3.7),
        _Variant("f4", 174, 3.7),
        _Variant("Annie", 225, 7.1),
        _Variant("Alicia", 242, 4.0),
    ),
    "man": (_Variant("m1", 90, 4.3), _Variant("m2", 98, 3.1), _Variant("m3", 101, 4.3), _Variant("m4", 90, 5.3)),
}
"""Gender -> variants, without those that have breath (`libespeak`) or little melody."""

PITCH_HZ = {
    "woman": {"low": 182, "medium": 215, UNKNOWN: 215, "high": 265},
    "man": {"low": 84, "medium": 110, UNKNOWN: 110, "high": 136},
}
RANGE_ST = {"flat": 0.8, "moderate": 2.7, UNKNOWN: 2.7, "expressive": 5.0}
RATE_WPM = {"slow": 125, "moderate": 175, UNKNOWN: 175, "fast": 265}

# Measured: ln(Hz) per step of eSpeak's pitch, and the width in Hz by its range, as a multiple of that at 50.
_PITCH_STEP = 0.0103
_WIDTH_AT_0, _WIDTH_STEP = 0.13, 0.0176


class ESpeak(SentenceSynthesizer):
    """eSpeak NG, embedded by the package espeakng-loader.

    Args:
        language: eSpeak's name of it.

    Raises:
        MsencError: the package is missing.
    """

    def __init__(self, language: str = "en-us") -> None:
        load_espeak()
        self.language = language

    def synthesize(self, phrase: str, voice: VoiceAttributes, speaker: str | None) -> tuple[np.ndarray, int]:
        """See `SentenceSynthesizer`."""
        gender = voice.gender if voice.gender != UNKNOWN else choose(tuple(VOICES), speaker)
        variant = choose(VOICES[gender], speaker)
        wanted_hz = PITCH_HZ[gender][voice.pitch]
        width = RANGE_ST[voice.range] * wanted_hz / (variant.range_st * variant.pitch_hz)
        settings = VoiceSettings(
            voice=f"{self.language}+{variant.name}",
            pitch=_setting(50 + math.log(wanted_hz / variant.pitch_hz) / _PITCH_STEP),
            pitch_range=_setting((width - _WIDTH_AT_0) / _WIDTH_STEP),
            rate_wpm=RATE_WPM[voice.rate],
        )
        return speak(phrase, settings)


def _setting(value: float) -> int:
    return round(min(max(value, 0), 99))
