"""Frames and a waveform -> one MP4 (H.264 video, AAC audio). Used by the demo's generator."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from msenc.raw.container import load_av


def write_clip(path: Path, frames: np.ndarray, samples: np.ndarray, fps: int, sample_rate: int) -> None:
    """Write one clip; equal input gives equal bytes.

    Args:
        path: the file to write, ending in ``.mp4``.
        frames: RGB, uint8, shape (T, height, width, 3) with even height and width.
        samples: mono waveform, float32 in [-1, 1], shape (N,).
        fps: frames per second.
        sample_rate: samples per second.

    Raises:
        MsencError: if PyAV is not installed.
    """
    av = load_av()
    # bitexact: no version strings or dates in the file.
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        picture = container.add_stream("libx264", rate=fps)
        picture.height, picture.width = frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        # One thread: with more, the result may depend on their timing.
        picture.codec_context.thread_count = 1
        # No look-ahead, tree or B-frames either: on pictures this small, x264's fast path through them reads memory
        # that nothing has written, so equal frames occasionally came out unequal.
        picture.options = {
            "preset": "veryfast",
            "crf": "18",
            "x264-params": "threads=1:lookahead-threads=1:rc-lookahead=0:no-mbtree=1:bframes=0",
        }
        sound = container.add_stream("aac", rate=sample_rate, layout="mono")
        sound.bit_rate = 48_000
        sound.options = {"aac_coder": "fast"}  # the default search takes five times as long as all the rest
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
