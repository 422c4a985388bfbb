"""A generated folder appears whole or not at all, and is left alone where it already is what is wanted."""

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
    """Write a folder and then, as `marker`, the settings that it follows from.

    Args:
        root: the folder; it appears when it is whole and not before.
        marker: name of the JSON file in it that holds the settings.
        settings: plain values; a folder with equal ones is left as it is.
        check: called before anything is made; refuses where a package is missing.
        write: fills the folder that it is given.

    Raises:
        MsencError: if `root` holds something else, or writing fails.
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
            f"Could not write the data to {root}: {error}. Nothing was left there; free space, or choose another root."
        ) from error


def _is_written(root: Path, marker: str, settings: Mapping[str, Any]) -> bool:
    """Whether `root` is the wanted folder; False where there is nothing, and a refusal where it is another."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    advice = "Remove it, or choose another root."
    path = root / marker
    if not path.is_file():
        raise MsencError(f"{root} exists and holds no generated data (it has no {marker}). {advice}")
    found = read_json(path, advice=advice)
    if found == settings:
        return True
    found = found if isinstance(found, dict) else {}
    differences = [
        f"{key} {found.get(key)!r} (wanted: {value!r})" for key, value in settings.items() if found.get(key) != value
    ]
    raise MsencError(f"{root} holds generated data with {'; '.join(differences) or 'unknown settings'}. {advice}")
