"""A talk <-> the file in which a visitor of the page takes it along: ``talk.json``, or a ZIP of it and its clips."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from msenc.files import write_json
from msenc.files.kinds import is_name
from msenc.talk.agent import MAX_TURNS, Turn, read_talk, talk_json
from msenc.types import MsencError

MAX_JSON_BYTES = 4 << 20
"""More than the longest talk takes."""
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError)


def save_turns(turns: Sequence[Turn], folder: Path) -> Path:
    """Write turns as a history file, which `respond.py` takes; with clips, a ZIP of it and them."""
    rows, files = talk_json(turns)["turns"], {}
    for number, row in enumerate(rows, start=1):
        for name in {"audio", "video"} & row.keys():
            file = Path(row[name])
            row[name] = f"{number}-{name}{file.suffix}"
            files[row[name]] = file
    path = folder / "talk.json"
    write_json(path, {"turns": rows})
    if not files:
        return path
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:  # stored, as clips are compressed already
        for name, file in {path.name: path, **files}.items():
            archive.write(file, name)
    return path.with_suffix(".zip")


def read_saved(path: Path, folder: Path, max_bytes: int) -> list[Turn]:
    """The turns of a file of `save_turns`; the clips that they name are unpacked into a folder, and nothing else.

    Raises:
        MsencError: it is no such file, larger than `max_bytes` when unpacked, too long, or names files that are not in
            it: a visitor must not reach those of this machine.
    """
    if not zipfile.is_zipfile(path):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise MsencError(f"{path.name}: is neither a ZIP nor as short as a talk. Give a file that the page saved.")
        turns = read_talk(path)
        for number, turn in enumerate(turns, start=1):
            if turn.sound is not None:
                raise _not_inside(path, number, turn.sound)
        return turns
    try:
        with zipfile.ZipFile(path) as archive:
            found = {info.filename: info for info in archive.infolist()}
            if sum(info.file_size for info in found.values()) > max_bytes or len(found) > 2 * MAX_TURNS + 1:
                raise MsencError(
                    f"{path.name}: holds {len(found)} files, or more than {max_bytes >> 20} MiB. Cut the talk, or "
                    "raise max_upload_mb."
                )
            folder.mkdir(parents=True, exist_ok=True)
            _unpack(archive, found, "talk.json", folder / "talk.json", path)
            if (folder / "talk.json").stat().st_size > MAX_JSON_BYTES:
                raise MsencError(
                    f"{path.name}: its talk.json is longer than any talk. Give a file that the page saved."
                )
            turns = []
            for number, turn in enumerate(read_talk(folder / "talk.json"), start=1):
                files = {}
                for kind in ("audio", "video"):
                    if (file := getattr(turn, kind)) is not None:
                        if file.parent != folder or not is_name(file.name) or file.name not in found:
                            raise _not_inside(path, number, file)
                        files[kind] = folder / f"{number}-{kind}{file.suffix.lower()}"
                        _unpack(archive, found, file.name, files[kind], path)
                turns.append(replace(turn, **files))
    except _BAD_ZIP as error:
        raise MsencError(f"{path.name}: cannot be unpacked ({error}).") from error
    return turns


def _unpack(archive: zipfile.ZipFile, found: dict[str, zipfile.ZipInfo], name: str, target: Path, path: Path) -> None:
    """Write one file of an archive; it cannot become longer than the archive says, which was checked."""
    if name not in found:
        raise MsencError(f"{path.name}: holds no {name}. Give a file that the page saved.")
    left = found[name].file_size
    with archive.open(found[name]) as source, target.open("wb") as copy:
        while part := source.read(min(1 << 20, left + 1)):
            left -= len(part)
            if left < 0:
                raise MsencError(f"{path.name}: {name} is longer than the file says.")
            copy.write(part)


def _not_inside(path: Path, number: int, file: Path) -> MsencError:
    return MsencError(
        f"{path.name}, turn {number}: {file.name} is not in the file. Give the ZIP that the page saved, or turns "
        "without clips."
    )
