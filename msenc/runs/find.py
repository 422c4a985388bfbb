"""Finds runs: those of a sweep or any other folder, and the run with a given identity."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msenc.runs.record import is_finished, read_facts
from msenc.runs.sweep import read_sweep


def find_run(folders: Iterable[Path], identity: str) -> Path | None:
    """The run of this identity below any of the folders: a finished one before others, the latest before earlier ones.

    A run's folder holds no other run, so it is not searched.
    """
    found = []
    for path in run_records(folders):
        facts = read_facts(path)
        if facts.get("identity") == identity:
            found.append((is_finished(facts), path.stat().st_mtime, path.parent))
    return max(found)[2] if found else None


def run_records(folders: Iterable[Path]) -> Iterator[Path]:
    """Every ``run.json`` under the folders, once; the many files in a run's folder are not searched."""
    seen = set()
    for folder in folders:
        for place, inner, files in os.walk(folder):
            if "run.json" in files:
                inner.clear()
                path = Path(place, "run.json")
                if (real := path.resolve()) not in seen:
                    seen.add(real)
                    yield path


def runs_of(folder: Path) -> dict[Path, Sequence[str] | None]:
    """The runs of a sweep in the order of its jobs, each with the overrides of its last start, wherever they are.

    For any other folder: itself, or the runs under it in natural order of their names, with None.
    """
    jobs = read_sweep(folder)
    if jobs is not None:
        return {job.run_dir: job.overrides for job in jobs if job.run_dir and (job.run_dir / "run.json").is_file()}
    return dict.fromkeys(sorted((path.parent for path in run_records([folder])), key=_natural))


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]
