"""Sound <-> WAV files of 16 bits, one channel."""

import io
import wave
from pathlib import Path

import numpy as np

from msenc.files import whole
from msenc.types import MsencError


def write_wav(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write a file, whole or not at all.

    Args:
        path: of the file; its folder is made where it is missing.
        samples: float32 (S,) in [-1, 1].
        sample_rate: in Hz.

    Raises:
        MsencError: the disk refuses.
    """
    with whole(path) as partial:
        partial.write_bytes(to_wav(samples, sample_rate))


def to_wav(samples: np.ndarray, sample_rate: int) -> bytes:
    """The bytes of a WAV file; see `write_wav`."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def from_wav(content: bytes) -> tuple[np.ndarray, int]:
    """Samples, float32 (S,), and rate of a WAV file of 16 bits; channels are averaged.

    Raises:
        MsencError: the bytes are something else.

    Example:
        >>> samples, sample_rate = from_wav(to_wav(np.array([0.0, 0.5], np.float32), 8_000))
        >>> samples.round(3).tolist(), sample_rate
        ([0.0, 0.5], 8000)
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, sample_rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise MsencError(f"sound: found {content[:12]!r}, expected a WAV file of PCM samples ({error}).") from error
    if width != 2:
        raise MsencError(f"sound: found a WAV file of {8 * width} bits per sample, expected 16.")
    samples = np.frombuffer(frames[: len(frames) // (2 * channels) * 2 * channels], "<i2").astype(np.float32) / 32767
    return samples.reshape(-1, channels).mean(axis=1), sample_rate
