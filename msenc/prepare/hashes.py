"""Clips -> hashes of their content; a clip of the size and time that are known is not read again."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from msenc.data.location import hash_file
from msenc.data.manifest import write_text
from msenc.types import MsencError

CACHE = "clip-hashes.json"


def hash_clips(root: Path, clips: Iterable[str | None], folder: Path, num_workers: int) -> dict[str, str | None]:
    """Hash clips, and keep what is found in `folder`.

    Args:
        root: folder that the clips' paths start from.
        clips: paths below it, as often as they come; None for what has no clip.
        folder: of the prepared data; made where it is missing.
        num_workers: threads, at least one.

    Returns:
        Clip -> its sha256, or None where there is no such file.

    Raises:
        MsencError: a clip may not be read, or the disk refuses.
    """
    known = _read_cache(folder / CACHE)
    stamps = {clip: _stamp(root / clip) for clip in dict.fromkeys(clips) if clip is not None}
    found = {c: known[c][2] for c, stamp in stamps.items() if stamp and known.get(c, [])[:2] == stamp}
    new = [clip for clip, stamp in stamps.items() if stamp and clip not in found]
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:  # hashing leaves the interpreter's lock
        found |= zip(new, pool.map(lambda clip: _hash(root / clip), new), strict=True)
    lines = {clip: [*stamps[clip], found[clip]] for clip in stamps if clip in found}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MsencError(f"{folder}: cannot be made ({error.strerror}). Free space or permissions there.") from error
    if lines != known:
        write_text(folder / CACHE, json.dumps(lines, ensure_ascii=False, indent=0) + "\n")
    return {clip: found.get(clip) for clip in stamps}


def _stamp(path: Path) -> list[int] | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise MsencError(f"{path}: cannot be read ({error.strerror}). Make the dataset's files readable.") from error


def _read_cache(path: Path) -> dict[str, list]:
    with suppress(OSError, ValueError, AttributeError, TypeError):  # damaged: all clips are read again
        return {c: v for c, v in json.loads(path.read_text(encoding="utf-8")).items() if len(v) == 3}
    return {}
