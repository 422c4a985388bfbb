"""What is done to speech after it was synthesized: pauses, loudness, noise.

numpy alone; each function takes and gives float32 (S,), one channel.
"""

from collections.abc import Sequence

import numpy as np

from msenc.speech.voice import loudness_lufs
from msenc.types import UNKNOWN, VoiceAttributes

LOUDNESS_LUFS = {"quiet": -33.0, "moderate": -23.0, UNKNOWN: -23.0, "loud": -15.0}
"""-23 is what broadcasters normalise to (EBU R 128)."""

SNR_DB = {"noisy": 8.0, "slight": 22.0}

PAUSE_S = {"few": 0.12, "some": 0.3, "many": 0.5}
"""Length of a pause within a sentence; others stay. One below 0.2 s is not heard as one (`msenc.speech.voice`)."""

HEAD_S = 0.1
TAIL_S = {"few": 0.08, "some": 0.25, UNKNOWN: 0.25, "many": 0.5}
"""Silence before and after a sentence; between two there are both."""

_HOP_S = 0.01
_GAP_S = 0.1  # shorter silence belongs to a consonant
_SILENCE_DB = -38.0
_FADE_S = 0.005


def act(phrases: Sequence[np.ndarray], sample_rate: int, voice: VoiceAttributes) -> np.ndarray:
    """One sentence with the pauses, loudness and noise of a voice, and with the silence around it.

    Args:
        phrases: of the sentence as synthesized, in any level; between two stands a pause.
        sample_rate: in Hz.
        voice: what it is to be like.
    """
    pieces = [trim(phrase, sample_rate) for phrase in phrases]
    if voice.pauses in PAUSE_S:
        pause_s = PAUSE_S[voice.pauses]
        pause = np.zeros(round(pause_s * sample_rate), np.float32)
        parted = ((pause, set_pauses(piece, sample_rate, pause_s)) for piece in pieces)
        pieces = [part for pair in parted for part in pair][1:]
    samples = set_loudness(np.concatenate(pieces), sample_rate, LOUDNESS_LUFS[voice.loudness])
    samples = np.pad(samples, (round(HEAD_S * sample_rate), round(TAIL_S[voice.pauses] * sample_rate)))
    if voice.noise in SNR_DB:
        samples = add_noise(samples, sample_rate, SNR_DB[voice.noise])
    return samples


def trim(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Without the silence at both ends."""
    loud = np.flatnonzero(~_silent_hops(samples, sample_rate))
    if len(loud) == 0:
        return samples
    hop = round(_HOP_S * sample_rate)
    return _faded(samples[loud[0] * hop : (loud[-1] + 1) * hop], sample_rate)


def set_pauses(samples: np.ndarray, sample_rate: int, pause_s: float) -> np.ndarray:
    """Make each pause within the sound `pause_s` long; the sound between them is not touched."""
    hop = round(_HOP_S * sample_rate)
    is_silent = np.concatenate([[False], _silent_hops(samples, sample_rate), [False]])
    starts, ends = (np.flatnonzero(np.diff(is_silent.astype(np.int8)) == sign) for sign in (1, -1))
    pieces, at = [], 0
    for start, end in zip(starts * hop, ends * hop, strict=True):
        if end - start < _GAP_S * sample_rate or start == 0 or end >= len(samples):
            continue
        pieces += [_faded(samples[at:start], sample_rate), np.zeros(round(pause_s * sample_rate), np.float32)]
        at = end
    return np.concatenate([*pieces, _faded(samples[at:], sample_rate) if pieces else samples])


def set_loudness(samples: np.ndarray, sample_rate: int, lufs: float) -> np.ndarray:
    """Scale to a loudness after ITU-R BS.1770; peaks beyond 0.7 bend smoothly, and none reaches 1."""
    block = round(0.4 * sample_rate)  # the measure's shortest sound
    samples = samples / max(float(np.abs(samples).max()), 1e-9)  # the measure leaves out what is below -70 LUFS
    now = loudness_lufs(np.pad(samples, (0, max(0, block - len(samples)))), sample_rate)
    if now is None:
        return samples
    return bend(samples * np.float32(10 ** ((lufs - now) / 20)))


def bend(samples: np.ndarray) -> np.ndarray:
    """Bend peaks beyond 0.7 smoothly, so that none reaches 1."""
    size = np.abs(samples)
    bent = 0.7 + 0.29 * np.tanh((size - 0.7) / 0.29)
    return np.where(size > 0.7, np.sign(samples) * bent, samples).astype(np.float32)


def add_noise(samples: np.ndarray, sample_rate: int, snr_db: float) -> np.ndarray:
    """Add noise whose power falls with the frequency (pink), always the same one.

    Args:
        samples: speech.
        sample_rate: in Hz.
        snr_db: mean power of the parts that are not silent, over that of the noise.
    """
    hop = round(_HOP_S * sample_rate)
    is_silent = np.repeat(_silent_hops(samples, sample_rate), hop)
    speech = samples[: len(is_silent)][~is_silent].astype(np.float64)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(len(samples)))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(len(samples), 1 / sample_rate), 50.0))
    noise = np.fft.irfft(spectrum, len(samples))
    noise *= np.sqrt(np.mean(speech**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
    return np.clip(samples + noise, -1, 1).astype(np.float32)


def _silent_hops(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """(S // hop,) bool: whether 10 ms lie far below the loud parts."""
    hop = round(_HOP_S * sample_rate)
    power = np.mean(samples[: len(samples) // hop * hop].reshape(-1, hop).astype(np.float64) ** 2, axis=1)
    if len(power) == 0:
        return np.zeros(0, bool)
    level = 10 * np.log10(np.maximum(power, 1e-12))
    return level < np.percentile(level, 95) + _SILENCE_DB


def _faded(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Cut without a click."""
    size = min(round(_FADE_S * sample_rate), len(samples) // 2)
    samples = samples.copy()
    ramp = np.linspace(0, 1, size, endpoint=False, dtype=np.float32)
    samples[:size] *= ramp
    samples[len(samples) - size :] *= ramp[::-1]
    return samples
