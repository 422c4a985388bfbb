"""A recording with one speaker per channel (a telephone call, an interview) -> each speaker's own sound.

A microphone hears the other speaker, too, quietly. Where a channel holds nothing but that, it is made silent.
"""

from pathlib import Path

import numpy as np

from msenc.raw.container import MediaError, Span, split_part
from msenc.raw.media import read_audio

VERSION = 2
"""Raised whenever equal recordings give other sounds."""
FRAME_S = 0.1
REACH_S = 0.03
"""How much later, or sooner, the other microphone hears a voice: 10 m of air."""
LOUDEST_ECHO_DB = -4.0
"""Echoes are quieter than their source by more than this."""
ECHO_SHARE = 0.3
"""In more than this share of one's speech the other is silent: so loud are echoes, or less, in the other's channel."""
SPREAD_DB, SURE_DB, LIKENESS = 6.0, 1.0, 0.25
"""An echo is louder than that by at most SPREAD_DB, and by more than SURE_DB only where it is like its source: where
their largest correlation, 0 to 1, is above LIKENESS."""
ACTIVE_DB = 30.0
"""Speech is not quieter than the loudest by more than this."""
ISLAND = 5
"""Frames over which the majority tells, as a tenth of a second between echoes is no word."""
ALIKE = 0.95
"""Likeness of whole channels from which they are one sound, stored twice."""


def read_channels(clip: Path, sample_rate: int, span: Span) -> list[np.ndarray]:
    """The sound of each channel, of equal lengths, without what it has from the others.

    Args:
        clip: a file, or a track of one (`with_track`).
        sample_rate: of the result, in Hz.
        span: the part to read.

    Returns:
        float32 (S,) for each channel; zeros for a silent one.

    Raises:
        MediaError: ``one channel`` or ``channels alike``, where there are no speakers to part; or see `read_audio`.
    """
    name, _ = split_part(str(clip))
    joint = "#" if name == str(clip) else "&"
    sounds: list[np.ndarray] = []
    while True:
        try:
            sounds.append(read_audio(Path(f"{clip}{joint}channel={len(sounds) + 1}"), sample_rate, span))
        except MediaError as error:
            if error.reason == "silent":
                sounds.append(np.zeros(0, np.float32))
            elif error.reason == "no such track" and sounds:
                break
            else:
                raise
    if len(sounds) == 1:
        raise MediaError("one channel")
    length = max(map(len, sounds))
    if not length:
        raise MediaError("silent")
    sounds = [np.pad(sound, (0, length - len(sound))) for sound in sounds]
    return without_echoes(sounds, sample_rate)


def without_echoes(sounds: list[np.ndarray], sample_rate: int) -> list[np.ndarray]:
    """Channels, each silent where it holds but an echo of another one; where both speak, both stay.

    Args:
        sounds: (S,) each.
        sample_rate: in Hz.

    Raises:
        MediaError: ``channels alike``, where two are one sound.
    """
    width = round(FRAME_S * sample_rate)
    centred = [s - s.mean(dtype=np.float64) for s in sounds]  # an offset that two share makes them no one sound
    frames = [np.pad(s, (0, -len(s) % width)).reshape(-1, width) for s in centred]
    powers = [np.einsum("fw,fw->f", f, f) for f in frames]
    kept = []
    for own, sound in enumerate(sounds):
        is_echo = np.zeros(len(powers[own]), bool)
        for other in range(len(sounds)):
            if other == own:
                continue
            total = np.sqrt(powers[own].sum() * powers[other].sum())
            if own < other and total and abs((frames[own] * frames[other]).sum()) > ALIKE * total:
                raise MediaError("channels alike")
            own_db, other_db = (10 * np.log10(powers[n] + 1e-12) for n in (own, other))
            is_active = other_db > other_db.max() - ACTIVE_DB
            usual_db = np.quantile((own_db - other_db)[is_active], ECHO_SHARE)
            above_db = own_db - other_db - min(usual_db, LOUDEST_ECHO_DB - SPREAD_DB)
            is_like = _likeness(frames[own], frames[other], round(REACH_S * sample_rate)) > LIKENESS
            is_echo |= (above_db < SURE_DB) | ((above_db < SPREAD_DB) & is_like)
        votes = np.convolve(is_echo, np.ones(ISLAND), "same") > ISLAND / 2
        kept.append(sound * ~np.repeat(votes, width)[: len(sound)])
    return kept


def _likeness(one: np.ndarray, other: np.ndarray, reach: int) -> np.ndarray:
    """(F, W), (F, W) -> (F,): the largest correlation within `reach` samples of delay, 0 to 1."""
    size = 1 << (one.shape[1] + reach - 1).bit_length()
    product = np.fft.irfft(np.fft.rfft(one, size) * np.fft.rfft(other, size).conj(), size)
    peaks = np.abs(np.concatenate([product[:, : reach + 1], product[:, -reach:]], axis=1)).max(axis=1)
    return peaks / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1) + 1e-12)
