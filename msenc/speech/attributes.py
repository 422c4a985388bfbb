"""Measures of a voice -> the value of each attribute -> a word, by bins that are fitted on a train split."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import numpy as np

from msenc.speech.description import VOCABULARY
from msenc.speech.voice import VoiceMeasures, count_syllables, guess_syllables, snr_of
from msenc.types import UNKNOWN, MsencError, VoiceAttributes

UNITS = {
    "pitch": "Hz",
    "range": "semitones",
    "rate": "syllables/s",
    "loudness": "LUFS",
    "pauses": "share",
    "noise": "dB SNR",
}
"""The unit of each attribute's value."""


MIN_SPREAD = {"pitch": 2.0, "range": 1.0, "rate": 0.5, "loudness": 3.0, "pauses": 0.05, "noise": 6.0}
"""What the middle 80 % of the train clips must span for words to say anything; pitch in semitones, others in `UNITS`.

About the smallest difference that one hears between two sentences, or that the measures resolve.
"""


MIN_CLIPS = 10


RECORDING_LUFS = -23.0
"""What the median of a recording's clips counts as (EBU R 128); so do synthesizers speak when nothing else is asked."""


GENDER_CUES = {"f0_hz": (155.0, 0.5), "f3_hz": (2850.0, 1.0), "f4_hz": (3900.0, 0.5)}
"""Measure -> where women and men part, and how much a semitone above it counts for a woman."""


MIN_GENDER_ST = 0.6
"""Weighted semitones from there, below which a voice may be either."""


MAX_FORMANTS_ST = 2.0
"""What both formants count at most: noise, a distant microphone and a telephone move them by more."""


MAX_HIGH_PITCH_ST = 2.5
"""What a high pitch counts at most: where the fundamental is cut off, a harmonic is taken for it."""


LOWEST_WOMAN_HZ, HIGHEST_MAN_HZ = 120.0, 260.0
"""Median pitches beyond which formants that say otherwise leave the gender unknown."""


class NoVoiceError(MsencError):
    """No clip of the train split has a voice that could be measured."""


@dataclass(frozen=True)
class VoiceSettings:
    """How turns are described.

    Args:
        levels: words per attribute: 3, or 2 without the middle one.
        genders: speaker -> ``woman`` or ``man``, where the data set tells; others are estimated by pitch.
        edges: values at which the next word begins, for those that are not to be quantiles of the train split, by
            name: ``noise``, ``pitch/woman``, ...
        overwrite: replace the data set's own descriptions; else they stay and are read for their attributes.
        seed: of the sentences' templates.
        only_measure: measures and attributes are written, and the turns stay as they are.
        loudness: ``relative`` to the recording, whose clips' median counts as -23 LUFS, or ``absolute``, with the gain
            of the microphone in it.
        writer: model that writes the sentences, checked to say the same attributes; None takes templates.
        writer_url: of its server, up to and with ``/v1``; None: that of ``OPENAI_BASE_URL``. No default of its own: a
            stored config may hold no address that is opened unasked.
    """

    levels: int = 3
    genders: Mapping[str, str] = field(default_factory=dict)
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    overwrite: bool = False
    seed: int = 1
    only_measure: bool = False
    loudness: str = "relative"
    writer: str | None = None
    writer_url: str | None = None

    @property
    def writer_address(self) -> str:
        """Of the writer's server; empty where nobody says it."""
        return self.writer_url or os.environ.get("OPENAI_BASE_URL", "")

    def __post_init__(self) -> None:
        """Refuse what no bins could be made of."""
        if self.levels not in (2, 3):
            raise MsencError(f"data.voice.levels: found {self.levels!r}, expected 2 or 3 words per attribute.")
        if self.loudness not in ("relative", "absolute"):
            raise MsencError(f"data.voice.loudness: found {self.loudness!r}, expected relative or absolute.")
        if self.writer is not None and not self.writer_address.startswith(("http://", "https://")):
            raise MsencError(
                f"data.voice.writer_url: found {self.writer_address!r}, expected an address such as "
                "http://localhost:8000/v1 (or OPENAI_BASE_URL)."
            )
        for speaker, gender in self.genders.items():
            if gender not in VOCABULARY["gender"]:
                raise MsencError(
                    f"data.voice.genders: found {gender!r} for {speaker}, expected {' or '.join(VOCABULARY['gender'])}."
                )
        for name, edges in self.edges.items():
            if name not in _GROUPS:
                raise MsencError(f"data.voice.edges: no value {name!r}; there are {', '.join(_GROUPS)}.")
            if len(edges) != self.levels - 1 or list(edges) != sorted(edges):
                raise MsencError(
                    f"data.voice.edges.{name}: found {list(edges)}, expected {self.levels - 1} rising number(s) for "
                    f"{self.levels} levels."
                )


