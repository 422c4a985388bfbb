"""A clip's name -> its file, opened and safe to decode: which formats, which streams, which clock, which limits.

FFmpeg opens whatever looks like media, playlists of other files among it, and believes what headers say. Everything
that decodes goes through `open_clip` and `read_packets`, so that what holds for one way into a clip holds for all.
"""

import os
import re
import struct
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from msenc.files.kinds import is_below
from msenc.raw.encoding import repair_encoding
from msenc.types import MsencError, needing

VERSION = 4
"""Of how clips are decoded; raised whenever an equal clip gives other samples or frames, or is rejected otherwise."""

SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".vob", ".ts", ".flv", ".wmv"),
    *(".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus"),
)
"""File names that are taken for media where nothing names the files; FFmpeg itself looks at the content."""

FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "flv", "asf", "ogg", "mxf", "nut", "rm", "dv", "gxf", "ivf", "gif"),
    *("wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "loas", "ac3", "eac3", "dts", "amr", "ape", "wv"),
    *("tta", "mpc", "mpc8", "nistsphere", "voc", "dsf", "qcp", "shn", "tak"),
    *("h264", "hevc", "m4v", "mpegvideo", "h261", "h263", "mjpeg", "obu", "vc1"),
)
"""FFmpeg's demuxers that read one file which holds its media itself. Others open more files, devices or the network."""
_RAW_VIDEO = ("h264", "hevc", "m4v", "mpegvideo", "h261", "h263", "mjpeg", "obu", "vc1")
_RAW_AUDIO = ("aac", "mp3", "loas", "ac3", "eac3", "dts", "flac")
# Formats whose headers state a length; elsewhere FFmpeg guesses it from the bit rate or the last time it finds.
_STATED = ("mov", "matroska", "avi", "asf", "w64", "aiff", "au", "caf", "flac", "ape", "wv", "tta", "mxf")

_PLAYLIST_SUFFIXES = (
    *(".m3u", ".m3u8", ".pls", ".ffconcat", ".mpd", ".sdp", ".asx", ".wax", ".wvx", ".ram", ".smil", ".xspf", ".ism"),
    *(".cue", ".strm"),
)
_PLAYLIST_HEADS = (b"#extm3u", b"ffconcat", b"[playlist]", b"[reference]", b"<asx", b"<smil", b"v=0", b"rtsptext")
_PLAYLIST_ELEMENTS = (b"<mpd", b"<smoothstreamingmedia", b"<playlist", b"<smil")

MAX_CLIP_S = 4 * 3600.0
"""Longest clip, or part of a recording, that is decoded; what asks for less says so."""
MAX_PIXELS = 8192 * 8192
MAX_FRAME_BYTES = 2**33
SAMPLE_RATES = (1000, 768_000)

# An AAC or MP3 frame more or less is rounding of a container's clock; more is something that is missing.
GAP_S = 0.05
# Times that go back, or on, by more are those of another clock: files in one, or a recorder that began anew.
MAX_OVERLAP_S = 1.0
MAX_GAP_S = 3600.0
# A clock that starts within this began at zero, and what starts later starts late; other clocks begin anywhere.
MAX_LATE_S = 60.0
# What stands before zero by less is an encoder's delay, which nobody hears; by more, times that began too early.
MAX_EARLY_S = 0.5
MAX_READ_ERRORS = 8
MAX_HEADER = 2**16
# Programs that do not know how many bytes follow write one of the largest numbers.
UNKNOWN_WAV_BYTES = 0x7FFFF000


class MediaError(Exception):
    """A clip that lacks a stream.

    Args:
        reason: one of `msenc.raw.audit.REASON_FLAGS`: ``clip missing``, ``clip corrupt``, ``no sound``, ...
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


Span = tuple[float, float | None]
"""Seconds of a longer recording, by its own clock (`origin_of`); None is its end."""

_PART = re.compile(r"(.+)#(?=[tc])(?:t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?))?(&?track=\d+)?(&?channel=\d+)?", re.DOTALL)


def part_of(file: str, start_s: float, end_s: float) -> str:
    """Name a part of a recording as a clip, in the way of W3C's Media Fragments; what it says of tracks stays.

    Example:
        >>> part_of("talks/1.mp4", 12.5, 14)
        'talks/1.mp4#t=12.500,14.000'
        >>> split_part("talks/1.mp4#t=12.500,14.000")
        ('talks/1.mp4', (12.5, 14.0))
        >>> part_of("talks/1.wav#channel=2", 0, 1)
        'talks/1.wav#t=0.000,1.000&channel=2'
    """
    name, _ = split_part(file)
    return f"{name}#t={start_s:.3f},{end_s:.3f}" + "".join(f"&{key}={n}" for key, n in tracks_of(file).items())


def split_part(clip: str) -> tuple[str, Span | None]:
    """A clip's file, and which part of it the clip is; None where it is the whole file."""
    match = _PART.fullmatch(clip)
    if match is None:
        return clip, None
    return match[1], None if match[2] is None else (float(match[2]), float(match[3]))


