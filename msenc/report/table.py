"""Runs -> one table: a row per configuration, means with intervals over dialogues and seeds; printed and written."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from msenc.evaluation.statistics import Effect
from msenc.files import write_text
from msenc.report.collect import Evaluation, Run
from msenc.report.compare import (
    DEFAULT,
    Comparison,
    Configuration,
    Verdict,
    compare,
    configure,
    direction_of,
    judge_controls,
    metric_order,
    table_metrics,
)
from msenc.report.followed import FOLLOWED, find_followed, followed_grid
from msenc.types import MsencError

COSTS = ("trainable parameters", "seconds", "peak memory MiB")
FEW_SEEDS = 3


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
        notes: caveats for the reader.
        left_out: runs excluded from all rows, each with the reason.
        followed: what the configurations follow where words and streams conflict, if that was measured.
    """

    split: str
    keys: list[str]
    metrics: list[str]
    configurations: list[Configuration]
    comparisons: list[Comparison]
    verdicts: list[Verdict]
    notes: list[str]
    left_out: list[str]
    followed: list[dict[str, Any]] = field(default_factory=list)


def summarise(runs: list[Run], split: str = "test", settings: str | None = None) -> Table:
    """Collect the finished runs' evaluations of one split in a table.

    Args:
        runs: of one sweep, as `collect_runs` finds them.
        split: which evaluations to take.
        settings: settings (or their hash) of the evaluations to use, if there are several.

    Raises:
        MsencError: no evaluation fits, or the fitting ones cannot be compared: they differ in data, split, settings
            or items or in the runs' task, two runs share configuration and seed, or predictions cannot be read.
    """
    chosen = _choose(runs, split, settings)
    used = [run for run in runs if run.name in chosen]
    _refuse_other_tasks(used)
    # Failed runs count here too: without them, a row would not show how it differs from them.
    keys = [key for key in _differing_keys([[run] for run in runs]) if any(key in run.overrides for run in used)]
    _refuse_equal_seeds(used, keys)
    configurations = configure(used, chosen, keys)
    metrics = sorted({name for c in configurations for name in c.scores}, key=metric_order)
    comparisons, incomparable = compare(configurations, metrics)
    verdicts, unjudged = judge_controls(configurations, split)
    followed, unmeasured = find_followed(configurations)
    left_out = [_reason(run, split) for run in runs if run.name not in chosen]
    notes = _notes(used, chosen, configurations, metrics) + incomparable + unjudged + unmeasured
    return Table(split, keys, metrics, configurations, comparisons, verdicts, notes, left_out, followed)


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


