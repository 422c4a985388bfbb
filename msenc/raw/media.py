"""A clip -> its audio or its video frames, as arrays. Only preparation decodes; training reads features.

Times are read from the file, and audio and frames keep one clock: that of `msenc.raw.container.origin_of`. PyAV does
the decoding and is an extra, so it is imported where it is used.
"""

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from msenc.raw.container import (
    GAP_S,
    MAX_CLIP_S,
    MAX_FRAME_BYTES,
    MAX_PIXELS,
    SAMPLE_RATES,
    Findings,
    MediaError,
    Span,
    choose_stream,
    decode_packets,
    has_times,
    load_av,
    may_jump,
    moving,
    open_clip,
    origin_of,
    read_packets,
    split_part,
    stated_length,
    tracks_of,
)

SILENCE_PEAK = 10 ** (-90 / 20)  # -90 dBFS: about the last bit of 16-bit sound
# The samples' mean, beyond which they were lifted by something other than sound, as by a sound card.
MAX_OFFSET = 0.02
# A stream that ends before this share of the length that its header states was cut off.
MIN_DECODED_SHARE = 0.5
# Pictures of a constant rate lie one tick more or less apart.
MAX_GAP_RATIO = 1.5
# A sound codec's first frames after a seek lack what they would overlap with: Opus asks for 80 ms.
CODEC_LEAD_S = 0.2
RESAMPLER_REACH_S = 0.05
# Where a seek in a video finds no key frame in time, it is tried from further ahead.
VIDEO_LEADS_S = (0.0, 2.0, 12.0)
# Codecs put at most 16 pictures out of order; who looks further ahead knows which one follows which.
LOOKAHEAD_PACKETS = 32
# A stream that ends so much before the length that its header states was cut off, but is used.
CUT_OFF_S, CUT_OFF_SHARE = 0.5, 0.1
# Encoders' delays are less than this.
LATE_S = 0.5
# One frame in so many is looked at for channels that cancel out, and all of the first ones.
WEIGHED_FRAMES = 16
# Power of the channels' sum, as a share of that of independent ones, below which they cancel out.
CANCELLED_SHARE = 0.1
# PCM's floats beyond full scale by less are an encoder's ripple, and by more than the second written on another scale:
# that of whole numbers of 16, 24 or 32 bits.
MIN_OVERLOAD, MAX_OVERLOAD = 1.1, 8.0
FLOAT_SCALES = (2**15, 2**23, 2**31)
# Pixels that are more oblong than this are a damaged header.
MAX_ASPECT = 8.0
# Less of a tilt than this, as a tangent, is rounding of a quarter turn.
MAX_TILT = 0.02
# Behind a packet that did not decode, times tell how much is missing; a container's clock rounds to a millisecond.
LOSS_S = 0.002


def read_audio(
    path: Path,
    sample_rate: int,
    span: Span | None = None,
    max_s: float = MAX_CLIP_S,
    findings: Findings | None = None,
) -> np.ndarray:
    """Decode and resample the audio of a clip, mixed down to one channel, every sample at its time in the file.

    What the file has nothing for is silence: before a late start, in a gap between packets, for a packet that does not
    decode. What overlaps is heard once.

    Args:
        path: any file that FFmpeg reads, or a part of one (`part_of`).
        sample_rate: of the result, in Hz.
        span: the part to read, to the sample, without decoding all that stands before it where the file's seeks can be
            trusted; None reads the whole, or what `path` says.
        max_s: a longer clip is refused, whatever its header says.
        findings: receives what was met with.

    Returns:
        float32 (S,), in [-1, 1].

    Raises:
        MediaError: if there is no such clip, no audio in it (or in that part), nothing to hear, or too much of it.
    """
    tracks = tracks_of(str(path))
    path, span = _located(path, span)
    findings = Findings() if findings is None else findings
    channel = tracks["channel"] - 1 if "channel" in tracks else None
    mixdown = _Mixdown(sample_rate, span or (0.0, None), max_s, findings, channel)
    samples = _decode_audio(path, span, tracks.get("track"), mixdown)
    cancelled, divisor = mixdown.loudest_of_cancelled(), mixdown.divisor_needed()
    if cancelled is not None:
        findings.notes["channels_cancel"] = f"channel {cancelled + 1} is taken"
    if cancelled is not None or divisor > 1:
        channel = channel if cancelled is None else cancelled
        mixdown = _Mixdown(sample_rate, span or (0.0, None), max_s, Findings(), channel, divisor)
        samples = _decode_audio(path, span, tracks.get("track"), mixdown)
    offset = float(samples.mean())
    if max(samples.max() - offset, offset - samples.min()) < SILENCE_PEAK:
        raise MediaError("silent")
    if abs(offset) > MAX_OFFSET:
        findings.notes["dc_offset"] = f"{offset:+.2f} of full scale"
    return samples


