"""A clip -> its sound or its pictures, as arrays. Only preparation decodes; training reads features.

PyAV does the decoding and is an extra, so it is imported where it is used.
"""

import math
import re
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from msenc.types import MsencError, needing

SILENCE_PEAK = 10 ** (-90 / 20)  # -90 dBFS: about the last bit of 16-bit sound
# A stream that ends before this share of the length that its header declares was cut off.
MIN_DECODED_SHARE = 0.5
# Pictures of a constant rate lie one tick more or less apart.
MAX_GAP_RATIO = 1.5
# A sound codec's first frames after a seek lack what they would overlap with: Opus asks for 80 ms.
CODEC_LEAD_S = 0.2
RESAMPLER_REACH_S = 0.05
# Codecs put at most 16 pictures out of order; who looks further ahead knows which one follows which.
LOOKAHEAD_PACKETS = 32

SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"),
    *(".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus"),
)
"""File names that are taken for media where nothing names the files; FFmpeg itself looks at the content."""


class MediaError(Exception):
    """A clip that lacks a stream.

    Args:
        reason: ``clip missing``, ``clip corrupt``, ``no sound``, ``silent`` or ``no picture``.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


Span = tuple[float, float | None]
"""Seconds of a longer recording, from its first picture or sound on; None is its end."""

_PART = re.compile(r"(.+)#t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", re.DOTALL)


def part_of(file: str, start_s: float, end_s: float) -> str:
    """Name a part of a recording as a clip, in the way of W3C's Media Fragments.

    Example:
        >>> part_of("talks/1.mp4", 12.5, 14)
        'talks/1.mp4#t=12.500,14.000'
        >>> split_part("talks/1.mp4#t=12.500,14.000")
        ('talks/1.mp4', (12.5, 14.0))
    """
    return f"{file}#t={start_s:.3f},{end_s:.3f}"


def split_part(clip: str) -> tuple[str, Span | None]:
    """A clip's file, and which part of it the clip is; None where it is the whole file."""
    match = _PART.fullmatch(clip)
    return (match[1], (float(match[2]), float(match[3]))) if match else (clip, None)


def read_audio(path: Path, sample_rate: int, span: Span | None = None) -> np.ndarray:
    """Decode and resample the first sound stream of a video or sound file, mixed down to one channel.

    Args:
        path: any file that FFmpeg reads, or a part of one (`part_of`).
        sample_rate: of the result, in Hz.
        span: the part to read, to the sample, without decoding all that stands before it; None reads the whole, or
            what `path` says.

    Returns:
        float32 (S,), in [-1, 1].

    Raises:
        MediaError: if there is no such clip, no sound in it (or in that part), or nothing to hear.
    """
    path, span = _located(path, span)
    with _open(path) as container:
        if not container.streams.audio:
            raise MediaError("no sound")
        stream = container.streams.audio[0]
        # FFmpeg keeps the sum of a mix in range for whole numbers only: mixing floats would clip
        resampler = load_av().AudioResampler(format="s32", layout="mono", rate=sample_rate)
        parts, num_decoded, source_rate = [], 0, stream.rate or sample_rate
        first_s = None
        start_s, end_s = span or (0.0, None)
        for frame in container.decode(stream) if span is None else _decode_from(container, stream, start_s):
            if first_s is None and span is not None:
                first_s = frame.time - _origin(container)
            if end_s is not None and num_decoded / source_rate > end_s - first_s + RESAMPLER_REACH_S:
                break
            num_decoded += frame.samples
            frame.pts = None  # times of some containers are rounded, and the resampler would fill the gaps
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        if num_decoded == 0:
            raise MediaError("no sound")
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
        if span is None:
            _check_length(stream, num_decoded / source_rate)
    samples = np.concatenate(parts).astype(np.float32) / 2**31
    if span is not None:
        start, end = (t if t is None else round((t - first_s) * sample_rate) for t in span)
        samples = np.pad(samples, (max(-start, 0), 0))[max(start, 0) : None if end is None else end + max(-start, 0)]
        if len(samples) == 0:
            raise MediaError("no sound")
    if np.abs(samples).max(initial=0.0) < SILENCE_PEAK:
        raise MediaError("silent")
    return samples


