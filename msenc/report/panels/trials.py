"""The jobs of a search: what each has tried, and its result; the best first."""

from dataclasses import dataclass
from pathlib import Path

from msenc.report.collect import parse_overrides
from msenc.runs.record import read_facts
from msenc.runs.sweep import read_search, read_sweep

RESULT = "best val/loss"


@dataclass(frozen=True)
class Trial:
    """One job.

    Args:
        number: of the job.
        values: of the searched keys, in their order.
        result: its best validation loss; None if it has none.
        status: of its run; ``not started`` without one.
        folder: of its run.
    """

    number: int
    values: tuple[str, ...]
    result: float | None
    status: str
    folder: Path | None


@dataclass(frozen=True)
class Trials:
    """A search.

    Args:
        axes: the searched keys.
        trials: best first, those without a result last.
    """

    axes: list[str]
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The one with the best result."""
        return self.trials[0] if self.trials and self.trials[0].result is not None else None


def read_trials(folder: Path) -> Trials | None:
    """The trials of a search's folder; None if it is no search's."""
    search = read_search(folder)
    if search is None:
        return None
    axes = [axis.lstrip("+") for axis in search["axes"]]
    trials = []
    for job in read_sweep(folder) or []:
        overrides = parse_overrides(job.overrides)
        record = job.run_dir / "run.json" if job.run_dir else None
        facts = read_facts(record) if record and record.is_file() else {"status": "not started"}
        result = facts.get("best_loss") if facts["status"] == "finished" else None
        values = tuple(overrides.get(axis, "-") for axis in axes)
        trials.append(Trial(job.number, values, result, facts["status"], job.run_dir))
    sign = 1 if search["direction"] == "minimize" else -1
    trials.sort(key=lambda t: (t.result is None, 0 if t.result is None else sign * t.result, t.number))
    return Trials(axes, trials)


def trial_grid(trials: Trials) -> list[list[str]]:
    """Header and rows as text, numbers in four digits."""
    rows = [
        [
            str(t.number),
            *map(_short, t.values),
            "-" if t.result is None else f"{t.result:.4f}",
            t.status,
            "-" if t.folder is None else "/".join(t.folder.parts[-2:]),
        ]
        for t in trials.trials
    ]
    return [["job", *trials.axes, RESULT, "status", "run"], *rows]


def trial_rows(trials: Trials) -> list[dict[str, object]]:
    """The same for machines: nothing rounded."""
    return [
        {
            "job": t.number,
            **dict(zip(trials.axes, t.values, strict=True)),
            RESULT: "" if t.result is None else t.result,
            "status": t.status,
            "run": "" if t.folder is None else str(t.folder),
        }
        for t in trials.trials
    ]


def best_line(trials: Trials) -> str:
    """Which trial is the best, and how its run is evaluated."""
    best = trials.best
    if best is None:
        return "No job has a result yet."
    values = " ".join(f"{axis}={value}" for axis, value in zip(trials.axes, best.values, strict=True))
    return f"Best: job {best.number}, {RESULT} {best.result:.4f}: {values}. python evaluate.py run_dir={best.folder}"


def _short(value: str) -> str:
    try:
        return value if value.lstrip("-").isdigit() else f"{float(value):.4g}"
    except ValueError:
        return value
