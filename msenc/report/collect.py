"""Reads what runs left behind: `run.json` and `evaluation/*/metrics.json` below a folder; writes nothing."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from msenc.files import hold, read_json
from msenc.files.kinds import Name, Split
from msenc.runs.find import runs_of
from msenc.runs.record import read_facts
from msenc.runs.sweep import read_sweep
from msenc.types import MsencError

FACTS = ("data", "turns_hash", "llm", "base_fingerprint", "commit", "device", "machine", "epochs", "history")
"""Entries of `run.json` that a report compares between runs."""


ADVICE = "It is no file of this version: run that job again, or move its folder away."


class _Finished(TypedDict):
    """What ``run.json`` has of a run that is done, beside `runs.record.Facts`."""

    task_hash: str | None
    seed: int
    overrides: list[str]


class _Measured(TypedDict):
    """What ``metrics.json`` has of every evaluation."""

    split: Split
    data: Name
    settings: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Args:
        data: name of the evaluated data.
        split: ``train``, ``val`` or ``test``.
        settings: what decides the numbers besides data and weights (decoding ...), as the run wrote it.
        hash: short name of the settings, the end of the folder's name.
        metrics: name to number.
        written: when, in seconds since the epoch.
        folder: where it lies, with its ``predictions.jsonl``.
        control: what was done to the input of a control, else None.
        verdict: what the control says of the modality.
    """

    data: str
    split: str
    settings: str
    hash: str
    metrics: dict[str, float]
    written: float
    folder: Path = Path()
    control: str | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        name: the folder, relative to the one that was searched.
        status: ``finished``, ``failed``, ``running`` or ``interrupted``; ``waiting`` of a sweep's job without a run.
        error: what a failed run says.
        task_hash: runs are comparable where it is equal.
        seed: the run's seed.
        overrides: key to value of the Hydra overrides, the seed's among them.
        streams: stream name to hash of its features.
        trainable_parameters: part of the model to number of its trainable parameters.
        seconds: duration.
        evaluations: all evaluations in the folder.
        folder: the run's folder.
        peak_memory_mib: most memory that its process took.
        facts: what else tells runs apart: data, LLM, commit, epochs.
        warnings: what the run said at its end, as of a stream that does not reach the LLM.
        alignments: stream -> hash of what its connector was aligned by, where that was used.
    """

    name: str
    status: str
    error: str | None = None
    task_hash: str = ""
    seed: int = 0
    overrides: dict[str, str] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)
    trainable_parameters: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    folder: Path = Path()
    peak_memory_mib: float = 0.0
    facts: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    alignments: dict[str, str] = field(default_factory=dict)


def parse_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Hydra override strings as key -> value; of a key given twice the last counts, as for Hydra.

    Example:
        >>> parse_overrides(["modality=text", "+trainer.limit=3", "~callbacks.checkpoint"])
        {'modality': 'text', 'trainer.limit': '3', 'callbacks.checkpoint': '(removed)'}
    """
    parsed = {}
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        parsed[key] = "(removed)" if override.startswith("~") or not equals else value
    return parsed


def collect_runs(folder: Path) -> list[Run]:
    """Find the runs of a sweep, in the order of its jobs; or those in and below any other folder, by their names.

    A run is a folder with a `run.json`. Those of a sweep are the ones its last start asked for, wherever they lie.

    Args:
        folder: a sweep's folder, a run's, or one above several.

    Raises:
        MsencError: there is no such folder, no run in it, or a file of a run cannot be understood.
    """
    if not folder.is_dir():
        raise MsencError(f"No folder {folder}. Expected a sweep's folder, as train.py -m prints it at its end.")
    runs = runs_of(folder)
    if not runs:
        raise MsencError(f"No run found in {folder}: expected folders with a run.json. Give the folder of a sweep.")
    found = read_runs(runs, folder)
    waiting = [job for job in read_sweep(folder) or [] if job.run_dir is None]
    return found + [
        Run(f"job {job.number}", "waiting", seed=_seed(job.overrides), overrides=parse_overrides(job.overrides))
        for job in waiting
    ]


def read_runs(runs: Mapping[Path, Sequence[str] | None], folder: Path) -> list[Run]:
    """Runs by their folders, each with what was asked for; None: what its own record says.

    A run that a sweep took over may say the same in other words than the sweep did.
    """
    return [_read_run(path / "run.json", folder, overrides) for path, overrides in runs.items()]


def _seed(overrides: Sequence[str]) -> int:
    given = parse_overrides(overrides).get("seed", "1")
    return int(given) if given.isdecimal() else 0


def _read_run(path: Path, folder: Path, overrides: Sequence[str] | None) -> Run:
    value = read_facts(path)
    if value["status"] == "finished":
        hold(value, _Finished, path, ADVICE)
    return Run(
        name=os.path.relpath(path.parent, folder) if path.parent != folder else folder.resolve().name,
        status=value["status"],
        error=value.get("error"),
        task_hash=value.get("task_hash") or "",
        seed=value.get("seed") or 0,
        overrides=parse_overrides(value.get("overrides") or [] if overrides is None else overrides),
        streams=value.get("streams") or {},
        trainable_parameters=value.get("trainable_parameters") or {},
        seconds=value.get("seconds") or 0.0,
        evaluations=tuple(_read_evaluation(p) for p in sorted(path.parent.glob("evaluation/*/metrics.json"))),
        folder=path.parent,
        peak_memory_mib=value.get("peak_memory_mib") or 0.0,
        facts={name: str(value[name]) for name in FACTS if value.get(name) is not None}
        | ({"loss_weights": _weights(value["loss_weights"])} if value.get("loss_weights") else {}),
        warnings=tuple(value.get("warnings") or ()),
        alignments={s: fact["hash"] for s, fact in (value.get("alignments") or {}).items() if fact["used"]},
    )


def _weights(weights: dict[str, float]) -> str:
    return ", ".join(f"{kind} {weight:g}" for kind, weight in sorted(weights.items()))


def _read_evaluation(path: Path) -> Evaluation:
    value = read_json(path, _Measured, ADVICE)
    return Evaluation(
        data=value["data"],
        split=value["split"],
        settings=value["settings"],
        hash=path.parent.name.rsplit("-", 1)[-1],
        metrics={k: float(v) for k, v in value.items() if isinstance(v, int | float) and not isinstance(v, bool)},
        written=path.stat().st_mtime,
        folder=path.parent,
        control=value.get("control"),
        verdict=value.get("control/verdict"),
    )
