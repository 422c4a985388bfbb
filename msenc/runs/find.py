"""Where runs lie: every record below some folders, and the run of an identity."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from msenc.files import read_json
from msenc.runs.record import is_finished


def find_run(folders: Iterable[Path], identity: str) -> Path | None:
    """The run of this identity below any of the folders: a finished one before others, the latest before earlier ones.

    A run's folder holds no other run, so it is not searched.
    """
    found = []
    for path in run_records(folders):
        facts = read_json(path)
        if facts.get("identity") == identity:
            found.append((is_finished(facts), path.stat().st_mtime, path.parent))
    return max(found)[2] if found else None


def run_records(folders: Iterable[Path]) -> Iterator[Path]:
    """Every ``run.json`` below the folders, once; the many files of a run's folder are not looked through."""
    seen = set()
    for folder in folders:
        for place, inner, files in os.walk(folder):
            if "run.json" in files:
                inner.clear()
                path = Path(place, "run.json")
                if (real := path.resolve()) not in seen:
                    seen.add(real)
                    yield path