def tracks_of(clip: str) -> dict[str, int]:
    """Which ``track`` of a file's audio a clip's name asks for, and which ``channel`` of it, both from 1 on."""
    match = _PART.fullmatch(clip)
    named = [part.lstrip("&").split("=") for part in match.groups()[3:] if part] if match else []
    return {key: int(number) for key, number in named}


def with_track(clip: str, track: int) -> str:
    """Name the same clip with another track of its file's audio.

    Example:
        >>> with_track("a.mkv", 2), with_track("a.mkv#t=0.000,1.000&channel=1", 2)
        ('a.mkv#track=2', 'a.mkv#t=0.000,1.000&track=2&channel=1')
    """
    file, span = split_part(clip)
    channel = tracks_of(clip).get("channel")
    parts = [] if span is None else [f"t={span[0]:.3f},{span[1]:.3f}"]
    parts += [f"track={track}"] + ([] if channel is None else [f"channel={channel}"])
    return f"{file}#{'&'.join(parts)}"


class StoredNames:
    """Finds files whose names the disk spells in another way than a table.

    ``ë`` may be one sign or two there, or mangled in the table; Windows parts folders by backslashes, and does not tell
    ``A`` from ``a``.

    Args:
        root: folder that the names start from.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._folders: dict[tuple[str, Callable[[str], str]], dict[str, list[str]]] = {}

    def find(self, file: str) -> list[str]:
        """The names below the root that the text is; of several none is the text itself. The text, where none is."""
        repaired = repair_encoding(file)
        spellings = [*dict.fromkeys((file, repaired, file.replace("\\", "/"), repaired.replace("\\", "/")))]
        spellings = [spelling for spelling in spellings if is_below(spelling)]
        if there := [spelling for spelling in spellings if _exists(self.root / spelling)]:
            return there[:1]
        keys = (_composed, _caseless)
        return next((found for key in keys for s in spellings if (found := self._find(s, key))), [file])

    def _find(self, file: str, key: Callable[[str], str]) -> list[str]:
        *folders, last = file.split("/")
        found = [""]
        for part in (*folders, last):
            wanted = key(part)
            found = [f"{folder}{name}/" for folder in found for name in self._listed(folder, key).get(wanted, [])]
        return [name.removesuffix("/") for name in found]

    def _listed(self, folder: str, key: Callable[[str], str]) -> dict[str, list[str]]:
        """What a key makes of the names of a folder -> those names."""
        if (folder, key) not in self._folders:
            names: dict[str, list[str]] = {}
            with suppress(OSError):
                for path in sorted((self.root / folder).iterdir()):
                    names.setdefault(key(path.name), []).append(path.name)
            self._folders[folder, key] = names
        return self._folders[folder, key]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def is_same_name(name: str, other: str) -> bool:
    """Whether two names of a file differ at most in how letters are composed or mangled, and folders parted."""
    first, second = (_composed(repair_encoding(n)).replace("\\", "/") for n in (name, other))
    return first == second


def shown(name: str) -> str:
    r"""A name that the disk has, as a file of text may hold it: bytes that are no UTF-8 are spelled out.

    Example:
        >>> shown("caf\udce9.wav"), shown("café.wav")
        ('caf\\xe9.wav', 'café.wav')
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


@dataclass
class Findings:
    """What decoding met with in a clip that it gave all the same.

    Args:
        notes: name of one of `msenc.store.flags.FLAGS` -> what was found.
        damaged: packets that did not decode.
    """

    notes: dict[str, str] = field(default_factory=dict)
    damaged: int = 0

    def damage(self) -> None:
        """One more packet did not decode."""
        self.damaged += 1
        self.notes["damaged_packets"] = f"{self.damaged} packets"


