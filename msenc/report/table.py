"""Runs -> what a report says of them: a row per configuration, comparisons, verdicts, notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from msenc.report.collect import Evaluation, Run
from msenc.report.compare import (
    DEFAULT,
    Comparison,
    Configuration,
    Verdict,
    compare,
    configure,
    judge_controls,
    leaders,
    metric_order,
    table_metrics,
)
from msenc.report.listening.heard import Heard
from msenc.report.noise import REPEATED, Floor, measure_floor, refuse_other_settings
from msenc.report.panels.followed import find_followed
from msenc.report.plots import read_curve
from msenc.report.style import Style, refuse_unknown
from msenc.types import MsencError

FEW_SEEDS = 3
UNFINISHED = ("waiting", "running", "interrupted")


@dataclass(frozen=True)
class Table:
    """What `summarise` found.

    Args:
        split: the evaluated split.
        keys: override keys in which the runs differ, except the seed.
        metrics: metrics in order; shares recovered are in percent and say so in their name.
        configurations: the rows, in the order of their first run.
        comparisons: the tests that the sweep asks for, by metric.
        verdicts: of controls, if there are any.
        leaders: metric -> the best row, where its difference to the next is significant.
        notes: caveats for the reader.
        left_out: runs excluded from all rows, each with the reason.
        running: jobs that have no result yet, each with how far it is.
        floor: how far runs are apart that are alike but for the seed: the reported ones, or those named for it.
        style: how names and numbers are written.
        followed: what the configurations follow where words and streams conflict, if that was measured.
        heard: what listeners say of them, if their answers were given.
    """

    split: str
    keys: list[str]
    metrics: list[str]
    configurations: list[Configuration]
    comparisons: list[Comparison]
    verdicts: list[Verdict]
    leaders: dict[str, Configuration]
    notes: list[str]
    left_out: list[str]
    running: list[str] = field(default_factory=list)
    floor: Floor | None = None
    style: Style = field(default_factory=Style)
    followed: list[dict[str, Any]] = field(default_factory=list)
    heard: Heard | None = None

    @property
    def is_of_noise(self) -> bool:
        """Whether the rows differ in nothing that should matter, so that they say how far chance alone goes."""
        return set(self.keys) <= set(REPEATED)


def summarise(
    runs: list[Run],
    split: str = "test",
    settings: str | None = None,
    *,
    metrics: Sequence[str] = (),
    style: Style | None = None,
    margins: Mapping[str, float] | None = None,
    noise: tuple[object, list[Run]] | None = None,
) -> Table:
    """Collect the finished runs' evaluations of one split in a table.

    Args:
        runs: of one sweep, as `collect_runs` finds them.
        split: which evaluations to take.
        settings: settings (or their hash) of the evaluations to use, if there are several.
        metrics: those to report, in this order; by default all.
        style: how names and numbers are written.
        margins: metric -> the largest difference that counts as none.
        noise: runs that are alike but for the seed, as one of the rows is, and the name of their folder.

    Raises:
        MsencError: no evaluation fits, or the fitting ones cannot be compared: they differ in data, split, settings
            or items or in the runs' task, two runs share configuration and seed, or predictions cannot be read; a
            name is not the report's; or `noise` is not of these settings.
    """
    chosen = _choose(runs, split, settings)
    used = [run for run in runs if run.name in chosen]
    _refuse_other_tasks(used)
    # Failed runs count here too: without them, a row would not show how it differs from them.
    keys = [key for key in _differing_keys([[run] for run in runs]) if any(key in run.overrides for run in used)]
    _refuse_equal_seeds(used, keys)
    configurations = configure(used, chosen, keys)
    known = sorted({name for c in configurations for name in c.scores}, key=metric_order)
    refuse_unknown("metrics", metrics, known)
    refuse_unknown("margins", margins or {}, known)
    style = style or Style()
    style.check(known, configurations)
    shown = list(metrics) or known
    floor = None
    if noise is not None:
        floor = _floor_of(*noise, split, settings, [(run, chosen[run.name]) for run in used])
    elif set(keys) <= set(REPEATED):
        floor = measure_floor([r.seed for r in used], [table_metrics(chosen[r.name].metrics) for r in used])
    comparisons, incomparable = compare(configurations, shown, margins, floor if noise is not None else None)
    verdicts, unjudged = judge_controls(configurations, split)
    followed, unmeasured = find_followed(configurations)
    waiting = [run for run in runs if run.status in UNFINISHED]
    left_out = [_reason(run, split) for run in runs if run.name not in chosen and run not in waiting]
    return Table(
        split,
        keys,
        shown,
        configurations,
        comparisons,
        verdicts,
        leaders(configurations, shown, comparisons),
        _notes(used, chosen, configurations, shown) + incomparable + unjudged + unmeasured,
        left_out,
        [_progress(run) for run in waiting],
        floor,
        style,
        followed,
    )


def _floor_of(
    folder: object, runs: list[Run], split: str, settings: str | None, used: list[tuple[Run, Evaluation]]
) -> Floor:
    chosen = _choose(runs, split, settings)
    repeated = [run for run in runs if run.name in chosen]
    keys = [key for key in _differing_keys([[run] for run in repeated]) if key not in REPEATED]
    if keys:
        raise MsencError(
            f"noise_floor: the runs of {folder} differ in {', '.join(keys)}, expected runs that differ in nothing but "
            "seed and threads, as of python train.py sweep=noise_floor."
        )
    refuse_other_settings([(run, chosen[run.name]) for run in repeated], used, folder)
    values = [table_metrics(chosen[run.name].metrics) for run in repeated]
    floor = measure_floor([run.seed for run in repeated], values)
    if floor is None:
        raise MsencError(f"noise_floor: {folder} has one seed with an evaluation of {split}, expected two or more.")
    return floor


def costs(configuration: Configuration) -> dict[str, float]:
    """Means over the runs of a configuration; for memory, the maximum."""
    runs = configuration.runs
    return {
        "trainable parameters": sum(sum(r.trainable_parameters.values()) for r in runs) / len(runs),
        "seconds": sum(r.seconds for r in runs) / len(runs),
        "peak memory MiB": max(r.peak_memory_mib for r in runs),
    }


def _choose(runs: list[Run], split: str, settings: str | None) -> dict[str, Evaluation]:
    """Name of each finished run -> its newest evaluation of the split; all chosen ones share data and settings."""
    finished = [run for run in runs if run.status == "finished"]
    plain = [(run, e) for run in finished for e in run.evaluations if e.control is None]
    of_split = [(run, e) for run, e in plain if e.split == split]
    if not of_split:
        states = _grouped((run.status, run) for run in runs)
        splits = sorted({e.split for _, e in plain}) or ["none"]
        raise MsencError(
            f"No finished run with an evaluation of {split}. Found: {states or 'no run'}; evaluated splits of the "
            f"finished ones: {', '.join(splits)}. Run evaluate.py run_dir=... split={split}, or choose another split."
        )
    here = {run.name for run, _ in of_split}
    elsewhere = [(f"split {e.split}", run) for run, e in plain if run.name not in here]
    if elsewhere:
        raise MsencError(
            f"Not all runs were evaluated on {split}, so they cannot be compared: split {split} "
            f"({', '.join(sorted(here))}), {_grouped(elsewhere)}. Evaluate those too (evaluate.py run_dir=... "
            f"split={split}), or report another split (split=...)."
        )
    fitting = [(run, e) for run, e in of_split if settings is None or settings in (e.settings, e.hash)]
    found = _grouped((f"data={e.data} settings={e.settings} hash={e.hash}", run) for run, e in fitting or of_split)
    if not fitting:
        raise MsencError(f"No evaluation of {split} has settings={settings}. Found: {found}.")
    if len({(e.data, e.settings) for _, e in fitting}) > 1:
        raise MsencError(
            f"The evaluations of {split} differ in data or settings, so they cannot be compared: {found}. "
            "Choose one with settings=, which takes the settings or their hash."
        )
    return {run.name: e for run, e in sorted(fitting, key=lambda pair: pair[1].written)}


def _differing_keys(groups: Iterable[list[Run]]) -> list[str]:
    """Override keys, except the seed, whose values differ between groups of runs; an absent key is a value too."""
    groups = list(groups)
    keys = dict.fromkeys(key for group in groups for run in group for key in run.overrides if key != "seed")
    return [key for key in keys if len({frozenset(run.overrides.get(key) for run in group) for group in groups}) > 1]


def _refuse_other_tasks(runs: list[Run]) -> None:
    groups = defaultdict(list)
    for run in runs:
        groups[run.task_hash].append(run)
    if len(groups) == 1:
        return
    keys = _differing_keys(groups.values())
    cause = f"overrides differ in {', '.join(keys)}" if keys else "overrides agree, so the data was prepared again"
    facts = [name for name in ("data", "turns_hash", "history") if len({r.facts.get(name) for r in runs}) > 1]
    found = "".join(f" {n}: {_grouped((str(r.facts.get(n)), r) for r in runs)}." for n in facts)
    raise MsencError(
        "The runs have different tasks (turns, splits, targets or history), so they cannot be compared: "
        f"{_grouped((f'task {run.task_hash}', run) for run in runs)}. Their {cause}.{found} "
        "Report each group separately, from its own folder."
    )


def _refuse_equal_seeds(runs: list[Run], keys: list[str]) -> None:
    seen: dict[tuple, str] = {}
    for run in runs:
        first = seen.setdefault((tuple(run.overrides.get(key, DEFAULT) for key in keys), run.seed), run.name)
        if first != run.name:
            raise MsencError(
                f"{first} and {run.name} have the same overrides and seed {run.seed}, expected one run per seed: "
                "otherwise the deviation would be underestimated. Move one of the two folders away."
            )


def _notes(
    runs: list[Run], chosen: dict[str, Evaluation], configurations: list[Configuration], metrics: list[str]
) -> list[str]:
    notes = []
    for stream in dict.fromkeys(stream for run in runs for stream in run.streams):
        having = [run for run in runs if stream in run.streams]
        if len({run.streams[stream] for run in having}) > 1:
            hashes = _grouped((run.streams[stream][:12], run) for run in having)
            notes.append(f"The runs read different {stream} features: {hashes}.")
    for fact, what in (("commit", "commits of the code"), ("base_fingerprint", "base weights"), ("device", "devices")):
        if len({run.facts.get(fact) for run in runs}) > 1:
            notes.append(f"The runs have different {what}: {_grouped((str(r.facts.get(fact)), r) for r in runs)}.")
    if weighted := [(run.facts["loss_weights"], run) for run in runs if "loss_weights" in run.facts]:
        notes.append(f"Trained with loss weights by kind of token: {_grouped(weighted)}. Scores are unweighted.")
    notes += [f"{run.name}: {warning}" for run in runs for warning in run.warnings]
    shared = {
        stream
        for c in configurations
        for stream in {s for run in c.runs for s in run.alignments}
        if len(c.runs) > 1 and len({run.alignments.get(stream) for run in c.runs}) == 1
    }
    if shared:
        notes.append(
            f"Runs of all seeds share one alignment ({', '.join(sorted(shared))}), so the spread between seeds "
            "does not include its variance. For an alignment per seed: align.seed=${seed}."
        )
    seeds = {c.name: [run.seed for run in c.runs] for c in configurations}
    if len({tuple(s) for s in seeds.values()}) > 1:
        listed = "; ".join(f"{name}: {', '.join(map(str, s))}" for name, s in seeds.items())
        notes.append(f"The configurations have different seeds ({listed}).")
    fewest = min(len(s) for s in seeds.values())
    if max(len(s) for s in seeds.values()) == 1:
        notes.append("One seed each: the intervals only cover items, and say nothing about other seeds.")
    elif fewest == 1:
        notes.append("For a row with one seed, the spread between seeds is taken from the row it is compared with.")
    elif fewest < FEW_SEEDS:
        notes.append("Two seeds leave one degree of freedom: intervals are wide if seeds differ.")
    lacking_items = [r.name for c in configurations for r, i in zip(c.runs, c.items, strict=True) if i is None]
    if lacking_items:
        notes.append(f"No predictions.jsonl in {', '.join(lacking_items)}: intervals there only cover seeds.")
    for name in metrics:
        if lacking := [run.name for run in runs if name not in table_metrics(chosen[run.name].metrics)]:
            notes.append(f"{name} is missing in {', '.join(lacking)}.")
    return [*notes, _not_varied(runs)]


def _not_varied(runs: list[Run]) -> str:
    """Settings that all runs have in common, about which the table says nothing."""
    same = {key: runs[0].overrides.get(key) for key in runs[0].overrides if key != "seed"}
    same = {key: v for key, v in same.items() if all(run.overrides.get(key) == v for run in runs)}
    facts = {n: runs[0].facts[n] for n in ("data", "llm", "epochs", "device") if n in runs[0].facts}
    if Path(facts.get("llm", "")).is_absolute():  # a hub id is the name; for a folder, its last part
        facts["llm"] = Path(facts["llm"]).name
    facts = {n: v for n, v in facts.items() if n not in same and len({run.facts.get(n) for run in runs}) == 1}
    shown = ", ".join(f"{key}={value}" for key, value in {**facts, **same}.items())
    return f"Not varied: {shown or 'no common setting known'}."


def _grouped(pairs: Iterable[tuple[str, Run]]) -> str:
    """Runs by a property, as text: ``finished (jobs/0, jobs/2), failed (jobs/1)``."""
    groups = defaultdict(list)
    for value, run in pairs:
        groups[value].append(run.name)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())


def _reason(run: Run, split: str) -> str:
    if run.status == "finished":
        return f"{run.name}: finished, but no fitting evaluation of {split}"
    # Errors may span lines; one run is one line here.
    return f"{run.name}: {run.status}: {' '.join((run.error or 'no error was recorded').split())}"


def _progress(run: Run) -> str:
    """How far a job is that is not done; a process that was killed says nothing, so its last file's time is given."""
    which = ", ".join(f"{k}={v}" for k, v in run.overrides.items() if k != "seed")
    name = f"{run.name} ({', '.join(filter(None, [which, f'seed={run.seed}']))})"
    if run.status == "waiting":
        return f"{name}: has not begun"
    done = len(read_curve(run.folder))
    if run.status == "interrupted":
        return f"{name}: stopped after {done} epochs; the command that began it continues it"
    files = [run.folder / "run.json", *run.folder.glob("logs/**/*")]
    last = max(path.stat().st_mtime for path in files if path.exists())
    return f"{name}: still running: {done} epochs done, last written {datetime.fromtimestamp(last):%Y-%m-%d %H:%M}"
