"""Hibari as a synthesizer: a Kokoro voice distilled to 6 million parameters, in the wheel of the package hibari-tts."""

from collections.abc import Mapping, Sequence

import numpy as np

from msenc.speech.synthesis import SentenceSynthesizer, choose
from msenc.speech.synthesizers.psola import change_melody
from msenc.types import UNKNOWN, MsencError, VoiceAttributes, needing

SAMPLE_RATE = 24_000

TRACTS = {"woman": (1.0, 0.95, 1.04), "man": (1.0, 0.96, 1.05)}
"""Lengths of the vocal tract that speakers have, as multiples of the voice's."""

OTHER_TRACT = 1.2
"""A man's over a woman's: of formants, after Fant (1966) 1.17 to 1.2."""

PITCH_HZ = {
    "woman": {"low": 165.0, "medium": 190.0, UNKNOWN: 190.0, "high": 235.0},
    "man": {"low": 92.0, "medium": 112.0, UNKNOWN: 112.0, "high": 140.0},
}
SPREAD = {"flat": 0.4, "expressive": 1.6}
SPEED = {"slow": 0.77, "fast": 1.35}


class Hibari(SentenceSynthesizer):
    """The voices of hibari-tts; the one in its wheel is a woman's, of which a man's is made by a longer vocal tract.

    Args:
        voices: gender -> names of the package's voices. All but ``heart`` are downloaded by it when they are first
            used.
        num_threads: of one sentence.

    Raises:
        MsencError: the package is missing, a voice has no such name, or it cannot be downloaded.
    """

    def __init__(self, voices: Mapping[str, Sequence[str]], num_threads: int = 1) -> None:
        with needing("Hibari", "hibari"):
            import hibari
            from hibari.voices import VOICES
        self.voices = voices
        self.models, self.genders = {}, {}
        phonemes: dict[bool, object] = {}
        for gender in ("woman", "man"):
            if not voices.get(gender):
                raise MsencError(f"speech.voices.{gender}: found no voice, expected some of {', '.join(VOICES)}.")
            for name in voices[gender]:
                if name not in VOICES:
                    raise MsencError(f"speech.voices.{gender}: found {name!r}, expected some of {', '.join(VOICES)}.")
                if name not in self.models:
                    is_british = VOICES[name]["british"]
                    try:
                        model = hibari.Hibari(name, threads=num_threads, g2p=phonemes.get(is_british))
                    except RuntimeError as error:
                        raise MsencError(f"speech.voices.{gender}: {name} cannot be had. {error}") from error
                    phonemes[is_british] = model.g2p
                    self.models[name] = model
                    self.genders[name] = "woman" if VOICES[name]["gender"] == "female" else "man"

    def synthesize(self, phrase: str, voice: VoiceAttributes, speaker: str | None) -> tuple[np.ndarray, int]:
        """See `SentenceSynthesizer`."""
        gender = voice.gender if voice.gender != UNKNOWN else choose(tuple(PITCH_HZ), speaker)
        name = choose(self.voices[gender], speaker)
        tract = choose(TRACTS[gender], speaker)
        if self.genders[name] != gender:
            tract *= OTHER_TRACT if gender == "man" else 1 / OTHER_TRACT
        speed = float(np.clip(SPEED.get(voice.rate, 1.0) * tract, 0.5, 2.0))
        samples = self.models[name](phrase, speed=speed, seed=0)
        if len(samples) == 0:
            raise MsencError(f"speech: Hibari found nothing to say in {phrase!r}. It speaks English.")
        if tract != 1:
            with needing("Hibari", "demo"):
                import soxr
            samples = soxr.resample(samples, SAMPLE_RATE, SAMPLE_RATE * tract)  # slower: all formants fall
        is_own = self.genders[name] == gender and voice.pitch in ("medium", UNKNOWN)  # left as it is: it sounds best
        hertz = None if is_own else PITCH_HZ[gender][voice.pitch]
        samples = change_melody(samples, SAMPLE_RATE, hertz, SPREAD.get(voice.range, 1.0))
        return samples, SAMPLE_RATE