@contextmanager
def open_clip(path: Path) -> Iterator[Any]:
    """The clip's container, opened by FFmpeg for one of `FORMATS` and for nothing but this file.

    Whatever is raised while it is open, but for what msenc raises itself, is a corrupt clip: decoders answer damage
    with any error there is, "operation not permitted" and "out of memory" among them.

    Raises:
        MediaError: there is no such clip, it is a playlist, or FFmpeg can make nothing of it.
        MsencError: the file may not be read.
    """
    av = load_av()
    path = Path(path)
    try:
        if not path.is_file():
            raise MediaError("clip missing")
        with path.open("rb") as file:
            head = file.read(1024)
    except PermissionError as error:
        raise MsencError(f"{path}: no permission to read this clip. Make the dataset's files readable.") from error
    except OSError as error:  # a name that is too long, or a disk that does not give it back
        raise MediaError("clip corrupt") from error
    if _is_playlist(path, head):
        raise MediaError("playlist")
    options = {
        "format_whitelist": ",".join(FORMATS),
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
    }
    try:
        # titles and the like may be in any encoding; nothing here reads them
        with av.open(f"file:{path}", metadata_errors="replace", options=options) as container:
            yield container
    except (MediaError, MsencError):
        raise
    except Exception as error:
        raise MediaError("clip corrupt") from error


def _is_playlist(path: Path, head: bytes) -> bool:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if path.suffix.lower() in _PLAYLIST_SUFFIXES or text.startswith(_PLAYLIST_HEADS):
        return True
    return text.startswith(b"<") and any(element in text for element in _PLAYLIST_ELEMENTS)


def choose_stream(streams: list[Any], lacking: str, track: int | None = None) -> Any:
    """The stream of that number, from 1 on; else the one that is marked as the default one, else the first.

    Raises:
        MediaError: `lacking`, where there is none; or nothing decodes it.
    """
    if not streams or not 1 <= (track or 1) <= len(streams):
        raise MediaError(lacking if not streams else "no such track")
    default = next((s for s in streams if s.disposition & s.disposition.default), streams[0])
    stream = streams[track - 1] if track else default
    if stream.codec_context is None:
        raise MediaError("clip corrupt")  # nothing decodes what its header names
    if stream.type == "video":
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def moving(container: Any) -> list[Any]:
    """The streams of video; a cover that is attached to an audio file is none."""
    return [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]


def origin_of(container: Any) -> float:
    """Where the file's own clock, in seconds, has its zero.

    Of an MP4 or Matroska file that is zero, so that what starts late is late; a transport or program stream, and a
    recording that was cut out of a longer one, begins anywhere, and counts from its first frame or sample; so does what
    begins well before zero.
    """
    start_s = (container.start_time or 0) / load_av().time_base
    if start_s < -MAX_EARLY_S:
        return start_s
    return max(start_s, 0.0) if _has_loose_clock(container) or start_s > MAX_LATE_S else 0.0


def may_jump(container: Any) -> bool:
    """Whether files of this format hold times that begin anew: a seek by time then leads anywhere."""
    return _has_loose_clock(container) or container.format.name == "flv"


def _has_loose_clock(container: Any) -> bool:
    return bool(container.format.flags & load_av().format.Flags.ts_discont.value)


def has_times(container: Any) -> bool:
    """Whether the format stores times at all; raw streams have none, and FFmpeg makes them up by the first rate."""
    return container.format.name not in (*_RAW_VIDEO, *_RAW_AUDIO)


def stated_length(container: Any, stream: Any, first_s: float) -> tuple[float | None, bool]:
    """Seconds that a header gives a stream which begins at `first_s`, and whether it is to be relied on.

    What FFmpeg guesses is none.
    """
    is_stated = bool({*container.format.name.split(",")} & {*_STATED})
    if (measure := _MEASURES.get(container.format.name)) is not None:
        with Path(container.name.removeprefix("file:")).open("rb") as file:
            length_s = measure(file.read(MAX_HEADER))
        if not is_stated or (length_s or 0.0) > float((stream.duration or 0) * stream.time_base):
            return length_s, False
    if not is_stated:
        return None, False
    if stream.duration:
        return float(stream.duration * stream.time_base), True
    # Matroska: a tag of the track with its end, which some programs copy along with a part of it
    match = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    return (int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) - first_s if match else None), False


