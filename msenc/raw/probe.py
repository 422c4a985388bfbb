"""Clips -> what is in them, on several processes; what is known of a clip that did not change is not probed again."""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

from msenc.files import inside, parse_json, write_text
from msenc.raw.container import VERSION, Findings, MediaError, split_part
from msenc.raw.media import ClipProperties, read_audio, read_frames, read_properties
from msenc.store.location import hash_file
from msenc.types import MsencError
from msenc.work.pool import pool_of
from msenc.work.progress import progress_bar

PROBE_VERSION = [3, VERSION]
"""Of what `probe_clip` finds, and of how it decodes; another one makes every cached clip unknown."""

SAMPLE_RATE = 16000
PROBE_FPS = 0.2  # every picture is decoded, few are kept
DIED = "decoder died"
MAX_DEVIATION_S = 0.5
MAX_DEVIATION_SHARE = 0.1


@dataclass(frozen=True)
class ClipFacts:
    """What is in a clip.

    Args:
        audio: why it gives no sound (`MediaError.reason`), or None where it does.
        video: why it gives no picture, or None where it does.
        duration_s: of the decoded sound, or as the header says where there is none; None where unknown.
        notes: names of `msenc.store.flags.FLAGS` that are no reason to drop it, with what was found.
        sha256: of the file; empty where there is none, and for a part of a recording.
    """

    audio: str | None
    video: str | None
    duration_s: float | None = None
    notes: tuple[tuple[str, str], ...] = ()
    sha256: str = ""


class _Line(TypedDict):
    version: list[int]
    clip: str
    stamp: tuple[int, int]
    facts: ClipFacts


Probe = Callable[[Path], ClipFacts]


def probe_clip(path: Path) -> ClipFacts:
    """Decode a clip as preparation does, and look at its headers.

    Raises:
        MsencError: the file may not be read.
    """
    reasons: dict[str, str | None] = {"audio": None, "video": None}
    duration_s = None
    of_audio, of_video = Findings(), Findings()
    try:
        duration_s = round(len(read_audio(path, SAMPLE_RATE, findings=of_audio)) / SAMPLE_RATE, 3)
    except MediaError as error:
        reasons["audio"] = error.reason
    try:
        read_frames(path, PROBE_FPS, findings=of_video)
    except MediaError as error:
        reasons["video"] = error.reason
    found: dict[str, list[str]] = {}
    for flag, what in (*of_audio.notes.items(), *of_video.notes.items()):
        found.setdefault(flag, []).append(what)
    notes = [(flag, "; ".join(what)) for flag, what in found.items()]
    name, span = split_part(str(path))
    path, sha256 = Path(name), _hash(Path(name)) if span is None else ""
    try:
        properties = _properties(path, _stamp(path))
    except (MediaError, OSError):
        return ClipFacts(**reasons, duration_s=duration_s, sha256=sha256)
    if properties.channels > 2:
        notes.append(("surround_sound", f"{properties.channels} channels"))
    if 0 < properties.sample_rate < SAMPLE_RATE:
        notes.append(("low_sample_rate", f"{properties.sample_rate} Hz"))
    tracks = {"audio": properties.tracks, "video": properties.videos}
    if several := [f"{num} of {stream}" for stream, num in tracks.items() if num > 1]:
        notes.append(("several_tracks", ", ".join(several)))
    if properties.pictures == 1:
        notes.append(("still_picture", ""))
    elif span is None and duration_s is not None and deviates(duration_s, properties.video_end_s):
        notes.append(("stream_lengths", f"audio {duration_s:.2f} s, video {properties.video_end_s:.2f} s"))
    if properties.rotation:
        notes.append(("rotated", f"{properties.rotation} degrees"))
    if properties.is_variable:
        notes.append(("variable_frame_rate", ""))
    if not {path.suffix[1:].lower(), *_OTHER_NAMES.get(path.suffix[1:].lower(), ())} & {*properties.formats}:
        notes.append(("wrong_extension", properties.formats[0]))
    if duration_s is None and span is None and properties.duration_s is not None:
        duration_s = round(properties.duration_s, 3)
    return ClipFacts(**reasons, duration_s=duration_s, notes=tuple(notes), sha256=sha256)


def deviates(clip_s: float | None, row_s: float | None) -> bool:
    """Whether two lengths, of a clip and its row or of its streams, differ by more than 0.5 s and more than a tenth."""
    if clip_s is None or row_s is None:
        return False
    return abs(clip_s - row_s) > max(MAX_DEVIATION_S, MAX_DEVIATION_SHARE * row_s)


@lru_cache(maxsize=64)
def _properties(path: Path, stamp: tuple[int, int]) -> ClipProperties:
    """Of a file; kept, since all parts of a recording share it, and its packets are read to the last."""
    return read_properties(path)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