def _decode_audio(path: Path, span: Span | None, track: int | None, mixdown: "_Mixdown") -> np.ndarray:
    for lead_s in (CODEC_LEAD_S, None):
        with open_clip(path) as container:
            stream = choose_stream(list(container.streams.audio), "no sound", track)
            is_sought = _is_seekable(container, stream, path, span, lead_s)
            if is_sought and not _seek(container, stream, span, lead_s):
                continue
            try:
                mixdown.read(container, stream, is_sought)
            except _BadSeekError:
                continue
            samples = mixdown.samples()
            if span is None:
                _check_length(container, stream, mixdown.first_s, mixdown.end_s, mixdown.findings)
            break
    return samples


class _BadSeekError(Exception):
    """A seek led to where nothing tells what stands before the span."""


def _is_seekable(container: Any, stream: Any, path: Path, span: Span | None, lead_s: float | None) -> bool:
    """Whether there is something to pass over before a span, and a seek leads to where it says."""
    if span is None or lead_s is None or span[0] <= lead_s:
        return False
    if stream.type == "video" and not has_times(container):
        return False
    if stream.type == "audio" and container.format.name == "mpeg":
        return False  # packets begin inside frames, and give their times to another one than that
    return not may_jump(container) or _is_steady(path, _stamp(path), stream.index)


def _seek(container: Any, stream: Any, span: Span, lead_s: float) -> bool:
    """Go to `lead_s` before a span, and tell whether that went well."""
    with suppress(load_av().error.FFmpegError):
        container.seek(int((origin_of(container) + span[0] - lead_s) / stream.time_base), stream=stream)
        return True
    return False


