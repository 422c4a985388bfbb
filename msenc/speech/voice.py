"""A clip's sound -> how it is spoken, in physical units. `msenc.prepare.describe` makes words of it.

What a clip is too short, too quiet or too unvoiced to tell is None, never a guess.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from msenc.speech.formants import high_formants
from msenc.speech.pitch import HIGH_HZ, HOP_S, LOW_HZ, track_pitch

VERSION = 3  # raised whenever an equal clip gives other values
SAMPLE_RATE = 16_000

# Shortest material that a value is taken from.
MIN_VOICED_S = 0.2
MIN_MELODY_S = 0.4
MIN_SPEECH_S = 0.5
MIN_SPAN_S = 1.0
MIN_BACKGROUND_S = 0.1
MAX_SNR_DB = 80.0  # digital silence between the words

_GAP_S = 0.2  # shorter silences are closures of stops, not pauses
_BURST_S = 0.05
_BLOCK_S = 0.4


@dataclass(frozen=True)
class VoiceMeasures:
    """What one clip's sound tells; None where it does not.

    Args:
        f0_hz: median of the fundamental frequency.
        f0_range_st: semitones between the 10th and the 90th percentile of the fundamental frequency. (A standard
            deviation would follow the few frames that were tracked wrongly.)
        speech_s: seconds of speech, pauses taken out.
        loudness_lufs: gated loudness after ITU-R BS.1770-4.
        pause_share: pauses of 0.2 s or more, as a share of the time between the first and the last sound of speech.
        snr_db: power of the speech over that of what is heard beside it.
        f3_hz: median of the third formant in voiced sounds.
        f4_hz: of the fourth one.
        speech_db: power of what is heard while somebody speaks, over that of full scale.
        noise_db: power of what is heard in pauses, in the clip or around it.
    """

    f0_hz: float | None = None
    f0_range_st: float | None = None
    speech_s: float | None = None
    loudness_lufs: float | None = None
    pause_share: float | None = None
    snr_db: float | None = None
    f3_hz: float | None = None
    f4_hz: float | None = None
    speech_db: float | None = None
    noise_db: float | None = None


def measure(samples: np.ndarray, sample_rate: int = SAMPLE_RATE, around: np.ndarray | None = None) -> VoiceMeasures:
    """Measure one clip.

    Args:
        samples: float32 (S,), one channel, in [-1, 1].
        sample_rate: in Hz.
        around: of the recording that the clip is a part of, the clip with what stands beside it, whose pauses tell the
            noise; None: the clip's own.

    Example:
        >>> measure(np.zeros(16_000, np.float32)) == VoiceMeasures()
        True
    """
    samples = np.asarray(samples, np.float32)
    f0 = track_voice(samples, sample_rate)  # (T,)
    voiced = f0[f0 > 0]
    if len(voiced) * HOP_S < MIN_VOICED_S:
        return VoiceMeasures()
    power = _frame_power(samples, sample_rate, len(f0))
    is_speech = find_speech(power, f0 > 0)
    inside = np.flatnonzero(is_speech)
    span = inside[-1] + 1 - inside[0]
    speech_s = len(inside) * HOP_S
    speech_db = _decibel(power[is_speech].mean())
    noise_db = _noise_db(power, is_speech) if around is None else noise_around(around, sample_rate)
    low, high = np.percentile(voiced, [10, 90])
    f3_hz, f4_hz = high_formants(samples, sample_rate, f0 > 0) or (None, None)
    return VoiceMeasures(
        f0_hz=_rounded(np.median(voiced)),
        f0_range_st=_rounded(12 * np.log2(high / low)) if len(voiced) * HOP_S >= MIN_MELODY_S else None,
        speech_s=_rounded(speech_s) if speech_s >= MIN_SPEECH_S else None,
        loudness_lufs=loudness_lufs(samples, sample_rate),
        pause_share=_rounded(1 - len(inside) / span) if span * HOP_S >= MIN_SPAN_S else None,
        snr_db=None if noise_db is None else snr_of(speech_db, noise_db),
        f3_hz=f3_hz and _rounded(f3_hz),
        f4_hz=f4_hz and _rounded(f4_hz),
        speech_db=speech_db,
        noise_db=noise_db,
    )


def track_voice(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """The pitch track of one voice: tracked a second time among 1/2 to 5/2 of the first track's median.

    A window that suits the voice and no far octaves to err to, after De Looze and Hirst (Speech Prosody 2008), who take
    the bounds from the first track's quartiles.

    Returns:
        float64 (T,), Hz every 10 ms; 0 where there is no voice.
    """
    f0 = track_pitch(samples, sample_rate)
    if not f0.any():
        return f0
    median = float(np.median(f0[f0 > 0]))
    return track_pitch(samples, sample_rate, max(LOW_HZ, median / 2), min(HIGH_HZ, 2.5 * median))


def find_speech(power: np.ndarray, is_voiced: np.ndarray) -> np.ndarray:
    """Which frames are speech: those above a threshold between the clip's quiet and its loud frames, and voiced ones.

    Args:
        power: (T,) mean square of each frame.
        is_voiced: (T,) whether the frame has a pitch.

    Returns:
        bool (T,); gaps below 0.2 s are filled, bursts below 0.05 s are dropped.
    """
    level = 10 * np.log10(np.maximum(power, 1e-12))
    quiet, loud = np.percentile(level, [5, 95])
    threshold = max(quiet + 0.35 * (loud - quiet), loud - 40)
    # the reverb of a voice is still periodic: a pitch alone does not make a frame speech
    is_speech = (level > threshold) | (is_voiced & (level > loud - 25))
    return _without_runs(_without_runs(is_speech, False, _GAP_S), True, _BURST_S) | (is_voiced & (level > loud - 25))


def noise_around(samples: np.ndarray, sample_rate: int) -> float | None:
    """Power of the pauses in a sound, in dB; None where there are none."""
    f0 = track_voice(samples, sample_rate)
    if len(f0) == 0:
        return None
    power = _frame_power(samples, sample_rate, len(f0))
    return _noise_db(power, find_speech(power, f0 > 0))


def snr_of(speech_db: float, noise_db: float) -> float | None:
    """The speech's power alone over the noise's, in dB; None where there is no more than noise."""
    speech = 10 ** (speech_db / 10) - 10 ** (noise_db / 10)
    return _rounded(min(10 * np.log10(speech) - noise_db, MAX_SNR_DB)) if speech > 0 else None


def loudness_lufs(samples: np.ndarray, sample_rate: int) -> float | None:
    """Integrated loudness of one channel after ITU-R BS.1770-4, or None for less than 0.4 s, or for silence.

    Blocks of 0.4 s that overlap by three quarters, an absolute gate at -70 LUFS, a relative one 10 LU below the mean.
    The K weighting is applied as a magnitude over frequency.

    Example:
        >>> tone = np.sin(2 * np.pi * 997 * np.arange(32_000) / 16_000)  # 0 dBFS: -3.01 LUFS
        >>> round(loudness_lufs(tone, 16_000), 1)
        -3.0
    """
    block, hop = round(_BLOCK_S * sample_rate), round(_BLOCK_S * sample_rate / 4)
    if len(samples) < block:
        return None
    weighted = np.fft.irfft(
        np.fft.rfft(samples.astype(np.float64)) * _k_weighting(len(samples), sample_rate), len(samples)
    )
    sums = np.concatenate([[0.0], np.cumsum(weighted**2)])
    starts = np.arange(0, len(samples) - block + 1, hop)
    powers = (sums[starts + block] - sums[starts]) / block
    powers = powers[powers > 10 ** ((-70 + 0.691) / 10)]
    if len(powers) == 0:
        return None
    powers = powers[powers > powers.mean() / 10]
    return _rounded(-0.691 + 10 * np.log10(powers.mean()))


def count_syllables(phonemes: str) -> int:
    """Syllables of a text in eSpeak NG's IPA (en-us): runs of vowels, split by length and stress marks; schwas alone.

    Example:
        >>> count_syllables("hɐlˈoʊ aɪdˈiːə kɹiːˈeɪt")
        7
    """
    return len(re.findall("ə|[aeiouyæøœɐɑɒɔɚɛɜɝɤɨɪɯɵʉʊʌᵻ]+", phonemes))


def guess_syllables(text: str) -> int:
    """Syllables of an English text by its letters: runs of vowels per word, without a silent final e; at least one.

    For use where eSpeak NG is not installed. Numbers count one syllable per digit.

    Example:
        >>> guess_syllables("Here is the library, table 12.")
        10
    """
    count = 0
    for word in re.findall(r"[a-z']+|\d", text.lower()):
        vowels = re.findall("[aeiouy]+", word)
        is_silent = len(vowels) > 1 and re.search("[^aeiouyl]e$|[aeiouy]le$", word)
        count += max(1, len(vowels) - bool(is_silent))
    return count


def _frame_power(samples: np.ndarray, sample_rate: int, num_frames: int) -> np.ndarray:
    """(T,): mean square of 20 ms around the middle of each of the pitch track's windows."""
    hop, width = round(HOP_S * sample_rate), round(0.02 * sample_rate)
    first = (len(samples) - (num_frames - 1) * hop) // 2
    sums = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    starts = (first + hop * np.arange(num_frames) - width // 2).clip(0, len(samples) - width)
    return (sums[starts + width] - sums[starts]) / width


def _noise_db(power: np.ndarray, is_speech: np.ndarray) -> float | None:
    background = power[~is_speech]
    if len(background) * HOP_S < MIN_BACKGROUND_S:
        return None  # cut at the words: what the quietest sounds of speech hide, nobody knows
    return _decibel(np.median(background))


def _decibel(power: float) -> float:
    return _rounded(10 * np.log10(max(float(power), 1e-12)))


def _without_runs(flags: np.ndarray, value: bool, shorter_than_s: float) -> np.ndarray:
    """Turn runs of `value` that are shorter; those at the ends stay, for their other end was not heard."""
    flags = flags.copy()
    edges = np.flatnonzero(np.diff(flags)) + 1
    for start, end in pairwise(edges):
        if flags[start] == value and (end - start) * HOP_S < shorter_than_s - 1e-9:
            flags[start:end] = not value
    return flags


def _k_weighting(num_samples: int, sample_rate: int) -> np.ndarray:
    """Magnitude of BS.1770's two filters at the frequencies of a real transform; its coefficients are for 48 kHz."""
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(num_samples, 1 / sample_rate) / 48_000)
    shelf = (1.53512485958697 - 2.69169618940638 * z + 1.19839281085285 * z**2) / (
        1 - 1.69065929318241 * z + 0.73248077421585 * z**2
    )
    high_pass = (1 - z) ** 2 / (1 - 1.99004745483398 * z + 0.99007225036621 * z**2)
    return np.abs(shelf * high_pass)


def _rounded(value: float) -> float:
    return round(float(value), 4)
