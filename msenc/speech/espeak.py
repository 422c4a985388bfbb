"""eSpeak NG as a synthesizer: no model to fetch, a few milliseconds per sentence, and the voice of a machine."""

import math

import numpy as np

from msenc.speech.libespeak import VoiceSettings, speak
from msenc.speech.synthesis import SentenceSynthesizer, choose
from msenc.types import UNKNOWN, VoiceAttributes

VOICES = {
    "woman": {"f1": 174, "f4": 174, "linda": 224, "steph": 181},
    "man": {"m1": 90, "m2": 98, "m3": 101, "m4": 90},
}
"""Gender -> variant -> its median pitch in Hz at eSpeak's setting 50. Those with breath are left out (`libespeak`)."""

PITCH_HZ = {
    "woman": {"low": 182, "medium": 215, UNKNOWN: 215, "high": 265},
    "man": {"low": 84, "medium": 110, UNKNOWN: 110, "high": 136},
}
PITCH_RANGE = {"flat": 10, "moderate": 50, UNKNOWN: 50, "expressive": 90}
RATE_WPM = {"slow": 125, "moderate": 175, UNKNOWN: 175, "fast": 265}

_STEP = 0.0103  # ln(Hz) per step of eSpeak's pitch


class ESpeak(SentenceSynthesizer):
    """eSpeak NG, embedded by the package espeakng-loader.

    Args:
        language: eSpeak's name of it.
    """

    def __init__(self, language: str = "en-us") -> None:
        self.language = language

    def synthesize(self, phrase: str, voice: VoiceAttributes, speaker: str | None) -> tuple[np.ndarray, int]:
        """See `SentenceSynthesizer`."""
        gender = voice.gender if voice.gender != UNKNOWN else choose(tuple(VOICES), speaker)
        variant, base_hz = choose(tuple(VOICES[gender].items()), speaker)
        pitch = 50 + math.log(PITCH_HZ[gender][voice.pitch] / base_hz) / _STEP
        settings = VoiceSettings(
            voice=f"{self.language}+{variant}",
            pitch=round(min(max(pitch, 0), 99)),
            pitch_range=PITCH_RANGE[voice.range],
            rate_wpm=RATE_WPM[voice.rate],
        )
        return speak(phrase, settings)
