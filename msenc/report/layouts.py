"""A report's tables as text: on the console, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from msenc.files import write_text
from msenc.report.compare import Comparison, Configuration
from msenc.report.listening.heard import METHOD, TITLES, heard_grid
from msenc.report.panels.followed import FOLLOWED, followed_grid
from msenc.report.panels.layers import LAYERS, layer_grid
from msenc.report.style import COSTS
from msenc.report.table import Table, costs

COMPARED = (
    "Differences, with 95 % confidence intervals; * p < 0.05 after Holm's correction over the comparisons of a metric. "
    "Where not significant: what the difference is at most (by 95 %), and what as many seeds and dialogues would show "
    "with 80 % power"
)
JUDGED = "Controls: loss per token with minus without the control, in nats"
COST_HEADING = "Costs: means over seeds; of memory the most"
NOISE = (
    "Noise floor: standard deviation of runs that are alike but for the seed, and the smallest difference worth "
    "talking about, which two such runs (or means of as many) exceed in 5 of 100 cases"
)
SPREADS = {
    "ci": "mean ± half of the 95 % confidence interval over dialogues and seeds († only over seeds)",
    "sd": "mean ± standard deviation between seeds",
}
BOLD = "Bold: the best, where its difference to the next is significant (p < 0.05 after Holm's correction)"

COLUMN_PT, TEXT_PT = 219, 455
"""Width of a column and of the text on a page of two columns: the narrowest of the usual ones, ACL's."""
CHARACTER_PT, GAP_PT = 4.75, 8
"""Of a digit in \\small, and between columns as set below."""


