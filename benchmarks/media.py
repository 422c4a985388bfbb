"""Which media files are used, flagged or rejected: python benchmarks/media.py [--json FILE].

Writes a small file of every kind (container, codecs, what is odd about it), probes each as the audit does, and prints
what becomes of its audio and its video. The tests read the same files.
"""

import argparse
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from measure import print_table, write_json

from msenc.raw.probe import probe_clip

RATE = 48_000
FPS = 10
SIZE = (64, 48)

Pieces = Sequence[tuple[float, np.ndarray]]
"""Seconds at which a piece starts; its samples, float32 (C, S)."""


def tone(hz: float, seconds: float, channels: Sequence[float] = (1.0,), rate: int = RATE) -> np.ndarray:
    """A tone, times each channel's factor, (C, S)."""
    return np.outer(channels, 0.4 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise of one channel."""
    return np.random.default_rng(seed).uniform(-0.4, 0.4, (1, round(RATE * seconds))).astype(np.float32)


GAP: Pieces = ((0.0, tone(440, 3)), (6.0, tone(1760, 3)))


@dataclass(frozen=True)
class Track:
    """One track of audio."""

    pieces: Pieces
    codec: str = "aac"
    rate: int = RATE
    is_default: bool | None = None


@dataclass(frozen=True)
class Video:
    """Pictures with a white upper half and a black left half of the lower one, ten a second."""

    codec: str = "libx264"
    start_s: float = 0.0
    seconds: float = 2.0
    size: tuple[int, int] = SIZE
    aspect: Fraction | None = None
    options: tuple[tuple[str, str], ...] = ()
    is_interlaced: bool = False


LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def write(
    path: Path,
    *tracks: Track,
    video: Video | None = None,
    format: str | None = None,
    options: dict[str, str] | None = None,
    damage: Callable[[int, bytes], bytes] = lambda number, data: data,
) -> Path:
    """Write a file; the bytes of each packet of audio, by their number, go through `damage`."""
    with av.open(str(path), "w", format=format, options=options or {}) as file:
        queue: list[tuple[float, av.Packet]] = []
        picture = file.add_stream(video.codec, rate=FPS, options=dict(video.options)) if video else None
        if picture is not None:
            picture.width, picture.height = video.size
            picture.pix_fmt = "yuvj420p" if video.codec == "mjpeg" else "yuv420p"
            if video.aspect:
                picture.codec_context.sample_aspect_ratio = video.aspect
            packets: list[av.Packet] = []
            for number in range(round(video.seconds * FPS)):
                frame = av.VideoFrame.from_ndarray(drawn(video, number), format="rgb24")
                frame.pts, frame.time_base = number + round(video.start_s * FPS), Fraction(1, FPS)
                packets += picture.encode(frame)
            packets += picture.encode(None)
            queue += [(float(packet.dts * packet.time_base), packet) for packet in packets]
        streams = []
        for track in tracks:
            channels = len(track.pieces[0][1])
            streams.append(file.add_stream(track.codec, rate=track.rate, layout=LAYOUTS[channels]))
            if track.codec.startswith("wma"):
                streams[-1].bit_rate = 128_000  # it takes no other way to say how well
            if track.is_default is not None:
                streams[-1].disposition = av.stream.Disposition(track.is_default)
        for track, stream in zip(tracks, streams, strict=True):
            for number, packet in enumerate(encoded(track, stream)):
                if (data := damage(number, bytes(packet))) != bytes(packet):
                    changed = av.Packet(data)
                    changed.stream, changed.time_base = stream, packet.time_base
                    changed.pts, changed.dts, changed.duration = packet.pts, packet.dts, packet.duration
                    packet = changed
                queue.append((float(packet.dts * packet.time_base), packet))
        for _, packet in sorted(queue, key=lambda entry: entry[0]):
            file.mux(packet)
    return path


def encoded(track: Track, stream: av.AudioStream) -> list[av.Packet]:
    """A track's packets, from frames whose times say where its pieces lie."""
    packets: list[av.Packet] = []
    for start_s, samples in track.pieces:
        for first in range(0, samples.shape[1], 960):
            part = np.ascontiguousarray(samples[:, first : first + 960])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=LAYOUTS[len(samples)])
            frame.sample_rate, frame.time_base = track.rate, Fraction(1, track.rate)
            frame.pts = round(start_s * track.rate) + first
            packets += stream.encode(frame)
    return packets + stream.encode(None)


