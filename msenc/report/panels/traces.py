"""``trace.json`` of the chosen evaluations -> where each label is lost, as a plot for each stream and a list."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from msenc.evaluation.trace import FILE, read_trace
from msenc.report.compare import Configuration
from msenc.report.plots import trace_plot


def trace_panel(configurations: Sequence[Configuration]) -> list[dict[str, Any]]:
    """For each configuration with a traced run: its ``name``, ``plots`` (of its first such run), and ``verdicts``.

    A verdict is given once where all seeds agree on the place, else for each seed.

    Raises:
        MsencError: a trace cannot be read.
    """
    panels = []
    for configuration in configurations:
        traced = {
            run.seed: read_trace(evaluation.folder / FILE)["streams"]
            for run, evaluation in zip(configuration.runs, configuration.evaluations, strict=True)
            if (evaluation.folder / FILE).is_file()
        }
        if not traced:
            continue
        first = next(iter(traced.values()))
        plots = [
            (stream, trace_plot({name: label for name, label in facts["labels"].items() if label["stations"]}))
            for stream, facts in first.items()
            if any(label["stations"] for label in facts["labels"].values())
        ]
        panels.append({"name": configuration.name, "plots": plots, "verdicts": _verdicts(traced)})
    return panels


def _verdicts(traced: dict[int, Any]) -> list[str]:
    said: dict[tuple[str, str], dict[int, tuple[str, str]]] = defaultdict(dict)
    for seed, streams in traced.items():
        for stream, facts in streams.items():
            for name, label in facts["labels"].items():
                said[stream, name][seed] = label["lost_at"], label["verdict"]
    lines = []
    for of_seeds in said.values():
        if len({place for place, _ in of_seeds.values()}) == 1:
            (seed, (_, verdict)), *others = of_seeds.items()
            lines.append(verdict + (f" (seed {seed}; {len(others)} more at the same place)" if others else ""))
        else:
            lines += [f"seed {seed}: {verdict}" for seed, (_, verdict) in of_seeds.items()]
    return lines
