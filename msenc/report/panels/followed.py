"""What each configuration follows where words, voice and face contradict each other, over its seeds."""

from collections.abc import Sequence
from typing import Any

from msenc.evaluation.conflict import conflict_cells, read_conflict, shares_of
from msenc.report.compare import Configuration

FOLLOWED = "What is followed where the words contradict voice or face, in % of the items"


def find_followed(configurations: Sequence[Configuration]) -> tuple[list[dict[str, Any]], list[str]]:
    """The shares of each configuration that was measured (`evaluate.py conflict=true`), and notes on missing runs."""
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    for configuration in configurations:
        measured = [
            (run, rows)
            for run, evaluation in zip(configuration.runs, configuration.evaluations, strict=True)
            if (rows := read_conflict(evaluation.folder))
        ]
        if not measured:
            continue
        items = [[(r["stream"], r["label"], r["dialogue"], r["turn"]) for r in rows] for _, rows in measured]
        same = [(run, rows) for (run, rows), of_run in zip(measured, items, strict=True) if of_run == items[0]]
        if len(same) < len(configuration.runs):
            seeds = ", ".join(str(run.seed) for run, _ in same)
            notes.append(
                f"{configuration.name}: what it follows is that of the seeds {seeds}; others lack these items."
            )
        found += [{"configuration": configuration.name, **one} for one in shares_of([rows for _, rows in same])]
    return found, notes


def followed_grid(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and rows of the shares."""
    head, *rows = conflict_cells(found)
    return [["configuration", *head], *([one["configuration"], *row] for one, row in zip(found, rows, strict=True))]
