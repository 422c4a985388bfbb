"""A sweep's folder: its jobs, and the run of each job.

- ``sweep.json``: the command and its jobs, written when the sweep starts
- ``submitted.json``: which Slurm job each of them is, if they are
- ``jobs/<number>-<digest of overrides>.json``: the folder of a job's run, written by the job; it may be in another
  sweep's folder
- ``<time of a start>/<number>/``: runs that started here

A job that Slurm keeps outlives the command that submitted it, and the next command may number its jobs otherwise: what
tells jobs apart are their overrides.
"""

import os
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msenc.files import digest, read_json, write_json
from msenc.files.kinds import Must, Name
from msenc.runs.identity import ANOTHER_PLACE
from msenc.runs.overrides import key_of

SCHEMA_VERSION = 1
ADVICE = "Repeat the sweep's command, which rewrites it, or move its folder away."
STOPPING = "stopping"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        number: its index in the sweep, from 0.
        overrides: of its config.
        run_dir: the folder of its run; None if it has not started.
    """

    number: int
    overrides: tuple[str, ...]
    run_dir: Path | None


def sweep_name(chosen: str | None, overrides: Iterable[str], axes: Iterable[str], is_table: bool = True) -> str:
    """The name of a sweep's folder; independent of how many values the command gives for an axis.

    Args:
        chosen: the file of the group ``sweep``, if there is one.
        overrides: of the command.
        axes: the varied keys; always including the seed.
        is_table: of a search, another seed or another range of an axis is another search.

    Example:
        >>> one = sweep_name(None, ["modality=text", "seed=1,2", "optimizer.lr=0.1"], ["seed"])
        >>> one == sweep_name(None, ["optimizer.lr=0.1", "paths.runs_dir=x", "modality=text"], ["seed"])
        True
        >>> one == sweep_name(None, ["modality=text", "optimizer.lr=0.2"], ["seed"])
        False
    """
    varied = {*axes, "seed"} if is_table else set()
    fixed = {key_of(o): o for o in overrides if key_of(o) not in varied and not is_a_place(key_of(o))}
    return f"{chosen or 'multirun'}-{digest([sorted(fixed.values()), sorted(varied)])}"


def is_a_place(key: str) -> bool:
    """Whether a key is irrelevant to a run's identity."""
    group, _, name = key.partition(".")
    return group in ANOTHER_PLACE[""] or (group in ANOTHER_PLACE and name in ANOTHER_PLACE[group])


def write_sweep(
    folder: Path,
    command: Sequence[str],
    jobs: Sequence[Sequence[str]] | None,
    search: Mapping[str, Any] | None = None,
    running: Iterable[Sequence[str]] = (),
) -> None:
    """Record the jobs of a starting sweep, replacing the record of earlier starts, whose runs stay.

    Args:
        folder: of the sweep.
        command: its overrides.
        jobs: overrides of each; of a search, those that are known; None if they are chosen as it runs.
        search: of a search: the keys that are searched (``axes``), and whether the least or the greatest result is the
            best (``direction``).
        running: overrides of the jobs of an earlier start that still run or wait elsewhere; their notes stay.
    """
    kept = {_digest(overrides) for overrides in running}
    (folder / "jobs" / STOPPING).unlink(missing_ok=True)
    for path, _ in _notes(folder):
        if path.stem.partition("-")[2] not in kept:
            path.unlink(missing_ok=True)
    write_json(
        folder / "sweep.json",
        {
            "schema_version": SCHEMA_VERSION,
            "started": f"{datetime.now():%Y-%m-%d_%H-%M-%S}",
            "command": list(command),
            "jobs": jobs and [*map(list, jobs)],
            **({"search": search} if search else {}),
        },
    )


def same_job(overrides: Iterable[str]) -> tuple[str, ...]:
    """What tells a job from the sweep's others, whether its first command waited for it or not."""
    return tuple(o for o in overrides if key_of(o) != "detach")


def _digest(overrides: Iterable[str]) -> str:
    return digest(list(same_job(overrides)))


def job_folder(folder: Path, number: int, overrides: Sequence[str]) -> Path:
    """The folder for a new run of a job, in the sweep's; starts of a sweep do not overwrite each other."""
    sweep = _read_jobs(folder)
    wanted = sweep["jobs"] or []
    is_known = number >= len(wanted) or same_job(wanted[number]) == same_job(overrides)
    return folder / sweep["started"] / (str(number) if is_known else f"{number}-{_digest(overrides)}")