def read_frames(path: Path, fps: float, span: Span | None = None) -> np.ndarray:
    """Decode the pictures that are on screen at 0, 1/fps, 2/fps ... seconds after the first one, or a span's start.

    A picture that is stored on its side, as phones do, is turned upright. Sampling goes by presentation time, so a
    variable frame rate keeps its timing: at each of these times the picture is the last one that started (within half a
    tick of the stream's clock). Only pictures that are kept are converted, and what is neither kept nor referred to by
    another picture is not even decoded.

    Args:
        path: any file that FFmpeg reads, or a part of one (`part_of`).
        fps: pictures per second of the result.
        span: the part to read, without decoding all that stands before it; None reads the whole, or what `path` says.

    Returns:
        uint8 (F, h, w, 3), RGB, F >= 1.

    Raises:
        MediaError: if there is no such clip, or no picture in it (or in that part).
    """
    path, span = _located(path, span)
    with _open(path) as container:
        streams = _moving(container)
        if not streams:
            raise MediaError("no picture")
        stream = streams[0]
        half_tick = float(stream.time_base) / 2
        kept: list[np.ndarray] = []
        size: dict[str, int] = {}  # of the first picture; a later one of another size is scaled to it
        current = first_s = None

        def keep_until(end_s: float) -> None:
            """Keep `current` for every sampling time before `end_s`."""
            picture = None
            while (len(kept) / fps) < end_s - half_tick:
                if picture is None:
                    picture = current.to_ndarray(format="rgb24", **size)
                    size.update(width=picture.shape[1], height=picture.shape[0])
                    picture = _upright(picture, current.rotation)
                kept.append(picture)

        last_s = None
        if span is not None:
            first_s = span[0] + _origin(container)
            last_s = None if span[1] is None else span[1] - span[0]

        def is_kept(start_s: float, end_s: float) -> bool:
            """Whether a sampling time lies between these times of the file."""
            if first_s is None:
                return True
            start, end = ((t - first_s - half_tick) * fps for t in (start_s, end_s))
            return max(math.ceil(start), 0) < end

        for frame in _decode_pictures(container, stream, is_kept, span[0] if span else None):
            if frame.pts is None:
                continue
            first_s = frame.time if first_s is None else first_s
            if last_s is not None and frame.time - first_s >= last_s:
                break
            if current is not None:
                keep_until(frame.time - first_s)
            current = frame
        if current is None:
            raise MediaError("no picture")
        length_s = float(current.duration * current.time_base) if current.duration else _frame_length(stream)
        end_s = current.time - first_s + length_s
        if span is None:
            keep_until(max(end_s, 2 * half_tick))  # even a picture without length is shown for a tick
            _check_length(stream, end_s)
        else:
            keep_until(end_s if last_s is None else min(end_s, last_s))
            if not kept:
                raise MediaError("no picture")
    return np.stack(kept)


def iterate_frames(path: Path, span: Span, max_width: int) -> Iterator[tuple[float, np.ndarray]]:
    """Decode every picture of a span, made small, one at a time.

    Args:
        path: any file that FFmpeg reads.
        span: the part to read.
        max_width: of the pictures, in pixels; smaller ones keep their size.

    Yields:
        Seconds from the span's start to when the picture comes up; uint8 (h, w, 3), BGR.

    Raises:
        MediaError: if there is no such clip, or no picture in it.
    """
    with _open(path) as container:
        streams = _moving(container)
        if not streams:
            raise MediaError("no picture")
        start_s = span[0] + _origin(container)
        end_s = math.inf if span[1] is None else span[1] + _origin(container)
        for frame in _decode_from(container, streams[0], span[0]):
            if frame.pts is None or frame.time < start_s:
                continue
            if frame.time >= end_s:
                break
            width = min(frame.width, max_width)
            height = max(round(frame.height * width / frame.width), 1)
            small = frame.reformat(width=width, height=height, format="bgr24")
            yield frame.time - start_s, small.to_ndarray()


@dataclass(frozen=True)
class ClipProperties:
    """What a clip's headers say.

    Args:
        formats: FFmpeg's names of the container, such as ``mov`` and ``mp4``, which are one.
        duration_s: of the longest stream, or None where it is not said.
        sample_rate: of the sound in Hz, 0 without.
        channels: of the sound, 0 without.
        rotation: degrees by which the first picture is to be turned counter-clockwise to stand upright.
        is_variable: whether the pictures follow each other at uneven times.
    """

    formats: tuple[str, ...]
    duration_s: float | None
    sample_rate: int
    channels: int
    rotation: int
    is_variable: bool


def read_properties(path: Path) -> ClipProperties:
    """Read a clip's headers, the times of its pictures, and the first of them.

    Raises:
        MediaError: if there is no such clip, or FFmpeg cannot open it.
    """
    with _open(path) as container:
        sound = next(iter(container.streams.audio), None)
        video = next(iter(_moving(container)), None)
        rotation, times = 0, []
        if video is not None:
            for packet in container.demux(video):
                times += [] if packet.pts is None else [packet.pts]
                if rotation == 0 and len(times) < 8:  # all pictures of a file are turned alike
                    rotation = next((frame.rotation for frame in packet.decode()), 0)
        gaps = [b - a for a, b in pairwise(sorted(times))][:-1]  # some writers lengthen the last but one
        return ClipProperties(
            formats=tuple(container.format.name.split(",")),
            duration_s=container.duration / load_av().time_base if container.duration else None,
            sample_rate=sound.rate or 0 if sound else 0,
            channels=sound.layout.nb_channels if sound else 0,
            rotation=rotation,
            is_variable=bool(gaps) and max(gaps) > MAX_GAP_RATIO * max(min(gaps), 1),
        )