def print_table(table: Table, console: Console | None = None) -> None:
    """Print rows, comparisons and verdicts; tables wider than the console are transposed."""
    console = console or Console()
    console.print(Text(heading(table), style="bold"))
    _print_grid(grid(table), console)
    if table.comparisons:
        console.print(Text(COMPARED, style="bold"))
        _print_grid(comparison_grid(table), console)
    if table.verdicts:
        console.print(Text(JUDGED, style="bold"))
        _print_grid(verdict_grid(table), console)
    if table.followed:
        console.print(Text(FOLLOWED, style="bold"))
        _print_grid(followed_grid(table.followed), console)
    for line in footer(table):
        console.print(Text(line), soft_wrap=True)


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `table.md`, `table.tex`, `table.csv` and `comparisons.csv` (numbers unrounded) into a folder.

    Returns:
        Their paths; earlier files of these names are replaced.
    """
    texts = {
        "table.md": _markdown(table),
        "table.tex": _latex(table),
        "table.csv": _csv(_rows(table)),
        "comparisons.csv": _csv(_comparison_rows(table)),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


COMPARED = (
    "Differences, with 95 % confidence intervals; * p < 0.05 after Holm's correction over the comparisons of a metric"
)
JUDGED = "Controls: loss per token with minus without the control, in nats"


def heading(table: Table) -> str:
    """The caption of the main table."""
    return f"{table.split}: mean ± half of the 95 % confidence interval over dialogues and seeds († only over seeds)"


def grid(table: Table) -> list[list[str]]:
    """Header and rows of the main table as text."""
    rows = [
        [
            *(c.levels[key] for key in table.keys),
            str(len(c.runs)),
            *(_cell(name, c.scores.get(name), name in c.over_seeds) for name in table.metrics),
            *(f"{value:,.0f}" for value in costs(c).values()),
        ]
        for c in table.configurations
    ]
    return [[*table.keys, "seeds", *table.metrics, *COSTS], *rows]


def comparison_grid(table: Table) -> list[list[str]]:
    """Header and rows of the comparisons: a row per pair, a column per metric."""
    metrics = list(dict.fromkeys(c.metric for c in table.comparisons))
    pairs: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for c in table.comparisons:
        pairs[c.treated, c.baseline][c.metric] = difference(c)
    rows = [[f"{a} - {b}", *(cells.get(m, "-") for m in metrics)] for (a, b), cells in pairs.items()]
    return [["difference", *metrics], *rows]


def difference(comparison: Comparison) -> str:
    """A difference with its interval, and a star if it is significant."""
    digits = _digits(comparison.metric)
    e = comparison.effect
    interval = "" if math.isnan(e.low) else f" [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"
    return f"{e.mean:+.{digits}f}{interval}{' *' if comparison.adjusted < 0.05 else ''}"


def verdict_grid(table: Table) -> list[list[str]]:
    """Header and rows of the controls."""
    rows = []
    for v in table.verdicts:
        is_same = set(v.per_run.values()) == {v.verdict}
        seeds = f"all {len(v.per_run)}" if is_same else ", ".join(f"{seed}: {said}" for seed, said in v.per_run.items())
        cost = f"{v.effect.mean:+z.4f} [{v.effect.low:z.4f}, {v.effect.high:z.4f}]"
        rows.append([v.configuration, v.control, v.verdict, cost, seeds])
    return [["configuration", "control", "verdict", "nats per token [95 %]", "seeds"], *rows]


def best(table: Table, metric: str) -> Configuration | None:
    """The configuration with the best mean, if the metric has a direction and there is no tie at the digits shown."""
    direction = direction_of(metric)
    means = [
        (direction * round(c.scores[metric].mean, _digits(metric)), c)
        for c in table.configurations
        if metric in c.scores and not math.isnan(c.scores[metric].mean)
    ]
    highest = max((mean for mean, _ in means), default=0.0)
    winners = [c for mean, c in means if mean == highest]
    return winners[0] if direction and len(winners) == 1 and len(means) > 1 else None


def footer(table: Table) -> list[str]:
    """Notes and excluded runs, a line each."""
    return [*(f"Note: {note}" for note in table.notes), *(f"Excluded: {line}" for line in table.left_out)]


def _digits(metric: str) -> int:
    return 1 if metric.endswith("%") else 3


def _cell(name: str, score: Effect | None, is_over_seeds: bool) -> str:
    if score is None or math.isnan(score.mean):
        return "-"
    digits = _digits(name)
    if math.isnan(score.low):
        return f"{score.mean:.{digits}f}"
    return f"{score.mean:.{digits}f} ± {score.high - score.mean:.{digits}f}{'†' if is_over_seeds else ''}"


def _rows(table: Table) -> list[dict[str, object]]:
    """Machine-readable rows: no rounding, no thousands separators; costs last."""
    return [
        {
            **c.levels,
            "seeds": len(c.runs),
            **{
                column: value
                for name in table.metrics
                for column, value in zip(
                    (name, f"{name} low", f"{name} high"), _numbers(c.scores.get(name)), strict=True
                )
            },
            **costs(c),
        }
        for c in table.configurations
    ]


def _numbers(score: Effect | None) -> list[float | str]:
    numbers = [score.mean, score.low, score.high] if score is not None else [math.nan] * 3
    return ["" if math.isnan(number) else number for number in numbers]


def _comparison_rows(table: Table) -> list[dict[str, object]]:
    return [
        {
            "key": c.key,
            "treated": c.treated,
            "baseline": c.baseline,
            "metric": c.metric,
            "difference": c.effect.mean,
            "low": c.effect.low,
            "high": c.effect.high,
            "p_value": c.effect.p_value,
            "p_value_holm": c.adjusted,
            "effect_size_d": c.size,
            "verdict": c.mark,
        }
        for c in table.comparisons
    ]


def _csv(rows: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _markdown(table: Table) -> str:
    parts = [f"{heading(table)}.", _markdown_grid(grid(table))]
    if table.comparisons:
        parts += [f"{COMPARED}.", _markdown_grid(comparison_grid(table))]
    if table.verdicts:
        parts += [f"{JUDGED}.", _markdown_grid(verdict_grid(table))]
    if table.followed:
        parts += [f"{FOLLOWED}.", _markdown_grid(followed_grid(table.followed))]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in footer(table))]).rstrip() + "\n"


def _markdown_grid(cells: list[list[str]]) -> str:
    head, *rows = [[text.replace("|", "\\|") for text in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _latex(table: Table) -> str:
    """The main table for a paper (package booktabs); the best mean of each metric is bold."""
    head, *rows = grid(table)
    first = len(table.keys) + 1
    lines = [
        "% Needs \\usepackage{booktabs}.",
        f"% {heading(table)}.",
        f"\\begin{{tabular}}{{{'l' * len(table.keys)}{'r' * (len(head) - len(table.keys))}}}",
        "\\toprule",
        " & ".join(map(_escaped, head)) + " \\\\",
        "\\midrule",
    ]
    winners = {first + i: best(table, name) for i, name in enumerate(table.metrics)}
    for configuration, row in zip(table.configurations, rows, strict=True):
        cells = [
            f"\\textbf{{{_escaped(cell)}}}" if winners.get(i) is configuration else _escaped(cell)
            for i, cell in enumerate(row)
        ]
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
}


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _print_grid(cells: list[list[str]], console: Console) -> None:
    """A grid; if too wide for the console, transposed, then split into parts that fit, each with the first column."""
    if not _fits(cells, console):
        cells = [list(column) for column in zip(*cells, strict=True)]
    first, shown = 1, 1
    for end in range(2, len(cells[0]) + 1):
        part = [[row[0], *row[first:end]] for row in cells]
        if end > first + 1 and not _fits(part, console):
            console.print(_rich_table([[row[0], *row[first:shown]] for row in cells]))
            first = shown
        shown = end
    console.print(_rich_table([[row[0], *row[first:shown]] for row in cells]))


def _fits(cells: list[list[str]], console: Console) -> bool:
    # Measured with unlimited width; the default stops at the console's.
    return console.measure(_rich_table(cells), options=console.options.update(width=100_000)).maximum <= console.width


def _rich_table(cells: list[list[str]]) -> RichTable:
    shown = RichTable(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # Text objects: a value such as [red] would otherwise be read as markup.
    for title in cells[0]:
        shown.add_column(Text(title), overflow="fold")
    for row in cells[1:]:
        shown.add_row(*map(Text, row))
    return shown