@lru_cache(maxsize=64)
def _is_steady(path: Path, stamp: tuple[int, int], index: int) -> bool:
    """Whether a stream's times never begin anew; kept, as all parts of a recording ask for it."""
    findings = Findings()
    with open_clip(path) as container:
        deque(read_packets(container, container.streams[index], findings), maxlen=0)
    return "new_clock" not in findings.notes


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class _Mixdown:
    """Decoded audio -> samples of one channel at their places.

    Args:
        rate: of the samples, in Hz.
        span: of the file's time; its start is the first sample.
        max_s: longest that is taken.
        findings: receives what was met with.
        channel: the only one to take, from 0 on; None mixes all.
        divisor: of PCM's floats, where they are written on another scale than 1.
    """

    def __init__(
        self, rate: int, span: Span, max_s: float, findings: Findings, channel: int | None = None, divisor: int = 1
    ) -> None:
        self.rate = rate
        self.channel = channel
        self.divisor = divisor
        self.start_s, self.stop_s = span[0], math.inf if span[1] is None else span[1]
        self.max_s = max_s
        self.findings = findings
        self.first_s: float | None = None  # of the file's time, as all times here
        self.end_s = 0.0
        self.gaps: list[tuple[float, float]] = []
        self._parts: list[tuple[int, np.ndarray]] = []  # where it goes, int32 (S,)
        self._next = 0  # where what the resampler gives next goes
        self._begin_s, self._num_read = 0.0, 0  # samples are counted from here on
        self._key: tuple[str, str, int] | None = None
        self._resampler: Any = None
        self._has_all = False
        self._num_frames = 0
        self._powers = np.zeros(1)  # of each channel, and of their sum, where there are several
        self._power_of_sum = 0.0
        self._peak, self._num_not_finite = 0.0, 0  # of PCM's floats, which may be anything

    def read(self, container: Any, stream: Any, is_sought: bool) -> None:
        """Decode from where the container stands to the span's end.

        Raises:
            _BadSeekError: it stands behind a seek, and not where the span could be read from.
            MediaError: nothing decodes, or too much.
        """
        findings, damaged = self.findings, self.findings.damaged
        origin_s, is_timed = origin_of(container), has_times(container)
        is_free = stream.codec_context.name.startswith("pcm_f")
        counted_s = None  # where FFmpeg's own clock of a format without times stands
        packets = decode_packets(stream, read_packets(container, stream, findings), findings)
        for frame in packets:
            if is_sought and self.first_s is None:
                time_s = None if frame.time is None else frame.time - origin_s
                if findings.damaged > damaged or time_s is None or time_s > self.start_s:
                    findings.damaged = damaged
                    raise _BadSeekError
            has_lost = findings.damaged > damaged
            time_s = None if frame.time is None else frame.time - origin_s
            if not is_timed and time_s is not None and self.first_s is not None:
                lost_s = time_s - counted_s if has_lost and counted_s is not None else 0.0
                counted_s, time_s = time_s, self.end_s + max(lost_s, 0.0)
            counted_s = time_s if counted_s is None else counted_s
            if counted_s is not None and frame.duration:
                counted_s += float(frame.duration * frame.time_base)
            if is_free:
                self._hold_floats(frame)
            self._add(frame, self.end_s if time_s is None else time_s, has_lost)
            damaged = findings.damaged
            if self.end_s > self.stop_s + RESAMPLER_REACH_S:
                self._has_all = True
                break
        if self.first_s is None:
            if is_sought:
                raise _BadSeekError
            raise MediaError("clip corrupt" if findings.damaged else "no sound")
        self._flush()
        gaps = [gap for gap in self.gaps if gap[1] > self.start_s and gap[0] < self.stop_s]
        if gaps:
            total_s = sum(end_s - start_s for start_s, end_s in gaps)
            findings.notes["gap_in_audio"] = f"{total_s:.2f} s in {len(gaps)}, the first at {gaps[0][0]:.2f} s"
        if self.first_s > self.start_s + LATE_S:
            findings.notes["late_start"] = f"audio at {self.first_s:.2f} s"
        self._note_floats()

    def _hold_floats(self, frame: Any) -> None:
        """Change a frame's floats: silence for what is no number, and the scale of whole numbers to that of 1."""
        dtype = np.float64 if frame.format.name.startswith("dbl") else np.float32
        count = frame.samples * (1 if frame.format.is_planar else frame.layout.nb_channels)
        for plane in frame.planes:
            values = np.frombuffer(plane, dtype, count)
            if not (is_finite := np.isfinite(values)).all():
                self._num_not_finite += int((~is_finite).sum())
                values[~is_finite] = 0.0
            self._peak = max(self._peak, float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
            if self.divisor > 1:
                values /= self.divisor

    def divisor_needed(self) -> int:
        """What PCM's floats are to be divided by: the scale of the whole numbers that they seem to be."""
        if self._peak <= MAX_OVERLOAD:
            return 1
        return next((scale for scale in FLOAT_SCALES if self._peak <= scale), FLOAT_SCALES[-1])

    def _note_floats(self) -> None:
        notes = [f"{self._num_not_finite:,} are no numbers"] * (self._num_not_finite > 0)
        if self._peak > MIN_OVERLOAD:
            divisor = self.divisor_needed()
            done = f"divided by {divisor:,}" if divisor > 1 else "cut off"
            notes.append(f"up to {self._peak:,.6g} times full scale, {done}")
        if notes:
            self.findings.notes["bad_samples"] = "; ".join(notes)

    def _add(self, frame: Any, time_s: float, has_lost: bool) -> None:
        rate = frame.sample_rate
        if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
            raise MediaError("bad sample rate")
        jump_s = time_s - self.end_s
        if has_lost:  # of whole frames, whatever the clock rounds to
            frame_s = frame.samples / rate
            num = round(jump_s / frame_s)
            jump_s = num * frame_s if abs(jump_s - num * frame_s) < LOSS_S else jump_s
            time_s = self.end_s + jump_s
        key = (frame.format.name, frame.layout.name, rate)
        if self.first_s is None:
            self.first_s = time_s
            self._begin(time_s)
        elif abs(jump_s) > (LOSS_S if has_lost else GAP_S):
            if jump_s > GAP_S:
                self.gaps.append((self.end_s, time_s))
            self._begin(time_s)
        elif key != self._key:
            self._begin(self.end_s)
        if self._key not in (None, key):
            self.findings.notes["format_change"] = f"{frame.layout.name} at {rate} Hz from {time_s:.2f} s on"
        self._key = key
        if self._resampler is None:
            if self.channel is not None and not 0 <= self.channel < frame.layout.nb_channels and not self._parts:
                raise MediaError("no such track")
            # FFmpeg keeps the sum of a mix in range for whole numbers only: mixing floats would clip
            layout = "mono" if self.channel is None else frame.layout.name
            self._resampler = load_av().AudioResampler(format="s32p", layout=layout, rate=self.rate)
        if frame.layout.nb_channels > 1 and self.channel is None:
            self._weigh(frame)
        self._num_read += frame.samples
        self.end_s = self._begin_s + self._num_read / rate
        if min(self.end_s, self.stop_s) - self.start_s > self.max_s:
            raise MediaError("clip too long")
        frame.pts = None  # its place is known, and the resampler would fill gaps of rounding
        self._keep(self._resampler.resample(frame))

    def _begin(self, time_s: float) -> None:
        """What is added next lies at `time_s`, not behind what was added before."""
        self._flush()
        self._begin_s, self._num_read = time_s, 0
        self._next = round((time_s - self.start_s) * self.rate)

    def _flush(self) -> None:
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))
            self._resampler = None

    def _keep(self, frames: list[Any]) -> None:
        for frame in frames:
            plane = frame.planes[min(self.channel or 0, len(frame.planes) - 1)]
            samples = np.frombuffer(plane, np.int32, frame.samples)  # no copy: it is copied where it goes
            if self._next + len(samples) > 0:
                self._parts.append((self._next, samples))
            self._next += len(samples)

    def _weigh(self, frame: Any) -> None:
        """Add up the power of the channels, and of their sum, of some of the frames."""
        self._num_frames += 1
        if self._num_frames > WEIGHED_FRAMES and self._num_frames % WEIGHED_FRAMES:
            return
        values = frame.to_ndarray()
        values = values if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels).T
        values = values.astype(np.float32)
        values -= values.mean(axis=1, keepdims=True)  # an offset is no sound
        if len(values) != len(self._powers):
            self._powers, self._power_of_sum = np.zeros(len(values)), 0.0
        total = values.sum(axis=0)
        self._powers += np.einsum("cs,cs->c", values, values)
        self._power_of_sum += float(total @ total)

    def loudest_of_cancelled(self) -> int | None:
        """The loudest channel, from 0 on, where the channels' sum is far below that of independent ones."""
        if self._power_of_sum >= CANCELLED_SHARE * self._powers.sum():
            return None
        return int(self._powers.argmax())

    def samples(self) -> np.ndarray:
        """All that was read, float32 (S,); of what overlaps, what came first.

        Raises:
            MediaError: nothing of it lies in the span.
        """
        length = max((place + len(part) for place, part in self._parts), default=0)
        if self.stop_s < math.inf:
            stop = round((self.stop_s - self.start_s) * self.rate)
            length = stop if self._has_all else min(length, stop)
        if length <= 0:
            raise MediaError("no sound")
        samples, filled = np.zeros(length, np.float32), 0
        for place, part in self._parts:
            part = part[max(filled - place, 0) :][: max(length - max(place, filled), 0)]
            if len(part):
                place = max(place, filled)
                filled = place + len(part)
                samples[place:filled] = part
        samples /= 2**31
        return samples