def note_run(folder: Path, number: int, run_dir: Path, overrides: Sequence[str]) -> None:
    """Record the run of a job."""
    place = os.path.relpath(Path(run_dir).resolve(), Path(folder).resolve())
    facts = {"run_dir": place, "overrides": list(overrides), "process": os.getpid()}
    write_json(folder / "jobs" / f"{number}-{_digest(overrides)}.json", facts)


def stop_jobs(folder: Path) -> bool:
    """Forward SIGTERM to the jobs that run in child processes, and start no others.

    Returns:
        Whether there is such a process.
    """
    processes = {note["process"] for _, note in _noted(folder) if "process" in note}
    children = [process for process in processes if _is_child(process)]
    if children:
        (folder / "jobs" / STOPPING).touch()
    for process in children:
        os.kill(process, signal.SIGTERM)
    return bool(children)


def is_stopping(folder: Path) -> bool:
    """Whether `stop_jobs` was called since the sweep's start."""
    return (folder / "jobs" / STOPPING).exists()


def _is_child(process: int) -> bool:
    """Whether it is a living child process of this one; ids from other machines may coincide with others."""
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


class _Submitted(TypedDict):
    overrides: list[str]
    job: Annotated[str, Must(lambda job: re.fullmatch(r"[0-9_]{1,40}", job) is not None, "a number of Slurm's")]


class _Submissions(TypedDict):
    jobs: list[_Submitted]


def write_submitted(folder: Path, jobs: Mapping[Sequence[str], str]) -> None:
    """Note which Slurm job each of a sweep's jobs is; it stays when the sweep starts anew."""
    noted = [{"overrides": list(overrides), "job": job} for overrides, job in jobs.items()]
    write_json(folder / "submitted.json", {"jobs": noted})


def read_submitted(folder: Path) -> list[tuple[list[str], str]]:
    """Overrides of jobs that were submitted, and the Slurm job of each."""
    if not (folder / "submitted.json").is_file():
        return []
    found = read_json(
        folder / "submitted.json", _Submissions, "Move it away; jobs that run may be submitted twice then."
    )
    return [(entry["overrides"], entry["job"]) for entry in found["jobs"]]


class _Search(TypedDict):
    axes: list[str]
    direction: Literal["minimize", "maximize"]


class _Sweep(TypedDict):
    started: NotRequired[Name]
    command: NotRequired[list[str]]
    jobs: list[list[str]] | None
    search: NotRequired[_Search]


class _Note(TypedDict):
    run_dir: Annotated[str, Must(lambda path: path != "" and "\0" not in path, "a folder")]
    overrides: NotRequired[list[str]]
    process: NotRequired[Annotated[int, Must(lambda number: 0 < number < 2**31, "a process id")]]


def _read_jobs(folder: Path) -> dict[str, Any]:
    return read_json(folder / "sweep.json", _Sweep, ADVICE)


def sweep_command(folder: Path) -> list[str]:
    """The overrides of the command that started a sweep last."""
    return _read_jobs(folder).get("command", [])


def read_search(folder: Path) -> dict[str, Any] | None:
    """What is searched, and in which direction; None if the folder is no search's."""
    return _read_jobs(folder).get("search") if (folder / "sweep.json").is_file() else None


def _noted(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """The jobs that have a run, each with the number that it was started with, and its note."""
    return [(number, read_json(path, _Note, ADVICE)) for path, number in _notes(folder)]


def _notes(folder: Path) -> list[tuple[Path, int]]:
    """The files of notes, and the number that each has in its name."""
    paths = {path: path.stem.partition("-")[0] for path in folder.glob("jobs/*.json")}
    return [(path, int(number)) for path, number in sorted(paths.items()) if number.isdecimal() and len(number) < 10]


def read_sweep(folder: Path) -> list[Job] | None:
    """The jobs of a sweep in order; None if the folder is not a sweep's."""
    if not (folder / "sweep.json").is_file():
        return None
    wanted: list[list[str]] = _read_jobs(folder)["jobs"] or []
    runs: dict[Any, str] = {}
    others: dict[int, tuple[str, ...]] = {}
    for number, note in _noted(folder):
        overrides = same_job(note.get("overrides", wanted[number] if number < len(wanted) else ()))
        runs[number, overrides] = runs[overrides] = note["run_dir"]
        if number >= len(wanted):
            others[number] = overrides

    def job(number: int, overrides: Sequence[str]) -> Job:
        run = runs.get((number, same_job(overrides)), runs.get(same_job(overrides)))
        return Job(number, tuple(overrides), Path(os.path.normpath(folder / run)) if run else None)

    return [job(number, overrides) for number, overrides in [*enumerate(wanted), *sorted(others.items())]]