_OTHER_NAMES = {
    **{"mkv": ("matroska",), "m4v": ("mp4",), "wmv": ("asf",), "wma": ("asf",), "opus": ("ogg",), "oga": ("ogg",)},
    **{"mpg": ("mpeg",), "vob": ("mpeg",), "ts": ("mpegts",), "mts": ("mpegts",), "m2ts": ("mpegts",)},
    **{"aif": ("aiff",), "mp2": ("mp3",), "m2v": ("mpegvideo",), "m1v": ("mpegvideo",), "sph": ("nistsphere",)},
}
"""File extension -> FFmpeg's name of the format, where that is another word."""


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError:  # no such file, or one that the disk does not give back: the reasons say so
        return ""


def probe_clips(
    root: Path, clips: Sequence[str], num_workers: int, cache: Path, probe: Probe = probe_clip
) -> dict[str, ClipFacts]:
    """Facts of clips, in their order.

    What is found is added to `cache` line by line, so that a kill loses at most the clips in hand. A clip whose size
    and modification time are those of its line is not read again.

    Args:
        root: folder that the clips' paths start from.
        clips: paths below it; each need not exist.
        num_workers: processes; 0 works in this one, where a clip that kills its process ends the whole.
        cache: a file of JSON lines, made where it is missing.
        probe: looks at one clip; picklable.

    Raises:
        MsencError: a clip may not be read, or the disk refuses.
    """
    known = _read_cache(cache)
    facts: dict[str, ClipFacts] = {}
    stamps: dict[str, list[int]] = {}
    for clip in clips:
        try:
            stamps[clip] = [*_stamp(root / split_part(clip)[0])]
        except OSError:
            facts[clip] = probe_clip(root / clip)  # which tells what is wrong, without decoding
            continue
        if clip in known and known[clip][0] == stamps[clip]:
            facts[clip] = known[clip][1]
    new = [clip for clip in stamps if clip not in facts]
    if new:
        try:
            with (
                inside(cache.parent, cache.name).open("a", encoding="utf-8") as file,
                progress_bar("clips") as progress,
            ):
                bar = progress.add_task(f"probing clips ({len(stamps) - len(new):,} known)", total=len(new))
                for clip, found in _probe(root, new, num_workers, probe):
                    facts[clip] = found
                    file.write(_line(clip, stamps[clip], found))
                    file.flush()
                    progress.advance(bar)
        except OSError as error:
            raise MsencError(
                f"{cache}: cannot be written ({error.strerror}). Free space or permissions there."
            ) from error
        write_text(cache, "".join(_line(clip, stamp, facts[clip]) for clip, stamp in stamps.items()))
    return {clip: facts[clip] for clip in clips}


def _probe(root: Path, clips: Sequence[str], num_workers: int, probe: Probe) -> Iterator[tuple[str, ClipFacts]]:
    if num_workers == 0:
        yield from ((clip, probe(root / clip)) for clip in clips)
        return
    waiting = deque(clips)
    while waiting:
        # Nothing says which of the clips in hand killed the worker; alone in a process, the one that did does so again.
        for clip in (yield from _probe_until_death(root, waiting, num_workers, probe)):
            with pool_of(1) as pool:
                try:
                    yield clip, pool.submit(probe, root / clip).result()
                except BrokenProcessPool:
                    yield clip, ClipFacts(DIED, DIED)


def _probe_until_death(
    root: Path, waiting: deque[str], num_workers: int, probe: Probe
) -> Generator[tuple[str, ClipFacts], None, list[str]]:
    """Probe until nothing waits, or a worker dies; then return the clips that were in hand."""
    in_hand: deque = deque()
    with pool_of(num_workers) as pool:
        try:
            while waiting or in_hand:
                while waiting and len(in_hand) < 4 * num_workers:
                    in_hand.append((waiting[0], pool.submit(probe, root / waiting[0])))
                    waiting.popleft()
                clip, future = in_hand[0]
                found = future.result()
                in_hand.popleft()
                yield clip, found
        except BrokenProcessPool:
            lost = []
            for clip, future in in_hand:
                if future.exception() is None:
                    yield clip, future.result()
                else:
                    lost.append(clip)
            return lost
    return []


def _line(clip: str, stamp: list[int], facts: ClipFacts) -> str:
    value = {"version": PROBE_VERSION, "clip": clip, "stamp": stamp, "facts": asdict(facts)}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _read_cache(path: Path) -> dict[str, tuple[list[int], ClipFacts]]:
    """What is known; a line that a kill cut off, or that another version wrote, is not."""
    known = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            value: dict[str, Any] = parse_json(line, path, _Line)
            if value["version"] == PROBE_VERSION and value["facts"]["audio"] != DIED:  # memory may suffice this time
                notes = tuple((flag, found) for flag, found in value["facts"]["notes"])
                known[value["clip"]] = (value["stamp"], ClipFacts(**{**value["facts"], "notes": notes}))
        except MsencError:
            continue
    return known
