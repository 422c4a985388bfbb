"""Writes generated folders atomically, and reuses an existing one with equal settings."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from msenc.files import read_json
from msenc.types import MsencError


def write_once(
    root: Path, marker: str, settings: Mapping[str, Any], check: Callable[[], object], write: Callable[[Path], None]
) -> None:
    """Write a folder and then, as `marker`, its settings.

    Args:
        root: the folder; it appears only when complete.
        marker: name of the JSON file in it with the settings.
        settings: plain values; a folder with equal ones is reused.
        check: called before anything is written; raises if a package is missing.
        write: fills the given folder.

    Raises:
        MsencError: `root` has other content, or writing failed.
    """
    root = Path(root).absolute()
    if _is_written(root, marker, settings):
        return
    check()
    part = root.with_name(f".{root.name}.part")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if _is_written(root, marker, settings):  # another process was faster
                return
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            try:
                part.mkdir()
                write(part)
                (part / marker).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
                if root.exists():
                    root.rmdir()
                part.rename(root)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise MsencError(
            f"Could not write the data to {root}: {error}. Nothing remains there; free space, or choose another root."
        ) from error


def _is_written(root: Path, marker: str, settings: Mapping[str, Any]) -> bool:
    """Whether `root` is the wanted folder; False if it does not exist, an error if it is another."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    advice = "Remove it, or choose another root."
    path = root / marker
    if not path.is_file():
        raise MsencError(f"{root} exists but is not generated data (it has no {marker}). {advice}")
    found = read_json(path, advice=advice)
    if found == settings:
        return True
    found = found if isinstance(found, dict) else {}
    differences = [
        f"{key} {found.get(key)!r} (wanted: {value!r})" for key, value in settings.items() if found.get(key) != value
    ]
    raise MsencError(f"{root} has generated data with {'; '.join(differences) or 'unknown settings'}. {advice}")
