"""Plots of a report: effects with their intervals, and curves of training; SVG for the page, PDF for a paper."""

import csv
import io
import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msenc.files import read_text, whole
from msenc.report.compare import Comparison, Configuration, direction_of
from msenc.report.style import Style
from msenc.types import MsencError

# Okabe and Ito's colours: distinguishable with any colour vision, and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS = "osD^v<>P"
MAX_EPOCHS = 10**6
"""Whether an axis can show it."""


PLOTTED = ("nll", "planted/", "rouge_l", "description/accuracy")
"""Metrics whose effects are drawn; all are in the table of differences."""


def effects(comparisons: Sequence[Comparison], configurations: Sequence[Configuration], style: Style) -> dict[str, Any]:
    """Metric -> `forest` of it, for those that are drawn."""
    names = style.rows(configurations)
    found: dict[str, list[Comparison]] = defaultdict(list)
    for c in comparisons:
        if c.metric.startswith(PLOTTED):
            found[c.metric].append(c)
    return {metric: forest(metric, of_metric, names, style) for metric, of_metric in found.items()}


def write_figures(
    comparisons: Sequence[Comparison], configurations: Sequence[Configuration], style: Style, folder: Path
) -> list[Path]:
    """Write each figure of the page as a PDF into a folder; returns their paths."""
    found = effects(comparisons, configurations, style)
    figures = {f"effect-{metric}": figure for metric, figure in found.items()}
    curves = learning_curves(configurations, style)
    if curves is not None:
        figures["learning-curves"] = curves
    paths = []
    for name, figure in figures.items():
        path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-.')}.pdf"
        with whole(path) as partial:
            # No date: the same runs give the same file.
            figure.savefig(partial, format="pdf", metadata={"CreationDate": None})
        paths.append(path)
    return paths


def forest(metric: str, comparisons: Sequence[Comparison], names: Mapping[str, str], style: Style) -> Any:
    """A row per comparison: the difference as a point, its interval as a line; filled if significant.

    Args:
        metric: what is compared.
        comparisons: the rows.
        names: a configuration's name -> what is written for it.
        style: how the rest is written.
    """
    figure, axes = _figure(5.2, 0.9 + 0.42 * len(comparisons))

    def scaled(value: float) -> float:
        return style.scaled(metric, value)

    for row, c in enumerate(comparisons):
        colour = {"better": COLOURS[2], "worse": COLOURS[1]}.get(c.mark, "#666666")
        if not math.isnan(c.effect.low):
            axes.plot(
                [scaled(c.effect.low), scaled(c.effect.high)],
                [row, row],
                color=colour,
                linewidth=2,
                solid_capstyle="butt",
            )
        filled = colour if c.mark in ("better", "worse", "differs") else "white"
        axes.plot([scaled(c.effect.mean)], [row], "o", color=colour, markerfacecolor=filled, markersize=7)
    axes.axvline(0, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_yticks(
        range(len(comparisons)), [f"{_short(names[c.treated])}\n- {_short(names[c.baseline])}" for c in comparisons]
    )
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    numbers = (scaled(v) for c in comparisons for v in (c.effect.low, c.effect.high, c.effect.mean))
    reach = max((abs(v) for v in numbers if v == v), default=0)
    axes.set_xlim(-1.08 * reach or -1, 1.08 * reach or 1)  # 0 in the middle: the side shows the direction
    axes.locator_params(axis="x", nbins=5)
    better = {1: " (right is better)", -1: " (left is better)"}.get(direction_of(metric), "")
    axes.set_xlabel(f"difference in {style.name(metric)}{better}")
    return figure


def learning_curves(configurations: Sequence[Configuration], style: Style) -> Any | None:
    """Validation loss by epoch: a thin line per run, a marked one for their mean; None if nothing was logged."""
    curves = [(style.row(c), [curve for run in c.runs if (curve := read_curve(run.folder))]) for c in configurations]
    if not any(found for _, found in curves):
        return None
    figure, axes = _figure(6.5, 3.6)
    for number, (name, found) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        for curve in found if len(found) > 1 else []:
            axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.35, linewidth=0.8)
        epochs = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
        means = [sum(curve[e] for curve in found) / len(found) for e in epochs]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(epochs, means, color=colour, marker=marker, markersize=4, linewidth=1.6, label=_short(name))
    axes.set_xlabel("epochs trained")
    axes.set_ylabel("validation loss, nats per token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)
    return figure


def trace_plot(labels: Mapping[str, Any]) -> str:
    """Bits of each label that probes find at each station, with intervals; on the right, those that replies use."""
    stations = [station["station"] for station in next(iter(labels.values()))["stations"]]
    figure, axes = _figure(6.5, 3.4)
    for number, (name, label) in enumerate(labels.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        points = [*label["stations"], label["used"]]
        places = [*range(len(stations)), len(stations) + 1]
        layers = [i for i, station in enumerate(stations) if station.startswith("encoder ")]
        axes.plot(layers, [points[i]["mean"] for i in layers], color=colour, marker=marker, markersize=4, linewidth=1.4)
        for kind in ("encoder connector slots", "reply"):  # no line leads from the one token to the other
            own = [i for i, s in enumerate(stations) if s.split()[0] in kind and not s.startswith("encoder ")]
            axes.plot(own, [points[i]["mean"] for i in own], color=colour, marker=marker, markersize=4, linewidth=1.4)
        axes.plot(
            places[-1:],
            [points[-1]["mean"]],
            marker,
            color=colour,
            markersize=7,
            label=_short(name, 24).replace("$", r"\$"),
        )
        for place, point in zip(places, points, strict=True):
            if point["low"] is not None:
                axes.plot([place, place], [point["low"], point["high"]], color=colour, alpha=0.5, linewidth=1.2)
    names = [station.replace("slots 0", "LLM in").removeprefix("slots ") for station in stations]
    names = [name if name == "reply 1" else name.removeprefix("reply ") for name in names]
    names = [name if i == 0 else name.removeprefix("encoder ") for i, name in enumerate(names)]
    step = max(1, len(names) // 16)
    shown = [i for i, name in enumerate(names) if not name.isdigit() or int(name) % step == 0]
    axes.set_xticks([*shown, len(stations) + 1], [*(names[i] for i in shown), "used"], fontsize=8)
    axes.tick_params(axis="x", labelrotation=90)
    axes.axhline(0, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_ylabel("bits")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def read_curve(run_dir: Path) -> dict[int, float]:
    """Epochs trained -> validation loss, of the run's CSV log; of an epoch logged twice the last counts."""
    curve: dict[int, float] = defaultdict(float)
    for path in sorted(run_dir.glob("logs/**/metrics.csv")):
        try:
            for row in csv.DictReader(io.StringIO(read_text(path))):
                with suppress(KeyError, TypeError, ValueError):  # a row of the training loss
                    epoch, loss = int(row["epoch"]), float(row["val/loss"])
                    if math.isfinite(loss) and 0 <= epoch < MAX_EPOCHS:
                        curve[epoch + 1] = loss
        except csv.Error as error:
            raise MsencError(f"{path}: cannot be read as CSV ({error}). Move it away to report without it.") from error
    return dict(curve)


def _short(name: str, most: int = 36) -> str:
    """A name with its middle elided if it is long (such as a path), to leave room for the plot."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every font that a PDF embeds
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "msenc", "font.family": "sans-serif"}
    matplotlib.rcParams["pdf.fonttype"] = 42  # TrueType, which publishers ask for
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Any) -> str:
    """A figure as SVG."""
    text = io.StringIO()
    # No date: the same runs give the same file.
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
