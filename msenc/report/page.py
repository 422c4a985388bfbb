"""A report -> one HTML page that needs no other file: table, effects, curves, examples, costs, commands."""

import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msenc.files import read_json
from msenc.pages.style import STYLE, data_uri
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

BASELINES = ("majority", "previous", "speaker")
PLOTTED = ("nll", "planted/", "rouge_l", "description/accuracy")
"""Metrics whose effects are drawn; all are in the table of differences."""


def render_page(table: Table, title: str, folders: Sequence[Path]) -> str:
    """The page's text; whatever the runs hold, it is shown as text and never run.

    Args:
        table: what `summarise` found.
        title: of the page.
        folders: what was reported, for the commands.
    """
    from jinja2 import Environment

    examples, media_notes = find_examples(table.configurations, table.split)
    curves = learning_curves(table.configurations)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    return template.render(
        style=STYLE,
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
        examples=examples,
        media_notes=media_notes,
        commands=_commands(table, folders),
    )


def _summary(table: Table) -> list[str]:
    """What was shown, in a line per significant comparison of the loss, or that nothing was."""
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
    """Accuracy of the replies' voice descriptions per attribute, beside rules that look at nothing."""
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
    """What made the runs and this report."""
    commands = []
    for folder in folders:
        file = folder / "sweep.json"
        if file.is_file():
            commands.append(shlex.join(["python", "train.py", *read_json(file)["command"]]))
    if not commands:
        for c in table.configurations:
            for run in c.runs:
                overrides = [f"{k}={v}" for k, v in run.overrides.items()]
                seed = [] if "seed" in run.overrides else [f"seed={run.seed}"]
                commands.append(shlex.join(["python", "train.py", *overrides, *seed]))
    places = ",".join(map(str, folders))
    argument = f"sweep_dir={places}" if len(folders) == 1 else f"sweep_dir=[{places}]"
    return [*commands, shlex.join(["python", "report.py", argument, f"split={table.split}"])]


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style|safe }}
.scroll th:first-child, .scroll td:first-child { min-width: 8.5rem; overflow-wrap: anywhere; }
.narrow .scroll th:first-child, .narrow .scroll td:first-child { min-width: 0; overflow-wrap: normal; }
@media (max-width: 30rem) { .narrow table { font-size: .8rem; } .narrow th, .narrow td { padding: .3rem .25rem; } }
thead th { vertical-align: bottom; }
tr.part > * { border-top: 2px solid var(--line); }
b { font-weight: 650; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
.plots img, .curves img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
.plots img { max-width: 34rem; } .curves img { max-width: 40rem; }
figure { margin: 0; }
.example { border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; margin: 1rem 0; }
.turn { display: grid; grid-template-columns: 7.5rem 1fr; gap: .75rem; align-items: start; }
.turn img { width: 100%; border-radius: 4px; }
.replies { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(14rem, 100%), 1fr)); }
.replies > div { border-left: 3px solid var(--bar); padding-left: .6rem; }
audio { width: 100%; max-width: 20rem; height: 2.25rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; padding: .6rem .8rem; border-radius: 6px; }
li { overflow-wrap: anywhere; }
@media print {
  :root { color-scheme: light; } body { max-width: none; font-size: 10pt; padding: 0; }
  .plots { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } table { font-size: 8pt; } td.n, th.n { white-space: normal; }
  h2 { break-after: avoid; } tr, figure, .example { break-inside: avoid; } audio { display: none; }
}
</style>
</head>
<body>
{% macro broken(text) %}{{ (text|e).replace("/", "/<wbr>"|safe).replace("_", "_<wbr>"|safe) }}{% endmacro %}
{% macro plain(cells, numbers_from=1) %}
<div class="scroll"><table><thead><tr>{% for cell in cells[0] %}
<th{% if loop.index0 >= numbers_from %} class="n"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in cells[1:] %}
<tr>{% for cell in row %}<td{% if loop.index0 >= numbers_from %} class="n"{% endif %}>
{{- broken(cell) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro share(value) %}{% if value is none %}-{% else %}{{ "%.1f"|format(100 * value) }} %{% endif %}{% endmacro %}
{% macro said(turn) %}
<p>{% if turn.speaker %}<small>{{ turn.speaker }}</small><br>{% endif %}{{ turn.text or "(nothing)" }}
{% if turn.description %}<br><small>{{ turn.description }}</small>{% endif %}
{% if turn.lacking %}<br><small>({{ turn.lacking }})</small>{% endif %}</p>
{% if turn.sound %}<audio controls preload="metadata" src="{{ turn.sound }}"></audio>{% endif %}
{% endmacro %}
<h1>{{ title }}</h1>
{% if summary %}<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if table.left_out %}
<h2>Not in the table</h2>
<ul>{% for line in table.left_out %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}
<h2>Scores</h2>
<p><small>{{ heading }}. Bold: the best mean.</small></p>
<div class="scroll"><table><thead>
{% for row in main.head %}<tr>{% for cell in row %}
<th{% if not loop.first %} class="n"{% endif %}>{{ cell }}</th>{% endfor %}</tr>{% endfor %}
</thead><tbody>
{% for row, winner in main.body %}
<tr{% if row[0] == cost_names[0] %} class="part"{% endif %}><td>{{ broken(row[0]) }}</td>{% for cell in row[1:] %}
<td class="n">{% if winner == loop.index0 %}<b>{{ cell }}</b>{% else %}{{ cell }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.notes %}<ul>{% for note in table.notes %}<li><small>{{ note }}</small></li>{% endfor %}</ul>{% endif %}
{% if differences %}
<h2>Effects</h2>
<p><small>{{ compared }}. Of each pair the same items; dialogues are clusters, seeds are runs. A filled point is
significant. Scores of all items together (†) are not tested. d: in standard deviations of the items' differences.
</small></p>
<div class="plots">{% for metric, image in forests %}
<figure><img src="{{ image }}" alt="Differences in {{ metric }} with their confidence intervals"></figure>
{% endfor %}</div>
<details open><summary>All differences</summary>{{ plain(differences) }}</details>
{% endif %}
{% if verdicts %}
<h2>Is each modality used?</h2>
<p><small>{{ judged }}: above 0, the model needs what the control took away.</small></p>
<div class="narrow">{{ plain(verdicts, 5) }}</div>
{% endif %}
{% if curves %}
<h2>Learning curves</h2>
<figure class="curves"><img src="{{ curves }}" alt="Validation loss by epoch, of each configuration"></figure>
{% endif %}
{% if attributes %}
<h2>Voice descriptions</h2>
<p><small>Share of replies whose description names the attribute as it is, mean over seeds; beside three rules that hear
nothing: the commonest word, the turn before, and the speaker's commonest word.</small></p>
<div class="scroll"><table><thead><tr><th>attribute</th>{% for c in table.configurations %}
<th class="n">{{ c.name }}</th>{% endfor %}<th class="n">commonest</th><th class="n">turn before</th>
<th class="n">speaker</th></tr></thead><tbody>
{% for row in attributes %}<tr><td>{{ row.attribute }}</td>
{% for value in row.scores + row.rules %}<td class="n">{{ share(value) }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}
<h2>Replies</h2>
{% for note in media_notes %}<p><small>{{ note }}</small></p>{% endfor %}
{% for example in examples %}
<section class="example">
<p><small>{{ example.title }}{% if example.asked %}; planted here: {{ example.asked|join(", ") }}{% endif %}</small></p>
{% if example.before %}
<div class="turn"><div>{% if example.before.picture %}
<img src="{{ example.before.picture }}" alt="First picture of the turn before">{% endif %}</div>
<div>{{ said(example.before) }}</div></div>
{% endif %}
<div class="replies"><div><b>reference</b>{{ said(example.reference) }}</div>
{% for name, reply in example.replies %}<div><b>{{ name }}</b>
<p>{{ reply.text or "(nothing)" }}{% if reply.description %}<br><small>{{ reply.description }}</small>{% endif %}</p>
{% if reply.sound %}<audio controls preload="metadata" src="{{ reply.sound }}"></audio>{% endif %}</div>
{% endfor %}</div>
</section>
{% endfor %}
<h2>To repeat it</h2>
<pre>{{ commands|join("\n") }}</pre>
</body>
</html>
"""
