"""Clips -> hashes of their content; a clip of the size and time that are known is not read again."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from msenc.files import read_json, write_text
from msenc.files.kinds import Count, Sha256
from msenc.raw.container import split_part
from msenc.store.location import hash_file
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
        Clip -> its sha256, or None where there is no such file; of a part of a recording, the recording's and which
        part it is.

    Raises:
        MsencError: a clip may not be read, or the disk refuses.
    """
    known = _read_cache(folder / CACHE)
    file_of = {clip: split_part(clip)[0] for clip in clips if clip is not None}
    stamps = {file: _stamp(root / file) for file in dict.fromkeys(file_of.values())}
    found = {f: known[f][2] for f, stamp in stamps.items() if stamp and known.get(f, [])[:2] == stamp}
    new = [file for file, stamp in stamps.items() if stamp and file not in found]
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:  # hashing leaves the interpreter's lock
        found |= zip(new, pool.map(lambda file: _hash(root / file), new), strict=True)
    lines = {file: [*stamps[file], found[file]] for file in stamps if file in found}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MsencError(f"{folder}: cannot be made ({error.strerror}). Free space or permissions there.") from error
    if lines != known:
        write_text(folder / CACHE, json.dumps(lines, ensure_ascii=False, indent=0) + "\n")
    return {clip: found[file] + clip.removeprefix(file) if file in found else None for clip, file in file_of.items()}


def _stamp(path: Path) -> list[int] | None:
    try:
        if not path.is_file():
            return None
        stat = path.stat()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise MsencError(f"{path}: cannot be read ({error.strerror}). Make the dataset's files readable.") from error


def _read_cache(path: Path) -> dict[str, list]:
    with suppress(MsencError):  # damaged: all clips are read again
        return read_json(path, dict[str, tuple[Count, int, Sha256]])
    return {}
