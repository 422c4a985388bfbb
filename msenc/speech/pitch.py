"""A clip's sound -> its fundamental frequency over time, by the autocorrelation method.

After P. Boersma, "Accurate short-term analysis of the fundamental frequency and the harmonics-to-noise ratio of a
sampled sound", Proceedings of the Institute of Phonetic Sciences 17 (1993), with that paper's default costs.
"""

import numpy as np

HOP_S = 0.01
LOW_HZ, HIGH_HZ = 50.0, 500.0
_NUM_CANDIDATES = 6  # of which the first is "no voice"
_SILENCE, _VOICING = 0.03, 0.45
_OCTAVE_COST, _JUMP_COST, _ONSET_COST = 0.01, 0.35, 0.14


def track_pitch(samples: np.ndarray, sample_rate: int, low_hz: float = LOW_HZ, high_hz: float = HIGH_HZ) -> np.ndarray:
    """Fundamental frequency every 10 ms.

    Args:
        samples: float32 (S,), one channel.
        sample_rate: in Hz; 16,000 is enough for speech.
        low_hz: lowest frequency that is looked for; a window holds three of its periods.
        high_hz: highest frequency that is looked for.

    Returns:
        float64 (T,), Hz; 0 where there is no voice. Empty if the sound is shorter than a window.

    Example:
        >>> time = np.arange(16_000) / 16_000
        >>> buzz = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 9))
        >>> round(float(np.median(track_pitch(buzz, 16_000))), 1)
        150.0
    """
    width = round(3 * sample_rate / low_hz)
    if len(samples) < width:
        return np.zeros(0)
    hop = round(HOP_S * sample_rate)
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(samples, np.float64), width)[::hop]  # (T, W)
    frames = frames - frames.mean(axis=1, keepdims=True)
    peaks = np.abs(frames).max(axis=1)
    loudness = peaks / max(float(np.abs(samples - samples.mean()).max()), 1e-9)
    lags, strengths = _candidates(_autocorrelation(frames), sample_rate, low_hz, high_hz)  # (T, C) each
    pitches = np.where(lags > 0, sample_rate / np.maximum(lags, 1), 0.0)
    # long periods lose a little, so that of equal peaks the first one wins
    strengths = np.where(lags > 0, strengths - _OCTAVE_COST * np.log2(low_hz * lags / sample_rate + 1e-9), -np.inf)
    strengths[:, 0] = _VOICING + np.maximum(0, 2 - loudness * (1 + _VOICING) / _SILENCE)
    pitches[:, 0] = 0
    return _best_path(pitches, strengths)


def _autocorrelation(frames: np.ndarray) -> np.ndarray:
    """(T, W) -> (T, W): of the windowed frames, divided by the window's own; 1 at lag 0."""
    width = frames.shape[1]
    size = 1 << (2 * width - 1).bit_length()
    window = np.hanning(width + 2)[1:-1]
    spectra = np.fft.rfft(np.vstack([frames * window, window]), size)
    correlation = np.fft.irfft(np.abs(spectra) ** 2, size)[:, :width]
    correlation /= np.maximum(correlation[:, :1], 1e-12)
    return correlation[:-1] / np.maximum(correlation[-1], 1e-6)


def _candidates(
    correlation: np.ndarray, sample_rate: int, low_hz: float, high_hz: float
) -> tuple[np.ndarray, np.ndarray]:
    """The highest peaks of each frame: lags in samples (0: none) and heights, (T, C); column 0 is left free."""
    num_frames = len(correlation)
    first, last = int(sample_rate / high_hz), min(int(np.ceil(sample_rate / low_hz)), correlation.shape[1] - 2)
    before, here, after = (correlation[:, first + shift : last + 1 + shift] for shift in (-1, 0, 1))
    is_peak = (here > before) & (here >= after) & (here > 0.5 * _VOICING)
    order = np.argsort(np.where(is_peak, -here, 0.0), axis=1)[:, : _NUM_CANDIDATES - 1]
    before, here, after, kept = (np.take_along_axis(a, order, axis=1) for a in (before, here, after, is_peak))
    curve = np.where(kept, before - 2 * here + after, -1.0)  # a parabola through the three
    shift = 0.5 * (before - after) / curve
    lags = np.zeros((num_frames, _NUM_CANDIDATES))
    heights = np.zeros((num_frames, _NUM_CANDIDATES))
    size = order.shape[1]
    lags[:, 1 : size + 1] = np.where(kept, first + order + shift, 0.0)
    heights[:, 1 : size + 1] = np.where(kept, here - 0.25 * (before - after) * shift, 0.0)
    return lags, np.where(heights > 1, 1 / np.maximum(heights, 1), heights)  # above 1: an artefact of short windows


def _best_path(pitches: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """One candidate per frame, (T,): the strongest sequence with few jumps and changes of voicing (Viterbi)."""
    scale = 0.01 / HOP_S
    is_voiced = pitches > 0
    octaves = np.log2(np.where(is_voiced, pitches, 1.0))
    total, back = strengths[0], []
    for now in range(1, len(pitches)):
        both = is_voiced[now - 1][:, None] & is_voiced[now][None, :]
        jump = _JUMP_COST * np.abs(octaves[now - 1][:, None] - octaves[now][None, :])
        change = _ONSET_COST * (is_voiced[now - 1][:, None] != is_voiced[now][None, :])
        cost = scale * np.where(both, jump, change)
        arrival = total[:, None] - cost
        back.append(arrival.argmax(axis=0))
        total = arrival.max(axis=0) + strengths[now]
    path = [int(total.argmax())]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return pitches[np.arange(len(pitches)), path[::-1]]