def read_frames(
    path: Path,
    fps: float,
    span: Span | None = None,
    max_s: float = MAX_CLIP_S,
    findings: Findings | None = None,
) -> np.ndarray:
    """Decode the video frames that are on screen at 0, 1/fps, 2/fps ... seconds of the file, or from a span's start on.

    Frames are upright and of square pixels: a picture that is stored on its side or mirrored, as phones do, is turned;
    one whose pixels are not square is scaled; of interlaced ones one field is kept. Sampling goes by presentation time,
    so a variable frame rate keeps its timing: at each of these times the picture is the last one that started (within
    half a tick of the stream's clock); before the first one starts, it is that one. Only pictures that are kept are
    converted, and what is neither kept nor referred to by another picture is not even decoded.

    Args:
        path: any file that FFmpeg reads, or a part of one (`part_of`).
        fps: pictures per second of the result.
        span: the part to read, without decoding all that stands before it; None reads the whole, or what `path` says.
        max_s: a longer clip is refused, whatever its header says.
        findings: receives what was met with.

    Returns:
        uint8 (F, h, w, 3), RGB, F >= 1.

    Raises:
        MediaError: if there is no such clip, no picture in it (or in that part), or too much of it.
    """
    path, span = _located(path, span)
    findings = Findings() if findings is None else findings
    with _read_video(path, span, findings) as (container, stream, packets):
        half_tick = float(stream.time_base) / 2
        start_s, last_s = (0.0, math.inf) if span is None else (span[0], math.inf if span[1] is None else span[1])
        last_s -= start_s
        start_s += origin_of(container)
        kept: list[np.ndarray] = []
        size: list[int] = []  # of the first picture; a later one of another size is scaled to it
        current = current_s = first_s = None

        def keep_until(end_s: float) -> None:
            """Keep `current` for every sampling time before `end_s`."""
            picture = None
            while (len(kept) / fps) < end_s - half_tick:
                if len(kept) / fps > max_s:
                    raise MediaError("clip too long")
                if picture is None:
                    picture = _upright(current, stream, size, findings)
                if picture.nbytes * (len(kept) + 1) > MAX_FRAME_BYTES:
                    raise MediaError("clip too large")
                kept.append(picture)

        def is_kept(begin_s: float, end_s: float) -> bool:
            """Whether a sampling time lies between these times of the file."""
            begin, end = ((t - start_s - half_tick) * fps for t in (begin_s, end_s))
            return max(math.ceil(begin), 0) < end

        for frame in _decode_pictures(stream, packets, is_kept, findings):
            time_s = frame.time - start_s
            first_s = time_s if first_s is None else first_s
            if time_s >= last_s:
                break
            if current is not None:
                keep_until(time_s)
            current, current_s = frame, time_s
        if current is None:
            raise MediaError("clip corrupt" if findings.damaged else "no picture")
        end_s = current_s + (float(current.duration * current.time_base) if current.duration else _frame_length(stream))
        # even a picture without length is shown for a tick
        keep_until(min(max(end_s, 2 * half_tick) if span is None else end_s, last_s))
        if not kept:
            raise MediaError("no picture")
        if first_s > LATE_S:
            findings.notes.setdefault("late_start", f"video at {first_s:.2f} s")
        if span is None:
            _check_length(container, stream, first_s, end_s, findings)
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
    findings = Findings()
    with _read_video(path, span, findings) as (container, stream, packets):
        start_s = span[0] + origin_of(container)
        end_s = math.inf if span[1] is None else span[1] + origin_of(container)
        for frame in _decode_pictures(stream, packets, lambda *_: True, findings):
            if frame.time < start_s:
                continue
            if frame.time >= end_s:
                break
            width = min(frame.width, max_width)
            height = max(round(frame.height * width / frame.width), 1)
            small = frame.reformat(width=width, height=height, format="bgr24")
            yield frame.time - start_s, small.to_ndarray()


