"""A report -> one self-contained HTML page: table, effects, curves, examples, costs, commands."""

import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msenc.pages.render import data_uri, render
from msenc.report.compare import Comparison, Configuration
from msenc.report.examples import find_examples
from msenc.report.plots import forest, learning_curves
from msenc.report.table import (
    COMPARED,
    COSTS,
    JUDGED,
    Table,
    best,
    comparison_grid,
    grid,
    heading,
    verdict_grid,
)
from msenc.report.traces import trace_panel
from msenc.runs.sweep import sweep_command
from msenc.work.command import as_typed

BASELINES = ("majority", "previous", "speaker")
PLOTTED = ("nll", "planted/", "rouge_l", "description/accuracy")
"""Metrics whose effects are drawn; all are in the table of differences."""


def render_page(table: Table, title: str, folders: Sequence[Path]) -> str:
    """The page's HTML; content of the runs is escaped and never executed.

    Args:
        table: what `summarise` found.
        title: of the page.
        folders: the reported ones, for the commands.
    """
    examples, media_notes = find_examples(table.configurations, table.split)
    curves = learning_curves(table.configurations)
    return render(
        "report",
        title=title,
        table=table,
        heading=heading(table),
        summary=_summary(table),
        main=_transposed(table),
        cost_names=COSTS,
        compared=COMPARED,
        differences=_transpose(comparison_grid(table)) if table.comparisons else None,
        forests=[(metric, _image(forest(metric, found))) for metric, found in _by_metric(table.comparisons).items()],
        curves=_image(curves) if curves else None,
        attributes=_attributes(table.configurations),
        judged=JUDGED,
        verdicts=verdict_grid(table) if table.verdicts else None,
        traces=[
            {**panel, "plots": [(stream, _image(svg)) for stream, svg in panel["plots"]]}
            for panel in trace_panel(table.configurations)
        ],
        examples=examples,
        media_notes=media_notes,
        commands=_commands(table, folders),
    )


def _summary(table: Table) -> list[str]:
    """A line per comparison of the loss: which difference is significant."""
    losses = [c for c in table.comparisons if c.metric == "nll"]
    lines = []
    for c in losses:
        e = c.effect
        said = {"better": "is better than", "worse": "is worse than"}.get(c.mark, "is not shown to differ from")
        lines.append(
            f"{c.treated} {said} {c.baseline}: {e.mean:+.3f} nats per token [{e.low:+.3f}, {e.high:+.3f}], "
            f"p = {c.adjusted:.2g}, d = {c.size:+.2f}"
        )
    return lines


def _by_metric(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = defaultdict(list)
    for c in comparisons:
        if c.metric.startswith(PLOTTED):
            found[c.metric].append(c)
    return found


def _image(svg: str) -> str:
    return data_uri("image/svg+xml", svg.encode())


def _transpose(cells: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*cells, strict=True)]


def _transposed(table: Table) -> dict[str, Any]:
    """The main table with a column per configuration: few of these, and many metrics."""
    rows = _transpose(grid(table))
    names = [row[0] for row in rows]
    winners = {name: table.configurations.index(winner) for name in table.metrics if (winner := best(table, name))}
    keys = max(len(table.keys), 1)
    return {
        "head": rows[:keys] if table.keys else [["", *(c.name for c in table.configurations)]],
        "body": [(row, winners.get(name)) for name, row in zip(names, rows, strict=True) if name not in table.keys],
    }


def _attributes(configurations: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Accuracy of the replies' voice descriptions per attribute, next to baselines that ignore the input."""
    names = dict.fromkeys(
        name.split("/")[1]
        for c in configurations
        for e in c.evaluations
        for name in e.metrics
        if name.startswith("description/") and name.endswith("/accuracy") and name.count("/") == 2
    )
    rows = []
    for attribute in names:
        prefix = f"description/{attribute}/accuracy"
        of_rules = configurations[0].evaluations[0].metrics
        rows.append(
            {
                "attribute": attribute,
                "rules": [of_rules.get(f"{prefix}_{rule}") for rule in BASELINES],
                "scores": [_mean([e.metrics.get(prefix) for e in c.evaluations]) for c in configurations],
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _commands(table: Table, folders: Sequence[Path]) -> list[str]:
    """The commands of the runs and of this report."""
    commands = []
    for folder in folders:
        if (folder / "sweep.json").is_file():
            commands.append(shlex.join(["python", "train.py", *sweep_command(folder)]))
    if not commands:
        for c in table.configurations:
            for run in c.runs:
                overrides = [f"{k}={v}" for k, v in run.overrides.items()]
                seed = [] if "seed" in run.overrides else [f"seed={run.seed}"]
                commands.append(shlex.join(["python", "train.py", *overrides, *seed]))
    places = ",".join(map(str, folders))
    argument = f"sweep_dir={places}" if len(folders) == 1 else f"sweep_dir=[{places}]"
    commands.append(shlex.join(["python", "report.py", argument, f"split={table.split}"]))
    return [as_typed(command) for command in commands]