@dataclass(frozen=True)
class Bin:
    """Where one attribute's words change.

    Args:
        edges: the values at which the next word begins, rising; None where the words would say nothing.
        words: one more than the edges.
        source: ``quantiles``, ``given``, or why there are no edges.
        clips: train clips that it was fitted on.
        percentiles: their 10th, 50th and 90th, or None without clips.
    """

    edges: tuple[float, ...] | None
    words: tuple[str, ...]
    source: str
    clips: int
    percentiles: tuple[float, float, float] | None

    def word(self, value: float | None) -> str:
        """The word of a value; ``unknown`` without a value, or without edges."""
        if value is None or self.edges is None:
            return UNKNOWN
        return self.words[int(np.searchsorted(self.edges, value, side="right"))]


_GROUPS = (*(f"pitch/{gender}" for gender in VOCABULARY["gender"]), *(name for name in UNITS if name != "pitch"))


@dataclass(frozen=True)
class MeasuredTurn:
    """One turn's values by attribute, and its gender with where that comes from (None where there is none)."""

    values: Mapping[str, float | None]
    gender: str
    gender_source: str | None


def fit_bins(turns: Iterable[MeasuredTurn], settings: VoiceSettings) -> dict[str, Bin]:
    """Edges by name, at quantiles of the train split's clips, or as given.

    An attribute that (nearly) does not vary, or that fewer than ten clips show, gets no edges: its words would tell
    noise.

    Raises:
        MsencError: not one clip has a voice.
    """
    pooled: dict[str, list[float]] = {name: [] for name in _GROUPS}
    num_voices = 0
    for turn in turns:
        num_voices += turn.values["pitch"] is not None
        for name, value in turn.values.items():
            group = f"pitch/{turn.gender}" if name == "pitch" else name
            if value is not None and group in pooled:
                pooled[group].append(value)
    if num_voices == 0:
        raise NoVoiceError(
            "No clip of the train split has a voice that could be measured, so there is nothing to fit the words of "
            "voice descriptions on. Check that data.root holds the clips with their sound, or prepare without "
            "describe=true."
        )
    return {name: _fit_bin(name, np.array(values), settings) for name, values in pooled.items()}


def attributes_of(values: Mapping[str, float | None], gender: str, bins: Mapping[str, Bin]) -> VoiceAttributes:
    """Values in the units of `UNITS` -> words; a pitch without a gender has none."""
    words = {name: bins[name].word(values.get(name)) for name in UNITS if name != "pitch"}
    pitch = bins.get(f"pitch/{gender}")
    return VoiceAttributes(gender=gender, pitch=pitch.word(values.get("pitch")) if pitch else UNKNOWN, **words)


def measured_values(measures: VoiceMeasures, num_syllables: int) -> dict[str, float | None]:
    """A clip's measures -> the value of each attribute, in the units of `UNITS`."""
    speech_s = measures.speech_s
    return {
        "pitch": measures.f0_hz,
        "range": measures.f0_range_st,
        "rate": round(num_syllables / speech_s, 4) if speech_s and num_syllables > 1 else None,
        "loudness": measures.loudness_lufs,
        "pauses": measures.pause_share,
        "noise": measures.snr_db,
    }