@contextmanager
def _read_video(path: Path, span: Span | None, findings: Findings) -> Iterator[tuple[Any, Any, Iterator[Any]]]:
    """A clip's container, its stream of video, and the packets of it, from a key frame before a span on or from all."""
    for lead_s in (*VIDEO_LEADS_S, None):
        with open_clip(path) as container:
            stream = choose_stream(moving(container), "no picture")
            packets = read_packets(container, stream, findings)
            if _is_seekable(container, stream, path, span, lead_s):
                if not _seek(container, stream, span, lead_s):
                    continue
                key_s = _next_key(container, stream)
                if key_s is None or key_s > span[0] + origin_of(container):
                    continue
                _seek(container, stream, span, lead_s)
                packets = dropwhile(lambda packet: packet is not None and not packet.is_keyframe, packets)
            yield container, stream, packets
            return


def _next_key(container: Any, stream: Any) -> float | None:
    """When the next picture that needs no other one comes up, by the container's clock."""
    for packet in read_packets(container, stream, Findings()):
        if packet is not None and packet.is_keyframe and packet.pts is not None:
            return float(packet.pts * stream.time_base)
    return None


def _decode_pictures(
    stream: Any, packets: Iterator[Any], is_needed: Callable[[float, float], bool], findings: Findings
) -> Iterator[Any]:
    """Pictures in the order of their times, but for some that are not needed.

    Left out are pictures that no other one refers to, about half of those of usual H.264. A picture without a time gets
    one, behind the one before.

    Args:
        stream: of pictures.
        packets: of it.
        is_needed: when a picture starts, and when the next one does, in seconds of the file -> whether it is needed.
        findings: receives what was met with.
    """
    times: list[int] = []
    is_timed, tick_s = has_times(stream.container), float(stream.time_base)

    def choose(packet: Any) -> Any:
        """Set what the decoder may leave out; which pictures follow is known by now."""
        is_last = not is_timed or packet is None or packet.pts is None or packet.pts >= times[-1]
        is_skipped = not is_last and not is_needed(packet.pts * tick_s, times[bisect_right(times, packet.pts)] * tick_s)
        stream.codec_context.skip_frame = "NONREF" if is_skipped else "DEFAULT"
        return packet

    def ordered() -> Iterator[Any]:
        ahead: deque[Any] = deque()
        for packet in packets:
            if packet is not None and packet.pts is not None:
                insort(times, packet.pts)
            ahead.append(packet)
            if len(ahead) > LOOKAHEAD_PACKETS:
                yield choose(ahead.popleft())
        while ahead:
            yield choose(ahead.popleft())

    next_s, length_s = origin_of(stream.container), _frame_length(stream)
    for frame in decode_packets(stream, ordered(), findings):
        if frame.pts is None or not is_timed:
            findings.notes["no_times"] = f"{1 / length_s:g} frames per second"
            frame.time_base = stream.time_base
            frame.pts = round(next_s / stream.time_base)
        next_s = frame.time + length_s
        yield frame


