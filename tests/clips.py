"""Small clips of every kind."""

from pathlib import Path

import av
import numpy as np


def write_media(
    path: Path,
    rate: int = 16000,
    channels: str = "mono",
    seconds: float = 0.5,
    with_picture: bool = True,
    with_sound: bool = True,
    ticks: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    rotation: int = 0,
    container: str = "mp4",
) -> Path:
    """Write a tone, and pictures with a white upper half shown from `ticks` (twelfths of a second) on.

    Args:
        path: the file.
        rate: of the sound.
        channels: FFmpeg's name of the layout.
        seconds: of sound.
        with_picture: False writes sound alone.
        with_sound: False writes pictures alone.
        ticks: when each picture starts.
        rotation: degrees by which a player is to turn the picture clockwise.
        container: FFmpeg's name of the format.
    """
    with av.open(str(path), "w", format=container) as file:
        streams = []
        if with_picture:
            video = file.add_stream("libx264", rate=12)
            video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
            streams.append(video)
            for tick in ticks:
                picture = np.full((32, 48, 3), 40 * tick % 250, np.uint8)
                picture[:16] = 255  # the upper half is white
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = tick
                file.mux(video.encode(frame))
        if with_sound:
            audio = file.add_stream("pcm_s16le" if container == "wav" else "aac", rate=rate, layout=channels)
            streams.append(audio)
            num = audio.layout.nb_channels
            tone = 0.3 * np.sin(np.arange(int(rate * seconds)) / 5)
            if container == "wav":
                frame = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], format="s16", layout=channels)
            else:
                frame = av.AudioFrame.from_ndarray(
                    np.tile(tone, (num, 1)).astype(np.float32), format="fltp", layout=channels
                )
            frame.sample_rate, frame.pts = rate, 0
            file.mux(audio.encode(frame))
        for stream in streams:
            file.mux(stream.encode(None))
    if rotation:
        turn(path, rotation)
    return path


def turn(path: Path, degrees: int) -> None:
    """Write a matrix into an MP4's track that asks players to turn its picture clockwise, as phones do."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    matrix = (cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join((n & 0xFFFFFFFF).to_bytes(4, "big") for n in matrix)
    path.write_bytes(data)