def _located(path: Path, span: Span | None) -> tuple[Path, Span | None]:
    """The file of a clip, and the part of it to read."""
    file, part = split_part(str(path))
    return Path(file), part if span is None else span


def _moving(container: Any) -> list[Any]:
    """The streams of pictures that are no cover of a sound file."""
    return [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]


def _origin(container: Any) -> float:
    """The container's clock, in seconds, when its presentation begins; some clocks start anywhere."""
    return max(container.start_time or 0, 0) / load_av().time_base


def _decode_pictures(
    container: Any, stream: Any, is_needed: Callable[[float, float], bool], start_s: float | None
) -> Iterator[Any]:
    """Pictures in the order of their times, but for some that are not needed.

    Left out are pictures that no other one refers to, about half of those of usual H.264.

    Args:
        container: of the stream.
        stream: of pictures.
        is_needed: when a picture starts, and when the next one does, in seconds of the file -> whether it is needed.
        start_s: as for `_decode_from`; None is the beginning.
    """

    def decode() -> Iterator[Any]:
        times: list[int] = []
        ahead: deque[Any] = deque()

        def pictures_of(packet: Any) -> Iterator[Any]:
            is_last = packet.pts is None or packet.pts >= times[-1]
            is_skipped = not is_last and not is_needed(
                *(float(t * stream.time_base) for t in (packet.pts, times[bisect_right(times, packet.pts)]))
            )
            stream.codec_context.skip_frame = "NONREF" if is_skipped else "DEFAULT"
            yield from packet.decode()

        for packet in container.demux(stream):
            if packet.pts is not None:
                insort(times, packet.pts)
            ahead.append(packet)
            if len(ahead) > LOOKAHEAD_PACKETS:
                yield from pictures_of(ahead.popleft())
        while ahead:
            yield from pictures_of(ahead.popleft())

    yield from decode() if start_s is None else _decode_from(container, stream, start_s, decode)


def _decode_from(
    container: Any, stream: Any, start_s: float, decode: Callable[[], Iterator[Any]] | None = None
) -> Iterator[Any]:
    """Frames from a little before `start_s` on: from a key frame, or so early that the sound's codec has settled.

    `decode` gives the frames from where the container stands; all of them by default.
    """
    decode = decode or (lambda: container.decode(stream))
    time_base = stream.time_base
    origin_s = _origin(container)
    lead_s = CODEC_LEAD_S if stream.type == "audio" else 0.0
    if start_s <= lead_s:
        yield from decode()
        return
    container.seek(int((origin_s + start_s - lead_s) / time_base), stream=stream)
    frames = decode()
    first = next(frames, None)
    if first is None or first.time is None or first.time - origin_s > start_s:
        # the file's index led past it, or there is none
        container.seek(int(origin_s / time_base), stream=stream)
        yield from decode()
        return
    yield first
    yield from frames


def _frame_length(stream: Any) -> float:
    """Seconds that one picture usually lasts in a stream."""
    return 1 / float(stream.average_rate) if stream.average_rate else 0.0


def _upright(picture: np.ndarray, rotation: int) -> np.ndarray:
    """Turn a picture (h, w, 3) by the angle that its file asks for, if that is a quarter turn or several."""
    return np.ascontiguousarray(np.rot90(picture, rotation // 90)) if rotation % 90 == 0 and rotation else picture


def _check_length(stream: Any, decoded_s: float) -> None:
    """FFmpeg ends quietly at the end of a file that was cut off; what its header promised tells."""
    if stream.duration and decoded_s < MIN_DECODED_SHARE * float(stream.duration * stream.time_base):
        raise MediaError("clip corrupt")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The clip's container; what FFmpeg refuses, on opening or while decoding, is a corrupt clip."""
    av = load_av()
    path = Path(path)
    if not path.is_file():
        raise MediaError("clip missing")
    try:
        # titles and the like may be in any encoding; nothing here reads them
        with av.open(str(path), metadata_errors="replace") as container:
            if any(stream.codec_context is None for stream in (*container.streams.audio, *container.streams.video)):
                raise MediaError("clip corrupt")  # nothing decodes what its header names
            yield container
    except PermissionError as error:
        raise MsencError(f"{path}: no permission to read this clip. Make the dataset's files readable.") from error
    except av.error.FFmpegError as error:
        raise MediaError("clip corrupt") from error


def load_av() -> ModuleType:
    """PyAV's module.

    Raises:
        MsencError: it is not installed.
    """
    with needing("reading and writing clips", "media"):
        import av
    return av