def _frame_length(stream: Any) -> float:
    """Seconds that one picture usually lasts in a stream."""
    rate = stream.guessed_rate or stream.average_rate
    return 1 / float(rate) if rate else 0.04


def _upright(frame: Any, stream: Any, size: list[int], findings: Findings) -> np.ndarray:
    """A decoded picture as it is to be seen: uint8 (h, w, 3), RGB, of square pixels.

    Args:
        frame: as stored.
        stream: that it is of.
        size: stored width and height, and width and height as which pictures are converted; filled by the first one.
        findings: receives what was met with.
    """
    notes = findings.notes
    stored = [frame.width, frame.height]
    if not size:
        aspect = float(stream.sample_aspect_ratio or 1)
        is_square = aspect == 1 or not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT
        if not is_square:
            notes["pixel_aspect"] = f"{stream.sample_aspect_ratio}"
        size += [*stored, stored[0] if is_square else max(round(stored[0] * aspect), 1), stored[1]]
    if stored != size[:2]:
        notes["format_change"] = f"{stored[0]} x {stored[1]} at {frame.time or 0:.2f} s"
    width, height = size[2:]
    if max(width * height, stored[0] * stored[1]) > MAX_PIXELS:
        raise MediaError("clip too large")
    matrix, rotation = _display_matrix(frame), frame.rotation
    if frame.interlaced_frame:
        notes["interlaced"] = ""
        frame = load_av().VideoFrame.from_ndarray(_one_field(frame.to_ndarray(format="rgb24")), format="rgb24")
    picture = frame.to_ndarray(format="rgb24", width=width, height=height)
    if matrix is None:
        return picture
    if matrix[0] * matrix[3] < matrix[1] * matrix[2]:
        notes["mirrored"] = ""
    turned = _turned(picture, matrix)
    if turned is None:
        notes["tilted"] = f"{rotation} degrees"
        return picture
    return turned


def _one_field(picture: np.ndarray) -> np.ndarray:
    """Of two fields that were taken one after the other, the upper one: its lines, and their means in between."""
    field = picture[::2]
    full = np.repeat(field, 2, axis=0)[: len(picture)]
    full[1 : 2 * len(field) - 2 : 2] = (field[:-1].astype(np.uint16) + field[1:]) // 2
    return full


