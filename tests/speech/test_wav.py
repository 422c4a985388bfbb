"""WAV files: written whole, read back, refused where they are none."""

import io
import wave

import numpy as np
import pytest

from msenc.speech.wav import from_wav, to_wav, write_wav
from msenc.types import MsencError

SAMPLES = np.array([0.0, 0.25, -1.0, 1.0, 1.5, -2.0], np.float32)


def test_sound_comes_back_within_a_step():
    samples, sample_rate = from_wav(to_wav(SAMPLES, 24_000))
    assert sample_rate == 24_000
    np.testing.assert_allclose(samples, np.clip(SAMPLES, -1, 1), atol=1 / 32767)


def test_a_file_is_whole_or_not_there(tmp_path):
    write_wav(tmp_path / "a.wav", SAMPLES, 8_000)
    assert [f.name for f in tmp_path.iterdir()] == ["a.wav"]
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (8_000, 6, 1)
    with pytest.raises(MsencError, match="cannot be written"):
        write_wav(tmp_path / "a.wav" / "b.wav", SAMPLES, 8_000)
    assert [f.name for f in tmp_path.iterdir()] == ["a.wav"]


def test_channels_are_averaged():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(100)
        file.writeframes(np.array([[0, 32767], [32767, 32767]], "<i2").tobytes())
    assert from_wav(buffer.getvalue())[0].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("content", [b"", b"RIFF", b'{"error": "no such voice"}', b"ID3" + bytes(99)])
def test_other_bytes_are_refused(content):
    with pytest.raises(MsencError, match="expected a WAV file"):
        from_wav(content)
    eight_bits = to_wav(SAMPLES, 100).replace(b"\x02\x00\x10\x00data", b"\x01\x00\x08\x00data")
    with pytest.raises(MsencError, match="8 bits per sample, expected 16"):
        from_wav(eight_bits)