def _wav_length(head: bytes) -> float | None:
    """Seconds that a WAV file's header gives its samples; None where it does not know, as while it is streamed."""
    at, byte_rate = 12, 0
    while head[:4] == b"RIFF" and at + 8 <= len(head):
        name, size = struct.unpack_from("<4sI", head, at)
        if name == b"fmt " and at + 20 <= len(head):
            (byte_rate,) = struct.unpack_from("<I", head, at + 16)
        if name == b"data":
            return size / byte_rate if byte_rate and 0 < size < UNKNOWN_WAV_BYTES else None
        at += 8 + size + size % 2
    return None


def _avi_length(head: bytes) -> float | None:
    """Seconds that an AVI file's header gives its pictures; of what is longer than 1 GB, of its first part."""
    at = head.find(b"avih")
    if at < 0 or at + 28 > len(head):
        return None
    (picture_us,), (num,) = struct.unpack_from("<I", head, at + 8), struct.unpack_from("<I", head, at + 24)
    return picture_us * num / 1e6 or None


_FIRST_FRAME = re.compile(rb"\xff[\xe2-\xff].{10,40}?(?:Xing|Info)...(.)(....)", re.DOTALL)
"""Of an MP3 file: its header, what else a frame has, flags, and the number of frames."""


def _mp3_length(head: bytes) -> float | None:
    """Seconds that the first frame of an MP3 file gives it, where it states the number of frames (Xing, LAME).

    Behind a cover that is larger than what was read nothing is known.
    """
    at = 0
    if head[:3] == b"ID3" and len(head) > 10:
        at = 10 + sum((byte & 127) << 7 * (3 - place) for place, byte in enumerate(head[6:10]))
    match = _FIRST_FRAME.match(head, at)
    if match is None or not match[1][0] & 1:
        return None
    version, rate = head[at + 1] >> 3 & 3, head[at + 2] >> 2 & 3
    if version == 1 or rate == 3:
        return None
    halvings = {3: 0, 2: 1, 0: 2}[version]
    samples = 1152 if version == 3 else 576
    return int.from_bytes(match[2], "big") * samples / ((44_100, 48_000, 32_000)[rate] >> halvings)


_MEASURES = {"wav": _wav_length, "avi": _avi_length, "mp3": _mp3_length}
"""Formats whose length FFmpeg takes from how long the file is, or does where it was cut off -> what the header says."""


def read_packets(container: Any, stream: Any, findings: Findings) -> Iterator[Any]:
    """The stream's packets, with times that do not begin anew; the last one is None or empty, and flushes the decoder.

    A place that the demuxer cannot read is passed over, unless there are more of them in a row.
    """
    tick_s = float(stream.time_base)
    expected_s, shift = None, 0  # when the next packet is decoded; ticks that its clock is behind
    errors = 0
    while errors < MAX_READ_ERRORS:
        try:
            for packet in container.demux(stream):
                errors = 0
                at = packet.pts if packet.dts is None else packet.dts
                if at is not None:
                    jump_s = 0.0 if expected_s is None else (at + shift) * tick_s - expected_s
                    if not -MAX_OVERLAP_S <= jump_s <= MAX_GAP_S:
                        shift -= round(jump_s / tick_s)
                        findings.notes["new_clock"] = f"at {expected_s:.2f} s"
                    if shift:
                        packet.pts = None if packet.pts is None else packet.pts + shift
                        packet.dts = None if packet.dts is None else packet.dts + shift
                    expected_s = (at + shift + (packet.duration or 0)) * tick_s
                yield packet
            return
        except load_av().error.FFmpegError:
            errors += 1
            findings.damage()
    yield None


def decode_packets(stream: Any, packets: Iterator[Any], findings: Findings) -> Iterator[Any]:
    """Frames of packets; one that does not decode costs itself."""
    av = load_av()
    for packet in packets:
        try:
            yield from stream.codec_context.decode(packet)
        except av.error.EOFError:  # of a decoder that was flushed
            continue
        except av.error.FFmpegError:
            findings.damage()


def load_av() -> ModuleType:
    """PyAV's module.

    Raises:
        MsencError: it is not installed.
    """
    with needing("reading and writing clips", "media"):
        import av
    return av