def _display_matrix(frame: Any) -> tuple[float, float, float, float] | None:
    """a, b, c, d of where a player puts a picture's point: x' = a x + c y, y' = b x + d y; None where it stays."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]] / 2**16
    return None if tuple(matrix) == (1, 0, 0, 1) else tuple(matrix)


def _turned(picture: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray | None:
    """A picture as its display matrix puts it; None where that is no quarter turn."""
    a, b, c, d = matrix
    if max(abs(b), abs(c)) < MAX_TILT * min(abs(a), abs(d)):
        turned = picture[:: int(np.sign(d)), :: int(np.sign(a))]
    elif max(abs(a), abs(d)) < MAX_TILT * min(abs(b), abs(c)):
        turned = picture.transpose(1, 0, 2)[:: int(np.sign(b)), :: int(np.sign(c))]
    else:
        return None
    return np.ascontiguousarray(turned)


@dataclass(frozen=True)
class ClipProperties:
    """What a clip's headers say, and the times of its pictures.

    Args:
        formats: FFmpeg's names of the container, such as ``mov`` and ``mp4``, which are one.
        duration_s: of the longest stream, or None where it is not said.
        sample_rate: of the audio in Hz, 0 without.
        channels: of the audio, 0 without.
        tracks: of audio.
        videos: tracks of moving pictures.
        pictures: of the video; 0 without.
        video_end_s: when the last picture ends, by the clock of the decoded audio; None without.
        rotation: degrees by which the first picture is to be turned counter-clockwise to stand upright.
        is_variable: whether the pictures follow each other at uneven times.
    """

    formats: tuple[str, ...]
    duration_s: float | None
    sample_rate: int
    channels: int
    tracks: int
    videos: int
    pictures: int
    video_end_s: float | None
    rotation: int
    is_variable: bool


def read_properties(path: Path) -> ClipProperties:
    """Read a clip's headers, the times of its pictures, and the first of them.

    Raises:
        MediaError: if there is no such clip, or FFmpeg cannot open it.
    """
    with open_clip(path) as container:
        sound = video = None
        with suppress(MediaError):
            sound = choose_stream(list(container.streams.audio), "no sound")
        with suppress(MediaError):
            video = choose_stream(moving(container), "no picture")
        rotation, times, end_s = 0, [], None
        if video is not None:
            findings, num = Findings(), 0
            for packet in read_packets(container, video, findings):
                times += [] if packet is None or packet.pts is None else [packet.pts]
                if rotation == 0 and (num := num + 1) < 8:  # all pictures of a file are turned alike
                    frames = decode_packets(video, iter([packet]), findings)
                    rotation = next((frame.rotation for frame in frames), 0)
            if times:
                end_s = float(max(times) * video.time_base) + _frame_length(video) - origin_of(container)
        gaps = [b - a for a, b in pairwise(sorted(times))][:-1]  # some writers lengthen the last but one
        return ClipProperties(
            formats=tuple(container.format.name.split(",")),
            duration_s=container.duration / load_av().time_base if container.duration else None,
            sample_rate=sound.rate or 0 if sound else 0,
            channels=sound.layout.nb_channels if sound else 0,
            tracks=len(container.streams.audio),
            videos=len(moving(container)),
            pictures=len(times),
            video_end_s=end_s,
            rotation=rotation,
            is_variable=bool(gaps) and max(gaps) > MAX_GAP_RATIO * max(min(gaps), 1),
        )


def _located(path: Path, span: Span | None) -> tuple[Path, Span | None]:
    """The file of a clip, and the part of it to read."""
    file, part = split_part(str(path))
    return Path(file), part if span is None else span


def _check_length(container: Any, stream: Any, first_s: float, end_s: float, findings: Findings) -> None:
    """FFmpeg ends quietly at the end of a file that was cut off; what its header promised tells."""
    if "new_clock" in findings.notes:
        return
    stated_s, is_sure = stated_length(container, stream, first_s + origin_of(container))
    if is_sure and end_s - first_s < MIN_DECODED_SHARE * stated_s:
        raise MediaError("clip corrupt")
    if stated_s is not None and end_s - first_s < stated_s - max(CUT_OFF_S, CUT_OFF_SHARE * stated_s):
        findings.notes["cut_off"] = f"{end_s - first_s:.2f} s of {stated_s:.2f}"
