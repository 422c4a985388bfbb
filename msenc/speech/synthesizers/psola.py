"""Another pitch and another melody for a recorded voice, by pitch-synchronous overlap-add (TD-PSOLA).

After E. Moulines and F. Charpentier, "Pitch-synchronous waveform processing techniques for text-to-speech synthesis
using diphones", Speech Communication 9 (1990): windows of two periods are cut around marks that lie one period apart,
and added again closer together or further apart. Formants and duration stay.
"""

from collections.abc import Callable

import numpy as np

from msenc.speech.pitch import HOP_S
from msenc.speech.voice import track_voice

_STEP_S = 0.005  # between marks where there is no voice
_MAX_FACTOR = 2.0


def change_melody(samples: np.ndarray, sample_rate: int, median_hz: float | None, spread: float) -> np.ndarray:
    """Move a voice's median pitch, and stretch how far its pitch moves around the median.

    Args:
        samples: float32 (S,), one voice; what has no voice in it comes back as it is.
        sample_rate: in Hz.
        median_hz: the new median; None keeps the voice's own. No pitch moves by more than an octave.
        spread: factor on all intervals from the median, in semitones: 0 is monotone, 1 changes nothing.

    Returns:
        float32 (S,).
    """
    if median_hz is None and spread == 1:
        return samples
    f0 = track_voice(samples, sample_rate)
    if not f0.any():
        return samples
    own = float(np.median(f0[f0 > 0]))
    wanted = (median_hz or own) * (np.maximum(f0, 1) / own) ** spread
    wanted = np.where(f0 > 0, np.clip(wanted, f0 / _MAX_FACTOR, f0 * _MAX_FACTOR), 0)
    hop = round(HOP_S * sample_rate)
    first = (len(samples) - (len(f0) - 1) * hop) // 2

    def at(track: np.ndarray, sample: float) -> float:
        return float(track[min(max(round((sample - first) / hop), 0), len(track) - 1)])

    marks, periods = _marks(samples, sample_rate, lambda sample: at(f0, sample))
    result = np.zeros(len(samples) + sample_rate // 5, np.float64)
    margin = sample_rate // 10
    padded = np.pad(samples.astype(np.float64), margin)
    position = float(marks[0])
    while position < len(samples):
        nearest = _nearest(marks, position)
        mark, period = int(marks[nearest]), int(periods[nearest])
        hertz = at(wanted, position)
        step = sample_rate / hertz if hertz else _STEP_S * sample_rate
        size = min(period, margin)
        window = np.hanning(2 * size + 1)
        start = round(position) + margin - size
        # windows that come closer than a period add up to more than one
        result[start : start + 2 * size + 1] += (
            window * padded[mark + margin - size : mark + margin + size + 1] * min(1.0, step / period) ** 0.5
        )
        position += step
    return result[margin : margin + len(samples)].astype(np.float32)


def _nearest(marks: np.ndarray, position: float) -> int:
    right = min(max(int(np.searchsorted(marks, position)), 1), len(marks) - 1)  # a voice has more marks than one
    return right if marks[right] - position < position - marks[right - 1] else right - 1


def _marks(samples: np.ndarray, sample_rate: int, pitch_at: Callable[[float], float]) -> tuple[np.ndarray, np.ndarray]:
    """Places one period apart, at peaks of the waveform, and the period at each, in samples."""
    marks, periods = [], []
    position = 0.0
    was_voiced = False
    while position < len(samples):
        hertz = pitch_at(position)
        if not hertz:
            period = _STEP_S * sample_rate
            mark = position
        else:
            period = sample_rate / hertz
            reach = period / 2 if not was_voiced else period / 8
            start = max(int(position - reach), 0)
            mark = start + int(samples[start : int(position + reach) + 1].argmax())
            if marks and mark <= marks[-1]:
                mark = marks[-1] + max(int(period / 2), 1)
        was_voiced = bool(hertz)
        marks.append(round(mark))
        periods.append(round(period))
        position = mark + period
    return np.array(marks), np.array(periods)