def relate_to_recording(measures: Mapping[str, VoiceMeasures], is_relative: bool) -> dict[str, VoiceMeasures]:
    """Measures of one recording's clips, with the noise that all of its pauses tell, however each clip was cut.

    Args:
        measures: by clip.
        is_relative: also move the loudnesses so that their median is `RECORDING_LUFS`; a lone clip has none then.
    """
    levels = [m.noise_db for m in measures.values() if m.noise_db is not None]
    loud = [m.loudness_lufs for m in measures.values() if m.loudness_lufs is not None]
    related = {}
    for clip, one in measures.items():
        snr_db, lufs = one.snr_db, one.loudness_lufs
        if levels and one.speech_db is not None:
            snr_db = snr_of(one.speech_db, float(np.median(levels)))
        if is_relative and lufs is not None:
            lufs = round(lufs - float(np.median(loud)) + RECORDING_LUFS, 4) if len(loud) > 1 else None
        related[clip] = replace(one, snr_db=snr_db, loudness_lufs=lufs)
    return related


def estimate_gender(measures: Sequence[VoiceMeasures]) -> str:
    """The likely gender of one speaker by some clips; ``unknown`` where women and men overlap.

    Pitch, and the third and fourth formant, which a high or low mood does not move: `GENDER_CUES`, chosen on real and
    synthetic voices (docs/log.md).

    Example:
        >>> low, high = VoiceMeasures(110, f3_hz=2600, f4_hz=3600), VoiceMeasures(210, f3_hz=3000, f4_hz=4200)
        >>> estimate_gender([low, low, high]), estimate_gender([high]), estimate_gender([VoiceMeasures(f0_hz=90)])
        ('man', 'woman', 'unknown')
    """
    known = [m for m in measures if all(getattr(m, cue) is not None for cue in GENDER_CUES)]
    if not known or abs(score := float(np.median([_gender_score(m) for m in known]))) < MIN_GENDER_ST:
        return UNKNOWN
    pitch_hz = float(np.median([m.f0_hz for m in known]))
    if score > 0:
        return UNKNOWN if pitch_hz < LOWEST_WOMAN_HZ else "woman"
    return UNKNOWN if pitch_hz > HIGHEST_MAN_HZ else "man"


def _gender_score(measures: VoiceMeasures) -> float:
    """Weighted semitones towards a woman's voice."""
    pitch, *formants = (
        weight * 12 * np.log2(getattr(measures, cue) / middle) for cue, (middle, weight) in GENDER_CUES.items()
    )
    return min(pitch, MAX_HIGH_PITCH_ST) + float(np.clip(sum(formants), -MAX_FORMANTS_ST, MAX_FORMANTS_ST))


def _fit_bin(name: str, values: np.ndarray, settings: VoiceSettings) -> Bin:
    vocabulary = VOCABULARY[name.partition("/")[0]]
    words = vocabulary if settings.levels == 3 else (vocabulary[0], vocabulary[-1])
    percentiles = tuple(round(float(p), 4) for p in np.percentile(values, [10, 50, 90])) if len(values) else None
    if name in settings.edges:
        return Bin(tuple(float(e) for e in settings.edges[name]), words, "given", len(values), percentiles)
    if len(values) < MIN_CLIPS:
        return Bin(None, words, f"fewer than {MIN_CLIPS} clips", len(values), percentiles)
    low, _, high = percentiles
    spread = 12 * np.log2(high / low) if name.startswith("pitch") else high - low
    if spread < MIN_SPREAD[name.partition("/")[0]]:
        return Bin(None, words, "does not vary", len(values), percentiles)
    shares = np.arange(1, settings.levels) / settings.levels
    edges = tuple(round(float(e), 4) for e in np.quantile(values, shares))
    if len(set(edges)) < len(edges) or edges[0] <= values.min():
        # many clips share one value (no pause at all): their word would begin at it, and the one below stay empty
        return Bin(None, words, "most clips share one value", len(values), percentiles)
    return Bin(edges, words, "quantiles", len(values), percentiles)


def syllables_of(texts: Sequence[str]) -> list[int]:
    """Syllables of each text, by eSpeak NG where it is installed, else by the letters."""
    if not has_espeak():
        return [guess_syllables(text) for text in texts]
    from msenc.speech.synthesizers.libespeak import to_phonemes

    return [count_syllables(phonemes) for phonemes in to_phonemes(texts)]


def has_espeak() -> bool:
    """Whether syllables are counted by eSpeak NG's phonemes."""
    return find_spec("espeakng_loader") is not None
