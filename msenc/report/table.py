"""Runs -> one table: a row per job configuration, mean and deviation over its seeds; printed and written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from msenc.report.collect import Evaluation, Run
from msenc.types import MsencError

if TYPE_CHECKING:  # the command lines' --help must not wait for pandas
    from pandas import DataFrame

MAIN_METRICS = ("nll", "perplexity", "token_accuracy", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
PLANTED_KINDS = ("text", "audio", "video", "both")


@dataclass(frozen=True)
class Table:
    """What `summarise` found.

    Args:
        split: the evaluated split.
        keys: override keys in which the runs differ, the seed left out.
        metrics: metrics in order; shares recovered are in percent and say so in their name.
        frame: a row per configuration, in the order of their first run. Columns: the keys, ``runs`` (one per seed),
            each metric and ``<metric> deviation`` (NaN for a single run), ``trainable parameters``, ``seconds``.
        notes: what the reader of the numbers should know.
        left_out: runs that are in no row, each with the reason.
    """

    split: str
    keys: list[str]
    metrics: list[str]
    frame: DataFrame
    notes: list[str]
    left_out: list[str]


def summarise(runs: list[Run], split: str = "test", settings: str | None = None) -> Table:
    """Bring the finished runs' evaluations of one split into a table.

    Args:
        runs: of one sweep, as `collect_runs` finds them.
        split: which evaluations to take.
        settings: settings (or their hash) of the evaluations to take, where there are several.

    Raises:
        MsencError: no evaluation fits, or the fitting ones cannot be compared: they differ in data, in settings or
            in the runs' task, or two runs share configuration and seed.
    """
    import pandas as pd

    chosen = _choose(runs, split, settings)
    used = [run for run in runs if run.name in chosen]
    _refuse_other_tasks(used)
    # Runs that failed count here too: without them, a row would not say what it has and they lack.
    keys = [key for key in _differing_keys([[run] for run in runs]) if any(key in run.overrides for run in used)]
    _refuse_equal_seeds(used, keys)
    scores = {run.name: _table_metrics(chosen[run.name].metrics) for run in used}
    metrics = sorted({name for values in scores.values() for name in values}, key=_metric_order)
    costs = ["trainable parameters", "seconds"]
    frame = pd.DataFrame(
        [
            [*_configuration(run, keys), 1]
            + [scores[run.name].get(name, float("nan")) for name in metrics]
            + [sum(run.trainable_parameters.values()), run.seconds]
            for run in used
        ],
        columns=[*keys, "runs", *metrics, *costs],
    )
    # The added column groups all runs into one row where no key differs.
    jobs = frame.assign(**{"": 0}).groupby([*keys, ""], sort=False)
    parts = [jobs["runs"].sum()]
    for name in metrics:
        parts += [jobs[name].mean(), jobs[name].std(ddof=1).rename(f"{name} deviation")]
    frame = pd.concat([*parts, *(jobs[name].mean() for name in costs)], axis=1).reset_index().drop(columns="")
    left_out = [_reason(run, split) for run in runs if run.name not in chosen]
    return Table(split, keys, metrics, frame, _notes(used, scores, metrics), left_out)


def _choose(runs: list[Run], split: str, settings: str | None) -> dict[str, Evaluation]:
    """Name of each finished run -> its newest evaluation of the split; all chosen ones share data and settings."""
    finished = [run for run in runs if run.status == "finished"]
    of_split = [(run, e) for run in finished for e in run.evaluations if e.split == split]
    if not of_split:
        states = _grouped((run.status, run) for run in runs)
        splits = sorted({e.split for run in finished for e in run.evaluations}) or ["none"]
        raise MsencError(
            f"No finished run with an evaluation of {split}. Found: {states or 'no run'}; evaluated splits of the "
            f"finished ones: {', '.join(splits)}. Run evaluate.py run_dir=... split={split}, or name another split."
        )
    fitting = [(run, e) for run, e in of_split if settings is None or settings in (e.settings, e.hash)]
    found = _grouped((f"data={e.data} settings={e.settings} hash={e.hash}", run) for run, e in fitting or of_split)
    if not fitting:
        raise MsencError(f"No evaluation of {split} has settings={settings}. Found: {found}.")
    if len({(e.data, e.settings) for _, e in fitting}) > 1:
        raise MsencError(
            f"The evaluations of {split} differ in data or settings, so their numbers cannot be compared: {found}. "
            "Choose one with settings=, which takes the settings or their hash."
        )
    return {run.name: e for run, e in sorted(fitting, key=lambda pair: pair[1].written)}


def _configuration(run: Run, keys: list[str]) -> tuple[str, ...]:
    return tuple(run.overrides.get(key, "(default)") for key in keys)


def _differing_keys(groups: Iterable[list[Run]]) -> list[str]:
    """Override keys, the seed left out, whose values differ between groups of runs; an absent key is a value too."""
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
    cause = f"overrides differ in {', '.join(keys)}" if keys else "overrides agree, so the data was prepared anew"
    raise MsencError(
        "The runs have different tasks (turns, splits, targets or history), so their numbers cannot be compared: "
        f"{_grouped((f'task {run.task_hash}', run) for run in runs)}. Their {cause}. "
        "Report each group from a folder of its own."
    )


def _refuse_equal_seeds(runs: list[Run], keys: list[str]) -> None:
    seen: dict[tuple, str] = {}
    for run in runs:
        first = seen.setdefault((_configuration(run, keys), run.seed), run.name)
        if first != run.name:
            raise MsencError(
                f"{first} and {run.name} have the same overrides and seed {run.seed}, expected one run per seed: "
                "the deviation would come out too small. Move one of the two folders away."
            )


def _notes(runs: list[Run], scores: dict[str, dict[str, float]], metrics: list[str]) -> list[str]:
    notes = []
    for stream in dict.fromkeys(stream for run in runs for stream in run.streams):
        having = [run for run in runs if stream in run.streams]
        if len({run.streams[stream] for run in having}) > 1:
            hashes = _grouped((run.streams[stream], run) for run in having)
            notes.append(f"The runs read different {stream} features: {hashes}.")
    for name in metrics:
        if lacking := [run.name for run in runs if name not in scores[run.name]]:
            notes.append(f"{name} is missing in {', '.join(lacking)}.")
    return notes


def _grouped(pairs: Iterable[tuple[str, Run]]) -> str:
    """Runs by a property, as text: ``finished (jobs/0, jobs/2), failed (jobs/1)``."""
    groups = defaultdict(list)
    for value, run in pairs:
        groups[value].append(run.name)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())


def _table_metrics(metrics: dict[str, float]) -> dict[str, float]:
    main = {name: metrics[name] for name in MAIN_METRICS if name in metrics}
    shares = {n: v for n, v in metrics.items() if n.startswith("planted/") and n.endswith("/recovered")}
    return main | {f"{name} %": 100 * value for name, value in shares.items()}


def _metric_order(name: str) -> tuple[int, str]:
    order = [*MAIN_METRICS, *(f"planted/{kind}/recovered %" for kind in PLANTED_KINDS)]
    return order.index(name) if name in order else len(order), name


def _reason(run: Run, split: str) -> str:
    if run.status == "finished":
        return f"{run.name}: finished, but no fitting evaluation of {split}"
    # Errors may span lines; one run is one line here.
    return f"{run.name}: {run.status}: {' '.join((run.error or 'no error was recorded').split())}"


def print_table(table: Table, console: Console | None = None) -> None:
    """Show the table; where it is wider than the console, with the configurations side by side."""
    console = console or Console()
    grid = _grid(table)
    shown = _rich_table(grid)
    # Measured as if there were room without end; the width given by default stops at the console's.
    if console.measure(shown, options=console.options.update(width=100_000)).maximum > console.width:
        shown = _rich_table([list(column) for column in zip(*grid, strict=True)])
    console.print(Text(_heading(table), style="bold"))
    console.print(shown)
    for line in _footer(table):
        console.print(Text(line), soft_wrap=True)


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `report/table.md` and `report/table.csv` (numbers unrounded) below a folder; earlier ones are replaced.

    Returns:
        The paths of both.
    """
    head, *rows = [[text.replace("|", "\\|") for text in row] for row in _grid(table)]
    lines = [f"{_heading(table)}.", "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
    markdown = "\n".join([*lines, "", *(f"- {line}" for line in _footer(table))]).rstrip() + "\n"
    written = []
    (folder / "report").mkdir(parents=True, exist_ok=True)
    for name, text in (("table.md", markdown), ("table.csv", table.frame.to_csv(index=False))):
        path = folder / "report" / name
        unfinished = path.with_name(f"{name}.tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
        written.append(path)
    return written


def _grid(table: Table) -> list[list[str]]:
    """Header and rows as text."""
    rows = [
        [
            *(row[key] for key in table.keys),
            str(row["runs"]),
            *(_cell(name, row[name], row[f"{name} deviation"]) for name in table.metrics),
            f"{row['trainable parameters']:,.0f}",
            f"{row['seconds']:,.0f}",
        ]
        for row in table.frame.to_dict("records")
    ]
    return [[*table.keys, "runs", *table.metrics, "trainable parameters", "seconds"], *rows]


def _cell(name: str, mean: float, deviation: float) -> str:
    digits = 1 if name.endswith("%") else 3
    if mean != mean:  # NaN: no run of this row has the metric
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation == deviation else "")


def _heading(table: Table) -> str:
    return f"{table.split}: mean ± sample standard deviation over seeds"


def _footer(table: Table) -> list[str]:
    return [*(f"Note: {note}" for note in table.notes), *(f"Left out: {line}" for line in table.left_out)]


def _rich_table(grid: list[list[str]]) -> RichTable:
    shown = RichTable()
    # Text objects: a value such as [red] would otherwise be read as markup.
    for title in grid[0]:
        shown.add_column(Text(title), overflow="fold")
    for row in grid[1:]:
        shown.add_row(*map(Text, row))
    return shown