def drawn(video: Video, number: int) -> np.ndarray:
    """A picture (h, w, 3): white above, black below on the left, and grey on the right that tells its number."""
    width, height = video.size
    picture = np.full((height, width, 3), 40 + 3 * number % 160, np.uint8)
    picture[: height // 2] = 255
    picture[height // 2 :, : width // 2] = 0
    if video.is_interlaced:
        picture[1::2] = 255 - picture[1::2]
    return picture


# ------------------------------------------------------------------------------------------------ what is written

MATRIX = {  # a, b, c, d of MP4's display matrix
    "turned by 90 degrees": (0, 1, -1, 0),
    "turned by 180 degrees": (-1, 0, 0, -1),
    "turned by 270 degrees": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "tilted by 30 degrees": (0.866, 0.5, -0.5, 0.866),
}
UNUSABLE = ("clip corrupt", "clip corrupt")
"""Why there is no audio, and why no video."""


@dataclass(frozen=True)
class Case:
    """A kind of file.

    Args:
        name: container, codecs, and what is odd.
        file: its name.
        write: makes it.
        audio: why it gives no audio (None: it does).
        video: why it gives no video.
        flags: what the audit says beside that.
    """

    name: str
    file: str
    write: Callable[[Path], object]
    audio: str | None = None
    video: str | None = None
    flags: tuple[str, ...] = ()


def cases() -> list[Case]:
    """All kinds of files; writing one of them takes a few hundredths of a second."""
    found: list[Case] = []

    def add(name: str, file: str, make: Callable[[Path], object], audio=None, video=None, flags=()) -> None:
        found.append(Case(name, file, make, audio, video, flags))

    def sound(name: str, file: str, codec: str, flags=(), rate: int = RATE, **options) -> None:
        pieces = [(0.0, tone(440, 2, rate=rate))]
        add(name, file, lambda p: write(p, Track(pieces, codec, rate), **options), None, "no picture", flags)

    def film(name: str, file: str, codecs: tuple[str, str], audio=None, video=None, flags=(), rate=RATE, **options):
        picture = options.pop("picture", Video(codecs[0]))
        pieces = options.pop("pieces", [(0.0, tone(440, 2, rate=rate))])
        tracks = options.pop("tracks", [Track(pieces, codecs[1], rate)])
        add(name, file, lambda p: write(p, *tracks, video=picture, **options), audio, video, flags)

    film("mp4, h264 + aac", "a.mp4", ("libx264", "aac"))
    film("mkv, h264 + aac", "a.mkv", ("libx264", "aac"))
    film("mkv, mpeg4 + opus", "b.mkv", ("mpeg4", "libopus"))
    film("webm, vp8 + opus", "a.webm", ("libvpx", "libopus"))
    film("mov, mpeg4 + pcm", "a.mov", ("mpeg4", "pcm_s16le"))
    film("avi, mjpeg + mp3", "a.avi", ("mjpeg", "libmp3lame"), flags=("variable_frame_rate",))
    film("ts, h264 + aac", "a.ts", ("libx264", "aac"))
    film("ts, mpeg2 + mp2", "b.ts", ("mpeg2video", "mp2"))
    film("mpg, mpeg1 + mp2", "a.mpg", ("mpeg1video", "mp2"), picture=Video("mpeg1video", options=FIXED_RATE))
    film("vob, mpeg2 + ac3", "a.vob", ("mpeg2video", "ac3"))
    film("flv, h264 + aac", "a.flv", ("libx264", "aac"))
    film("wmv, mpeg4 + wma", "a.wmv", ("mpeg4", "wmav2"))
    sound("m4a, alac", "a.m4a", "alac")
    sound("ogg, opus", "a.ogg", "libopus")
    sound("ogg, flac", "b.ogg", "flac")
    sound("wav, 16 bits", "a.wav", "pcm_s16le")
    sound("wav, float", "b.wav", "pcm_f32le")
    sound("wav, 8 kHz, A-law", "c.wav", "pcm_alaw", ("low_sample_rate",), rate=8000)
    sound("flac", "a.flac", "flac")
    sound("mp3", "a.mp3", "libmp3lame")
    sound("aac (ADTS)", "a.aac", "aac")
    sound("ac3", "a.ac3", "ac3")
    sound("aiff", "a.aiff", "pcm_s16be")
    sound("caf", "a.caf", "pcm_s16le")
    sound("w64", "a.w64", "pcm_s16le")

    for file, codec in (
        *(("gap.mp4", "aac"), ("gap.mkv", "aac"), ("gapp.mkv", "pcm_s16le"), ("gapm.mkv", "libmp3lame")),
        *(("gap.webm", "libopus"), ("gap.ts", "aac"), ("gap2.ts", "mp2"), ("gap.mpg", "mp2"), ("gap.vob", "ac3")),
        *(("gap.flv", "aac"), ("gap.ogg", "libopus"), ("gap.wmv", "wmav2"), ("gap.nut", "pcm_s16le")),
    ):
        rate = 44_100 if file == "gap.flv" else RATE
        pieces = [(at, tone(hz, 3, rate=rate)) for at, hz in ((0.0, 440), (6.0, 1760))]
        add(
            f"{file[-3:].strip('.')}, {codec}, a gap of 3 s",
            file,
            lambda p, c=codec, x=pieces, r=rate: write(p, Track(x, c, r)),
            None,
            "no picture",
            ("gap_in_audio",),
        )
    late = [(1.5, tone(440, 2))]
    both = ("late_start", "stream_lengths")
    for file in ("late.mp4", "late.mkv", "late.ts"):
        film(f"{file[-3:]}, audio starts late", file, ("libx264", "aac"), None, None, both, pieces=late)
    add(
        "mp4, audio alone starts late", "late.m4a", lambda p: write(p, Track(late)), None, "no picture", ("late_start",)
    )
    film("mkv, video starts late", "late2.mkv", ("libx264", "aac"), picture=Video(start_s=1.0), flags=both)
    add("ts, times overlap", "overlap.ts", lambda p: write_two(p, second_s=2.5), flags=("variable_frame_rate",))
    add("ts, two files in one", "two.ts", write_two, flags=("new_clock",))

    for file, codec in (
        ("bad.mkv", "aac"),
        ("bad.mp4", "aac"),
        ("badf.mkv", "flac"),
        ("badm.mkv", "libmp3lame"),
        ("bad.ts", "aac"),
        ("bad.wma", "wmav2"),
    ):
        add(
            f"{file[-3:]}, {codec}, a damaged packet",
            file,
            lambda p, c=codec: write(p, Track([(0.0, noise(6))], c), damage=one_bad),
            None,
            "no picture",
            ("damaged_packets", "gap_in_audio") if codec == "flac" else ("damaged_packets",),  # frames of 0.1 s
        )
    add("mkv, aac, all packets damaged", "worse.mkv", write_all_bad, "clip corrupt", "no picture",
        ("damaged_packets",))  # fmt: skip
    for file, codec in (("rate.aac", "aac"), ("rate.ts", "aac"), ("rate.mp3", "libmp3lame")):
        add(
            f"{file.split('.')[1]}, sample rate and channels change",
            file,
            lambda p, c=codec: write_changing(p, c),
            None,
            "no picture",
            ("format_change", *{"rate.ts": ("new_clock",), "rate.mp3": ("damaged_packets",)}.get(file, ())),
        )
    add("aac (ADTS), length guessed wrongly", "vbr.aac", lambda p: write(p, VARIED), None, "no picture")
    add("mp3, variable bit rate, no header", "vbr.mp3", write_bare_mp3, None, "no picture")
    odd = tone(440, 2)
    odd[0, 1000:1010] = np.nan
    for file, pieces, audio, flags in (
        ("nan.wav", odd, None, ("bad_samples",)),
        ("nothing.wav", np.nan * odd, "silent", ("bad_samples",)),
        ("scale.wav", 2**15 * tone(440, 2), None, ("bad_samples",)),
        ("loud.wav", 4 * tone(440, 2), None, ("bad_samples",)),
    ):
        name = {"nan": "some are no numbers", "nothing": "none is a number", "scale": "of 16 bits", "loud": "too loud"}
        make = lambda p, x=pieces: write_floats(p, x)  # noqa: E731
        add(f"wav, floats, {name[file[:-4]]}", file, make, audio, "no picture", flags)
    lifted, flat = tone(440, 2) / 2 + 0.4, np.full((1, 2 * RATE), 0.3)
    apart = tone(440, 2, (0.25, 0.25)) + np.array([[0.5], [-0.5]])
    for file, pieces, audio, flags in (
        ("lifted.wav", lifted, None, ("dc_offset",)),
        ("flat.wav", flat, "silent", ()),
        ("apart.wav", apart, None, ()),
    ):
        name = {"lifted": "lifted as a whole", "flat": "nothing but an offset", "apart": "channels lifted apart"}
        make = lambda p, x=pieces: write(p, Track([(0.0, x.astype(np.float32))], "pcm_s16le"))  # noqa: E731
        add(f"wav, {name[file[:-4]]}", file, make, audio, "no picture", flags)
    add("flac, no stated length", "length.flac", write_endless_flac, None, "no picture")
    add("wav, no stated length", "length.wav", write_endless_wav, None, "no picture")

    second = [Track([(0.0, tone(440, 2))], is_default=False), Track([(0.0, tone(1760, 2))], is_default=True)]
    for file in ("tracks.mkv", "tracks.mp4"):
        film(f"{file[-3:]}, two tracks", file, ("libx264", "aac"), flags=("several_tracks",), tracks=second)
    pictures = Video(seconds=0.1)
    film("mp4, a still picture", "still.mp4", ("libx264", "aac"), flags=("still_picture",), picture=pictures)
    film(
        "mp4, audio lasts longer",
        "longer.mp4",
        ("libx264", "aac"),
        flags=("stream_lengths",),
        pieces=[(0.0, tone(440, 4))],
    )
    add("mkv, two videos", "videos.mkv", write_videos, flags=("several_tracks",))
    inverted = [(0.0, tone(440, 2, (0.5, -1.0)))], [(0.0, tone(440, 2, (1.0, -1.0)))]
    for number, pieces in enumerate(inverted):
        for suffix, codec in (("wav", "pcm_s16le"), ("m4a", "aac")):
            flags = ("channels_cancel",) if number else ()
            name = f"{suffix}, one channel inverted" + ("" if number else ", of half the level")
            make = lambda p, x=pieces, c=codec: write(p, Track(x, c))  # noqa: E731
            add(name, f"inverted{number}.{suffix}", make, None, "no picture", flags)
    add("wav, 5.1", "six.wav", lambda p: write(p, Track([(0.0, tone(440, 2, (0.5,) * 6))], "pcm_s16le")), None,
        "no picture", ("surround_sound",))  # fmt: skip

    oblong = Video(aspect=Fraction(16, 11))
    film("mp4, oblong pixels", "aspect.mp4", ("libx264", "aac"), flags=("pixel_aspect",), picture=oblong)
    film("mkv, oblong pixels", "aspect.mkv", ("libx264", "aac"), flags=("pixel_aspect",), picture=oblong)
    for name, matrix in MATRIX.items():
        flags = ("tilted",) if "tilted" in name else ("mirrored",) if "mirrored" in name else ()
        add(
            f"mp4, {name}",
            f"{name.replace(' ', '-')}.mp4",
            lambda p, m=matrix: write_turned(p, m),
            flags=(*flags, "rotated"),
        )
    fields = Video(is_interlaced=True, options=(("x264-params", "tff=1"),))
    film("mp4, interlaced", "fields.mp4", ("libx264", "aac"), flags=("interlaced",), picture=fields)
    for file, codec in (("raw.h264", "libx264"), ("raw.hevc", "libx265"), ("raw.m2v", "mpeg2video")):
        quiet = (("x265-params", "log-level=none"),) if codec == "libx265" else ()
        add(f"{file[4:]}, no times", file, lambda p, v=Video(codec, options=quiet): write(p, video=v), "no sound", None,
            ("no_times",))  # fmt: skip
    for file, codec in (("cover.mp3", "libmp3lame"), ("cover.mp4", "aac"), ("cover.flac", "flac")):
        make = lambda p, c=codec: write_cover(p, c)  # noqa: E731
        add(f"{file[6:]}, attached cover", file, make, None, "no picture")

    add(
        "mp4, cut off at 95 %",
        "cut95.mp4",
        lambda p: write_cut(p, 0.8, "faststart"),
        flags=("cut_off", "damaged_packets"),
    )
    add("mp4, cut off at 30 %", "cut30.mp4", lambda p: write_cut(p, 0.3, "faststart"), *UNUSABLE,
        ("damaged_packets",))  # fmt: skip
    add("mp4, cut off before its index", "index.mp4", lambda p: write_cut(p, 0.8, ""), *UNUSABLE)
    add("wav, cut off at 30 %", "cut30.wav", write_cut_wav, None, "no picture", ("cut_off",))
    add("mp3, cut off at 40 %", "cut40.mp3", write_cut_mp3, None, "no picture", ("cut_off",))
    add(
        "avi, cut off at 40 %",
        "cut40.avi",
        write_cut_avi,
        None,
        None,
        ("cut_off", "damaged_packets", "variable_frame_rate"),
    )
    add("ts, begins before zero", "early.ts", write_early, None, "no picture")
    late_cut = Video(start_s=100.0)
    film("mkv, cut out of a longer one", "middle.mkv", ("libx264", "aac"), tracks=[Track([(100.0, tone(440, 2))])],
        picture=late_cut)  # fmt: skip
    film("mp4 with the name of an mkv", "name.mkv", ("libx264", "aac"), flags=("wrong_extension",), format="mp4")
    add("text with the name of an mp4", "text.mp4", lambda p: p.write_text("Not a clip. " * 99), *UNUSABLE)
    add("empty file", "empty.mp4", lambda p: p.touch(), *UNUSABLE)
    for file, text in (
        ("list.m3u8", "#EXTM3U\n#EXTINF:1,\na.ts\n"),
        ("list.mp4", "ffconcat version 1.0\nfile a.mp4\n"),
    ):
        add(f"{file[5:]}, a playlist", file, lambda p, x=text: p.write_text(x), "playlist", "playlist")
    return found


FIXED_RATE = (("strict", "-2"),)
VARIED = Track([(0.0, np.concatenate([0.01 * tone(440, 20), noise(1)], axis=1))])


def one_bad(number: int, data: bytes) -> bytes:
    return b"\xff\x00\xaa\x55" * 20 if number == 30 else data


def write_all_bad(path: Path) -> None:
    rng = np.random.default_rng(0)
    write(path, Track([(0.0, noise(2))], "flac"), damage=lambda number, data: rng.bytes(len(data)))


def write_two(path: Path, second_s: float = 0.0) -> None:
    parts = [path.with_suffix(f".{hz}.ts") for hz in (440, 1760)]
    for part, hz, start_s in zip(parts, (440, 1760), (0.0, second_s), strict=True):
        write(part, Track([(start_s, tone(hz, 3))]), video=Video(start_s=start_s, seconds=3))
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def write_changing(path: Path, codec: str) -> None:
    parts = [path.with_name(f"part{n}{path.suffix}") for n in range(2)]
    write(parts[0], Track([(0.0, tone(440, 3, (1, 1)))], codec))
    write(parts[1], Track([(0.0, tone(1760, 3, rate=44_100))], codec, 44_100))
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def write_bare_mp3(path: Path) -> None:
    write(path, Track(VARIED.pieces, "libmp3lame"), options={"write_xing": "0", "id3v2_version": "0"})


def write_floats(path: Path, samples: np.ndarray) -> None:
    head = struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 3, 1, RATE, 4 * RATE, 4, 32, b"data", samples.size * 4)
    data = samples.astype("<f4").tobytes()
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(head) + len(data)) + b"WAVE" + head + data)


