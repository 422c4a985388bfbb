"""A report -> one self-contained HTML page: table, effects, curves, examples, costs, commands."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msenc.pages.render import data_uri, render
from msenc.report.compare import Configuration
from msenc.report.layouts import (
    COMPARED,
    COST_HEADING,
    JUDGED,
    NOISE,
    comparison_grid,
    cost_grid,
    grid,
    heading,
    noise_grid,
    possible,
    verdict_grid,
)
from msenc.report.listening.heard import METHOD, TITLES, heard_grid
from msenc.report.panels.browse import browse
from msenc.report.panels.examples import find_examples
from msenc.report.panels.followed import followed_grid
from msenc.report.panels.layers import LAYERS, layer_grid
from msenc.report.panels.traces import trace_panel
from msenc.report.panels.trials import Trials, best_line, trial_grid
from msenc.report.plots import effects, learning_curves, svg
from msenc.report.table import Table
from msenc.runs.sweep import sweep_command
from msenc.work.command import as_typed

BASELINES = ("majority", "previous", "speaker")

GROUPS = {
    "Loss of the reference": ("nll", "perplexity", "token_accuracy"),
    "Planted words": ("planted/",),
    "Voice descriptions": ("description/",),
    "Speech": ("speech/",),
}
"""Heading -> how the names of its metrics begin; all others are of the replies' words."""

MOST_NAMED, MOST_CHARACTERS = 5, 80
"""Of configurations in a title."""


def render_page(
    table: Table,
    title: str | None,
    folders: Sequence[Path],
    options: Sequence[str] = (),
    searches: Sequence[Trials] = (),
) -> str:
    """The page's HTML; content of the runs is escaped and never executed.

    Args:
        table: what `summarise` found.
        title: of the page; None: what is compared.
        folders: the reported ones; the page will lie in the first one's ``report``.
        options: of `report.py` beside the folders and the split, for the commands.
        searches: whose trials are listed.
    """
    examples, media_notes = find_examples(table.configurations, table.split)
    curves = learning_curves(table.configurations, table.style)
    figures = effects(table.comparisons, table.configurations, table.style)
    browsed, browse_notes = browse(table.configurations, table.split, table.style, folders[0] / "report")
    return render(
        "report",
        title=title or title_of(table),
        table=table,
        heading=heading(table),
        searches=[(best_line(trials), trial_grid(trials)) for trials in searches],
        summary=_summary(table),
        main=_transposed(table),
        names=list(table.style.rows(table.configurations).values()),
        cost_heading=COST_HEADING,
        costs=cost_grid(table),
        key_count=len(table.keys),
        compared=COMPARED,
        differences=_transpose(comparison_grid(table)) if table.comparisons else None,
        forests=[(table.style.name(metric), _image(svg(figure))) for metric, figure in figures.items()],
        curves=_image(svg(curves)) if curves else None,
        attributes=_attributes(table.configurations),
        judged=JUDGED,
        verdicts=verdict_grid(table) if table.verdicts else None,
        followed=followed_grid(table.followed) if table.followed else None,
        traces=[
            {**panel, "plots": [(stream, _image(plot)) for stream, plot in panel["plots"]]}
            for panel in trace_panel(table.configurations)
        ],
        heard=heard_grid(table.heard, table.style.rows(table.configurations)) if table.heard else None,
        heard_heading=f"{TITLES[table.heard.kind]}; {METHOD}" if table.heard else "",
        layers_heading=LAYERS,
        layers=layer_grid(table.configurations),
        noise_heading=NOISE,
        noise=noise_grid(table) if table.floor else None,
        examples=examples,
        browsed=browsed,
        browse_notes=browse_notes,
        media_notes=media_notes,
        commands=_commands(table, folders, options),
    )


def _summary(table: Table) -> list[str]:
    """A line per comparison of the loss: which difference is significant."""
    losses = [c for c in table.comparisons if c.metric == "nll"]
    lines, names = [], table.style.rows(table.configurations)
    for c in losses:
        e = c.effect
        said = {"better": "is better than", "worse": "is worse than"}.get(c.mark, "is not shown to differ from")
        lines.append(
            f"{names[c.treated]} {said} {names[c.baseline]}: {e.mean:+.3f} nats per token [{e.low:+.3f}, "
            f"{e.high:+.3f}], p = {c.adjusted:.2g}, d = {c.size:+.2f}"
            + "".join(f"; {more}" for more in possible(table, c))
        )
    return lines


def title_of(table: Table) -> str:
    """What is compared, in words."""
    configurations = table.configurations
    evaluation = configurations[0].evaluations[0]
    counts = sorted({len(c.runs) for c in configurations})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    seeds = "1 seed each" if counts == [1] else f"{number} seeds each"
    where = f"{evaluation.data} ({evaluation.split} split, {seeds})"
    if not table.keys:
        return f"Runs that differ in the seed alone, on {where.replace(' each', '')}"
    names = list(table.style.rows(configurations).values())
    keys = " and ".join(map(table.style.name, table.keys))
    if len(names) > MOST_NAMED or sum(map(len, names)) > MOST_CHARACTERS:
        return f"Comparison of {len(names)} settings of {keys} on {where}"
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"Comparison of {listed} ({keys}) on {where}"


def _image(svg: str) -> str:
    return data_uri("image/svg+xml", svg.encode())


def _transpose(cells: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*cells, strict=True)]


def _transposed(table: Table) -> dict[str, Any]:
    """The main table with a column per configuration (few of these, and many metrics), in groups of metrics."""
    rows = _transpose(grid(table))
    keys = len(table.keys)
    groups: dict[str, list[Any]] = {}
    for metric, row in zip(table.metrics, rows[keys + 1 :], strict=True):
        group = next((name for name, begin in GROUPS.items() if metric.startswith(begin)), "Words of the replies")
        leader = table.leaders.get(metric)
        groups.setdefault(group, []).append((row, table.configurations.index(leader) if leader else None))
    return {
        "head": rows[:keys] or [["", *(table.style.row(c) for c in table.configurations)]],
        "seeds": rows[keys],
        "groups": groups,
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


def _commands(table: Table, folders: Sequence[Path], options: Sequence[str]) -> list[str]:
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
    commands.append(shlex.join(["python", "report.py", argument, f"split={table.split}", *options]))
    return [as_typed(command) for command in commands]
