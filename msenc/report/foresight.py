"""The finished runs of a sweep -> what all of its jobs together will be able to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msenc.evaluation.power import ALPHA
from msenc.report.collect import parse_overrides, read_runs
from msenc.report.compare import DEFAULT, Configuration, difference_of, pairs_to_compare
from msenc.report.plots import PLOTTED
from msenc.report.table import Table, summarise
from msenc.types import MsencError

MORE_SEEDS = (5, 10, 20)


def foresee(
    jobs: Sequence[Sequence[str]],
    finished: Mapping[Path, Sequence[str]],
    axes: Sequence[str],
    split: str,
    margins: Mapping[str, float],
) -> tuple[str, list[list[str]]]:
    """What differences the jobs of a sweep will show with 80 % power.

    Args:
        jobs: overrides of each.
        finished: folders of the finished ones, with their overrides.
        axes: the varied keys.
        split: that is evaluated.
        margins: metric -> a difference for which the seeds needed are listed too.

    Returns:
        Heading, and header and rows of the grid.

    Raises:
        MsencError: the finished runs do not tell, and why.
    """
    if not finished:
        raise MsencError("no job is finished yet; from two seeds of two rows on, they tell it")
    table = summarise(read_runs(finished, Path.cwd()), split=split, margins=margins)
    keys = [key for key in axes if key != "seed"]

    def levels(overrides: Mapping[str, str]) -> dict[str, str]:
        return {key: overrides.get(key, DEFAULT) for key in keys}

    seeds: dict[tuple[str, ...], set[str]] = {}
    for job in map(parse_overrides, jobs):
        seeds.setdefault(tuple(levels(job).values()), set()).add(job.get("seed", DEFAULT))
    planned = [Configuration(dict(zip(keys, values, strict=True)), [], [], []) for values in seeds]
    measured = {tuple(levels(c.runs[0].overrides).values()): c for c in table.configurations}
    pairs = [
        (a, b, measured[of_a], measured[of_b])
        for _, a, b in pairs_to_compare(planned)
        if (of_a := tuple(a.levels.values())) in measured and (of_b := tuple(b.levels.values())) in measured
    ]
    rows, alpha = [], ALPHA / max(len(pairs_to_compare(planned)), 1)
    for treated, baseline, first, second in pairs:
        own = tuple(len(seeds[tuple(c.levels.values())]) for c in (treated, baseline))
        for metric in table.metrics:
            if not metric.startswith((*PLOTTED, *margins)) or not {metric} <= {*first.scores} & {*second.scores}:
                continue
            _, _, spread = difference_of(first, second, metric)
            if spread is None or max(spread.seeds) < 2 or min(own) < 2:
                continue
            shown = [spread.planned(n).detectable(alpha=alpha) for n in (own, *MORE_SEEDS)]
            needed = ""
            if metric in margins:
                count = spread.seeds_needed(margins[metric], alpha=alpha)
                needed = f"{'no number' if count is None else count} for {margins[metric]:g}"
            cells = [table.style.number(metric, value) for value in shown]
            rows.append([f"{treated.name} - {baseline.name}", metric, *cells, *([needed] if margins else [])])
    if not rows:
        raise MsencError("two rows with two finished seeds each are needed, and two planned seeds")
    head = ["difference", "metric", "these jobs", *(f"{n} seeds each" for n in MORE_SEEDS)]
    return _heading(table), [[*head, *(["seeds needed"] if margins else [])], *rows]


def _heading(table: Table) -> str:
    items = next((i for c in table.configurations for i in c.items if i is not None), None)
    dialogues = f", {len(set(items.dialogues))} dialogues" if items is not None else ""
    runs = sum(len(c.runs) for c in table.configurations)
    return (
        f"Differences that will be significant with 80 % power, after correction, by the spread of {runs} finished "
        f"runs ({table.split}{dialogues})"
    )