def write_endless_flac(path: Path) -> None:
    write(path, Track([(0.0, tone(440, 2))], "flac"))
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the number of samples, 36 bits, is zero
    data[22:26] = bytes(4)
    path.write_bytes(data)


def write_endless_wav(path: Path) -> None:
    write(path, Track([(0.0, tone(440, 2))], "pcm_s16le"))
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff" * 4
    path.write_bytes(data)


def write_turned(path: Path, matrix: tuple[float, float, float, float]) -> None:
    write(path, Track([(0.0, tone(440, 2))]), video=Video())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 2**16) for value in matrix)
    data[at : at + 36] = b"".join((n & 0xFFFFFFFF).to_bytes(4, "big") for n in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(data)


def write_cover(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as file:
        sound = file.add_stream(codec, rate=RATE, layout="mono")
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
        file.mux(cover.encode(frame) + cover.encode(None))
        file.mux(encoded(Track([(0.0, tone(440, 2))], codec), sound))


def write_cut(path: Path, share: float, flags: str) -> None:
    write(path, Track([(0.0, noise(6))]), video=Video(seconds=6), options={"movflags": flags} if flags else {})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def write_cut_wav(path: Path) -> None:
    write(path, Track([(0.0, tone(440, 6))], "pcm_s16le"))
    path.write_bytes(path.read_bytes()[: int(0.3 * path.stat().st_size)])


def write_cut_mp3(path: Path) -> None:
    write(path, Track([(0.0, tone(440, 6))], "libmp3lame"))
    path.write_bytes(path.read_bytes()[: int(0.4 * path.stat().st_size)])


def write_cut_avi(path: Path) -> None:
    write(path, Track([(0.0, noise(6))], "libmp3lame"), video=Video("mjpeg", seconds=6))
    path.write_bytes(path.read_bytes()[: int(0.4 * path.stat().st_size)])


def write_videos(path: Path) -> None:
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("mpeg4", rate=FPS) for _ in range(2)]
        sound = file.add_stream("aac", rate=RATE, layout="mono")
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(2 * FPS):
            for stream in streams:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(Video(), number), format="rgb24")))
        for stream in streams:
            file.mux(stream.encode(None))
        file.mux(encoded(Track([(0.0, tone(440, 2))]), sound))


def write_early(path: Path) -> None:
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as file:
        stream = file.add_stream("mp2", rate=RATE, layout="mono")
        for packet in encoded(Track([(0.0, tone(440, 1)), (1.0, tone(1760, 1))], "mp2"), stream):
            packet.pts, packet.dts = packet.pts - RATE, packet.dts - RATE
            file.mux(packet)


# ------------------------------------------------------------------------------------------------ the table


def outcome(reason: str | None) -> str:
    return "used" if reason is None else reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="msenc-media-") as folder:
        for case in cases():
            path = Path(folder) / case.file
            case.write(path)
            facts = probe_clip(path)
            flags = ", ".join(flag for flag, _ in facts.notes)
            rows.append([case.name, outcome(facts.audio), outcome(facts.video), flags])
            path.unlink()
    print_table("What becomes of a file", ("container, codecs, oddity", "audio", "video", "flagged"), rows)
    write_json(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
