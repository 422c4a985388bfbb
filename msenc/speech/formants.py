"""A voice's third and fourth formant, which tell how long the vocal tract is, whatever the pitch.

By linear prediction with the autocorrelation method: J. Makhoul, "Linear prediction: a tutorial review", Proceedings of
the IEEE 63 (1975). The first two formants tell the vowel, the higher ones rather the speaker.
"""

from math import gcd

import numpy as np

from msenc.speech.pitch import HOP_S

_CEILING_HZ = 5500  # five formants of a short vocal tract lie below it
_ORDER = 10  # two poles for each
_WINDOW_S = 0.03
_EMPHASIS = 0.95  # what voices lose towards high frequencies
_LOWEST_HZ, _WIDEST_HZ = 150.0, 600.0  # of what counts as a formant
_MIN_FRAMES = 10


def high_formants(samples: np.ndarray, sample_rate: int, is_voiced: np.ndarray) -> tuple[float, float] | None:
    """Medians of the third and the fourth formant over the voiced frames.

    Args:
        samples: float32 (S,), one channel.
        sample_rate: in Hz, at least 11,000.
        is_voiced: (T,) the frames, every 10 ms, that `track_voice` found a pitch in.

    Returns:
        Hz; None where fewer than ten frames show four formants.
    """
    from scipy.signal import resample_poly

    rate = 2 * _CEILING_HZ
    factor = gcd(rate, sample_rate)
    low = resample_poly(samples.astype(np.float64), rate // factor, sample_rate // factor)
    low = np.append(low[0], low[1:] - _EMPHASIS * low[:-1])
    width = round(_WINDOW_S * rate)
    first_s = (len(samples) / sample_rate - (len(is_voiced) - 1) * HOP_S) / 2
    starts = np.round((first_s + np.flatnonzero(is_voiced) * HOP_S) * rate).astype(int) - width // 2
    starts = starts[(starts >= 0) & (starts + width <= len(low))]
    if len(starts) < _MIN_FRAMES:
        return None
    frames = low[starts[:, None] + np.arange(width)] * np.hamming(width)  # (N, W)
    formants = [four for four in map(_lowest_formants, _poles(frames)) if len(four) == 4]
    if len(formants) < _MIN_FRAMES:
        return None
    third, fourth = np.median(np.array(formants), axis=0)[2:]
    return float(third), float(fourth)


def _poles(frames: np.ndarray) -> np.ndarray:
    """(N, W) -> (N, order) complex: the poles of each frame's prediction filter."""
    size = 1 << (2 * frames.shape[1] - 1).bit_length()
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, size)) ** 2, size)[:, : _ORDER + 1]
    correlation[:, 0] = correlation[:, 0] * 1.0001 + 1e-12  # so that there is a solution for pure tones, too
    lags = np.abs(np.subtract.outer(np.arange(_ORDER), np.arange(_ORDER)))
    weights = np.linalg.solve(correlation[:, lags], correlation[:, 1:, None])[..., 0]
    companion = np.zeros((len(frames), _ORDER, _ORDER))
    companion[:, np.arange(1, _ORDER), np.arange(_ORDER - 1)] = 1
    companion[:, 0] = weights
    return np.linalg.eigvals(companion)


def _lowest_formants(poles: np.ndarray) -> np.ndarray:
    """Frequencies in Hz of the four lowest narrow resonances, or of as many as there are."""
    poles = poles[poles.imag > 0]
    hertz = np.angle(poles) * _CEILING_HZ / np.pi
    width = -np.log(np.abs(poles)) * 2 * _CEILING_HZ / np.pi
    return np.sort(hertz[(hertz > _LOWEST_HZ) & (width < _WIDEST_HZ)])[:4]