def print_table(table: Table, console: Console | None = None, layout: str | None = None) -> None:
    """Print everything, tables wider than the console in parts; or the paper's table alone, in a layout."""
    console = console or Console()
    if layout is not None:
        text = {"booktabs": _latex, "markdown": _markdown_scores, "csv": _csv_text}[layout](table)
        console.print(Text(text), soft_wrap=True, end="")
        return
    console.print(Text(heading(table), style="bold"))
    head, *rows = grid(table)
    cells = [
        [Text(cell, style="bold" if is_bold else "") for cell, is_bold in zip(row, bold, strict=True)]
        for row, bold in zip(rows, bold_cells(table), strict=True)
    ]
    print_grid([head, *cells], console)
    console.print(Text(COST_HEADING, style="bold"))
    print_grid(cost_grid(table), console)
    for title, cells in _sections(table):
        console.print(Text(title, style="bold"))
        print_grid(cells, console)
    for line in footer(table):
        console.print(Text(line), soft_wrap=True)


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `table.md`, `table.tex`, `table.csv` and `comparisons.csv` into a folder.

    Numbers of the CSV files are rounded only where the style says how.

    Returns:
        Their paths; earlier files of these names are replaced.
    """
    texts = {
        "table.md": _markdown(table),
        "table.tex": _latex(table),
        "table.csv": _csv_text(table),
        "comparisons.csv": csv_of(_comparison_rows(table)),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _sections(table: Table) -> list[tuple[str, list[list[str]]]]:
    sections = []
    if table.comparisons:
        sections.append((COMPARED, comparison_grid(table)))
    if table.verdicts:
        sections.append((JUDGED, verdict_grid(table)))
    if table.followed:
        sections.append((FOLLOWED, followed_grid(table.followed)))
    if table.heard is not None:
        names = table.style.rows(table.configurations)
        sections.append((f"{TITLES[table.heard.kind]}; {METHOD}", heard_grid(table.heard, names)))
    if layers := layer_grid(table.configurations):
        sections.append((LAYERS, layers))
    if table.floor is not None:
        sections.append((NOISE, noise_grid(table)))
    return sections


def heading(table: Table) -> str:
    """The caption of the main table."""
    bold = f". {BOLD}" if len(table.configurations) > 1 else ""
    return f"{table.split}: {SPREADS[table.style.spread]}{bold}"


def grid(table: Table) -> list[list[str]]:
    """Header and rows of the main table as text."""
    style = table.style
    rows = [
        [*_levels(table, c), str(len(c.runs)), *(score(table, c, metric) for metric in table.metrics)]
        for c in table.configurations
    ]
    return [[*map(style.name, [*table.keys, "seeds"]), *map(style.header, table.metrics)], *rows]


def cost_grid(table: Table) -> list[list[str]]:
    """Header and rows of what the runs took."""
    rows = [[*_levels(table, c), *(f"{value:,.0f}" for value in costs(c).values())] for c in table.configurations]
    return [[*map(table.style.name, [*table.keys, *COSTS])], *rows]


def _levels(table: Table, configuration: Configuration) -> list[str]:
    return [table.style.name(configuration.levels[key]) for key in table.keys]


def score(table: Table, configuration: Configuration, metric: str) -> str:
    """A mean with its spread."""
    found = configuration.scores.get(metric)
    if found is None or math.isnan(found.mean):
        return "-"
    is_sd = table.style.spread == "sd"
    spread = configuration.deviation(metric) if is_sd else found.high - found.mean
    mean = table.style.number(metric, found.mean)
    if math.isnan(spread):
        return mean
    dagger = "†" if metric in configuration.over_seeds and not is_sd else ""
    return f"{mean} ± {table.style.number(metric, spread)}{dagger}"


def comparison_grid(table: Table) -> list[list[str]]:
    """Header and rows of the comparisons: a row per pair, a column per metric."""
    metrics = list(dict.fromkeys(c.metric for c in table.comparisons))
    pairs: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for c in table.comparisons:
        pairs[c.treated, c.baseline][c.metric] = "\n".join([difference(table, c), *possible(table, c)])
    names = table.style.rows(table.configurations)
    rows = [[f"{names[a]} - {names[b]}", *(cells.get(m, "-") for m in metrics)] for (a, b), cells in pairs.items()]
    return [["difference", *map(table.style.header, metrics)], *rows]


def difference(table: Table, comparison: Comparison) -> str:
    """A difference with its interval, and a star if it is significant."""
    e = comparison.effect
    mean, low, high = (table.style.number(comparison.metric, value, "+") for value in (e.mean, e.low, e.high))
    interval = "" if math.isnan(e.low) else f" [{low}, {high}]"
    return f"{mean}{interval}{'' if comparison.mark in ('not shown', 'not tested') else ' *'}"


def possible(table: Table, comparison: Comparison) -> list[str]:
    """What a difference that is not significant may be, what would show, and whether chance alone goes as far."""

    def number(value: float) -> str:
        return table.style.number(comparison.metric, value)

    c, said = comparison, []
    if c.mark == "not shown":
        said += [f"at most {number(c.effect.bound)}"] if math.isfinite(c.effect.bound) else []
        said += [f"{number(c.detectable)} would show"] if c.detectable > 0 else []
        if c.margin > 0 and not c.is_equivalent and not math.isnan(c.detectable):
            needed = "no number of seeds shows" if c.seeds_needed is None else f"{c.seeds_needed} seeds would show"
            said.append(f"{needed} {number(c.margin)}")
    if c.is_equivalent:
        said.append(f"equivalent within {number(c.margin)}")
    if c.is_noise:
        said.append(f"below the noise floor of {number(c.floor)}")
    return said


def verdict_grid(table: Table) -> list[list[str]]:
    """Header and rows of the controls."""
    rows, names = [], table.style.rows(table.configurations)
    for v in table.verdicts:
        is_same = set(v.per_run.values()) == {v.verdict}
        seeds = f"all {len(v.per_run)}" if is_same else ", ".join(f"{seed}: {said}" for seed, said in v.per_run.items())
        cost = f"{v.effect.mean:+z.4f} [{v.effect.low:z.4f}, {v.effect.high:z.4f}]"
        rows.append([names[v.configuration], v.control, v.verdict, cost, seeds])
    return [["configuration", "control", "verdict", "nats per token [95 %]", "seeds"], *rows]


def noise_grid(table: Table) -> list[list[str]]:
    """Header and rows of the noise floor: a row per metric."""
    floor, style = table.floor, table.style
    assert floor is not None
    several = max(len(c.runs) for c in table.configurations) if not table.is_of_noise else floor.seeds
    counts = list(dict.fromkeys([1, several]))
    threads = ["of these by threads alone"] if floor.of_threads else []
    rows = []
    for metric in table.metrics:
        if metric not in floor.deviations:
            continue
        of_threads = [style.number(metric, floor.of_threads[metric])] if threads else []
        smallest = [style.number(metric, floor.smallest(metric, (n, n))) for n in counts]
        rows.append([style.name(metric), style.number(metric, floor.deviations[metric]), *of_threads, *smallest])
    head = [f"{floor.seeds} seeds, {floor.runs} runs: deviation", *threads]
    return [["metric", *head, *("between single runs" if n == 1 else f"between means of {n}" for n in counts)], *rows]


def footer(table: Table) -> list[str]:
    """Notes, and runs that are excluded or not done, a line each."""
    return [
        *(f"Note: {note}" for note in table.notes),
        *(f"Study: {note}" for note in (table.heard.notes if table.heard else ())),
        *(f"Excluded: {line}" for line in table.left_out),
        *(f"Not done: {line}" for line in table.running),
    ]


# ---------------------------------------------------------------------------------------------------- CSV


def _csv_text(table: Table) -> str:
    """Machine-readable rows: no thousands separators; costs last."""
    style = table.style

    def number(metric: str, value: float) -> float | str:
        if math.isnan(value):
            return ""
        return style.scaled(metric, value) if style.given_digits(metric) is None else style.number(metric, value)

    rows = []
    for c in table.configurations:
        row: dict[str, object] = {style.name(key): style.name(level) for key, level in c.levels.items()}
        row[style.name("seeds")] = len(c.runs)
        for metric in table.metrics:
            found, name = c.scores.get(metric), style.name(metric)
            row[name] = number(metric, found.mean) if found else ""
            if style.spread == "sd":
                row[f"{name} sd"] = number(metric, c.deviation(metric)) if found else ""
            else:
                row[f"{name} low"], row[f"{name} high"] = (
                    (number(metric, found.low), number(metric, found.high)) if found else ("", "")
                )
        rows.append(row | {style.name(cost): value for cost, value in costs(c).items()})
    return csv_of(rows)


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
            "at_most": c.effect.bound if math.isfinite(c.effect.bound) else "",
            "detectable": _known(c.detectable),
            "margin": _known(c.margin),
            "equivalent": "" if math.isnan(c.margin) else c.is_equivalent,
            "seeds_needed": "" if c.seeds_needed is None else c.seeds_needed,
            "noise_floor": _known(c.floor),
        }
        for c in table.comparisons
    ]


def _known(value: float) -> float | str:
    return "" if math.isnan(value) else value


def csv_of(rows: Sequence[dict[str, object]]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------- Markdown


def _markdown(table: Table) -> str:
    parts = [_markdown_scores(table).rstrip(), f"{COST_HEADING}.", _markdown_grid(cost_grid(table))]
    for title, cells in _sections(table):
        parts += [f"{title}.", _markdown_grid(cells)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in footer(table))]).rstrip() + "\n"


def _markdown_scores(table: Table) -> str:
    head, *rows = grid(table)
    cells = [
        [f"**{cell}**" if is_bold else cell for cell, is_bold in zip(row, bold, strict=True)]
        for row, bold in zip(rows, bold_cells(table), strict=True)
    ]
    return f"{heading(table)}.\n\n{_markdown_grid([head, *cells])}\n"


def bold_cells(table: Table) -> list[list[bool]]:
    """Which cells of the rows of `grid` are bold."""
    before = [False] * (len(table.keys) + 1)
    return [[*before, *(table.leaders.get(m) is c for m in table.metrics)] for c in table.configurations]


def _markdown_grid(cells: list[list[str]]) -> str:
    head, *rows = [[text.replace("|", "\\|").replace("\n", "<br>") for text in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


# ---------------------------------------------------------------------------------------------------- LaTeX


def _latex(table: Table) -> str:
    """Scores and costs for a paper of two columns (package booktabs)."""
    labels = max(len(table.keys), 1)
    scores, bold = grid(table), [[False] * len(grid(table)[0]), *bold_cells(table)]
    caption = f"{heading(table)}."
    seeds = {len(c.runs) for c in table.configurations}
    if len(seeds) == 1 and table.keys:  # a column that says the same in every row
        scores, bold = ([[*row[:labels], *row[labels + 1 :]] for row in rows] for rows in (scores, bold))
        caption = f"{caption} {seeds.pop()} {table.style.name('seeds')} each."
    floats = [
        _float(scores, bold, labels, caption, "tab:scores"),
        _float(cost_grid(table), None, len(table.keys), f"{COST_HEADING}.", "tab:costs"),
    ]
    return "\n".join(["% Needs \\usepackage{booktabs}.", *floats])


def _float(cells: list[list[str]], bold: list[list[bool]] | None, labels: int, caption: str, label: str) -> str:
    """A table over one column where that is enough, else over both; what is wider still goes into parts."""
    widths = [
        max(_width(row[i], bold is not None and bold[number][i]) for number, row in enumerate(cells)) + GAP_PT
        for i in range(len(cells[0]))
    ]
    kind = "table" if sum(widths) <= COLUMN_PT else "table*"
    available = COLUMN_PT if kind == "table" else TEXT_PT
    parts: list[list[int]] = [[]]
    for i in range(labels, len(widths)):
        if parts[-1] and sum(widths[:labels]) + sum(widths[j] for j in parts[-1]) + widths[i] > available:
            parts.append([])
        parts[-1].append(i)
    lines = [f"\\begin{{{kind}}}[t]", "\\centering\\small\\setlength{\\tabcolsep}{4pt}"]
    for number, part in enumerate(parts):
        lines += ["\\\\[1ex]"] if number else []
        lines += [f"\\begin{{tabular}}{{@{{}}{'l' * labels}{'r' * len(part)}@{{}}}}", "\\toprule"]
        for at, row in enumerate(cells):
            shown = [
                f"\\textbf{{{_escaped(row[i])}}}" if bold is not None and bold[at][i] else _escaped(row[i])
                for i in [*range(labels), *part]
            ]
            lines.append(" & ".join(shown) + " \\\\")
            lines += ["\\midrule"] if at == 0 else []
        lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, f"\\caption{{{_escaped(caption)}}}", f"\\label{{{label}}}", f"\\end{{{kind}}}", ""])


LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "…": r"\ldots{}",
}


def _width(text: str, is_bold: bool) -> float:
    return len(text) * CHARACTER_PT * (1.12 if is_bold else 1.0)


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


# ---------------------------------------------------------------------------------------------------- console


def print_grid(cells: Sequence[Sequence[str | Text]], console: Console) -> None:
    """Print a grid; if too wide for the console, transposed, then in parts that fit, each with the first column."""
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


def _fits(cells: Sequence[Sequence[str | Text]], console: Console) -> bool:
    # Measured with unlimited width; the default stops at the console's.
    return console.measure(_rich_table(cells), options=console.options.update(width=100_000)).maximum <= console.width


def _rich_table(cells: Sequence[Sequence[str | Text]]) -> RichTable:
    shown = RichTable(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # Text objects: a value such as [red] would otherwise be read as markup.
    head, *rows = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in cells]
    for title in head:
        shown.add_column(title, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown
