"""An audit -> one HTML page that needs no other file: counts, histograms, thumbnails of the worst cases."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msenc.pages.style import STYLE, data_uri
from msenc.raw.media import MediaError, read_frames
from msenc.raw.probe import ClipFacts
from msenc.store.flags import FLAGS
from msenc.types import Dialogue, MsencError

if TYPE_CHECKING:
    from msenc.raw.audit import Audit

NUM_THUMBNAILS = 12
NUM_LISTED = 5
NUM_BINS = 40
WORST_FIRST = (
    "clip_corrupt",
    "decoder_died",
    "picture_missing",
    "sound_missing",
    "silent",
    "length_deviation",
    "wrong_extension",
    "rotated",
    "no_length",
    "long",
    "fast_text",
    "duplicate_clip",
)
"""Flags of which a picture is shown, a few of each."""


def render_page(
    name: str, root: Path, dialogues: Sequence[Dialogue], facts: Mapping[str, ClipFacts], audit: "Audit"
) -> str:
    """The page's text; whatever the data hold, it is shown as text and never run."""
    from jinja2 import Environment

    turns = [u for d in dialogues for u in d.utterances]
    timed = [(u, u.end_s - u.start_s) for u in turns if u.start_s is not None and u.end_s is not None]
    lengths = [seconds for _, seconds in timed]
    rates = [len(u.text) / seconds for u, seconds in timed if seconds > 0]
    deviations = [
        facts[u.clip].duration_s - seconds
        for u, seconds in timed
        if u.clip in facts and facts[u.clip].duration_s is not None
    ]
    examples: dict[str, list[Any]] = {}
    for flag in audit.flags:
        examples.setdefault(flag.flag, []).append(flag)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    return template.render(
        name=name,
        splits=audit.columns,
        rejected=audit.rejected_by_split(),
        flagged=audit.flagged_by_split(),
        meanings=FLAGS,
        facts=audit.facts,
        fact_names=list(dict.fromkeys(fact for values in audit.facts.values() for fact in values)),
        examples={flag: found[:NUM_LISTED] for flag, found in examples.items()},
        rejections=audit.rejections[:50],
        num_rejections=len(audit.rejections),
        histograms=[
            histogram("Length of utterances by their rows", lengths, "s", (0.0, 20.0)),
            histogram("Text rate", rates, "characters/s", (0.0, 60.0)),
            histogram("Length of the clip less that of its row", deviations, "s", (-5.0, 5.0)),
        ],
        worst=_worst(root, examples),
        hash=audit.hash,
        style=STYLE,
    )


def histogram(title: str, values: Sequence[float], unit: str, limits: tuple[float, float]) -> dict[str, Any]:
    """Bars of a histogram in a box 400 wide and 120 high; what lies beyond the limits goes to the last bars.

    Returns:
        title, unit, limits, num, beyond, highest, and bars (x, y, width, height, label).
    """
    low, high = limits
    counts, edges = np.histogram(np.clip(values, low, high), NUM_BINS, limits)
    highest = max(int(counts.max(initial=0)), 1)
    width = 400 / NUM_BINS
    bars = []
    for i, count in enumerate(counts.tolist()):
        height = max(120 * count / highest, 1.5 if count else 0.0)  # a single case is still seen
        label = f"{edges[i]:.1f} to {edges[i + 1]:.1f} {unit}: {count:,}"
        bars.append((round(i * width, 2), round(120 - height, 2), round(width - 1, 2), round(height, 2), label))
    beyond = sum(not low <= value <= high for value in values)
    return {
        "title": title,
        "unit": unit,
        "limits": limits,
        "num": len(values),
        "beyond": beyond,
        "highest": highest,
        "bars": bars,
    }


def _worst(root: Path, examples: Mapping[str, Sequence[Any]]) -> list[dict[str, str]]:
    """Clips to look at: one of each flag in turn, then a second of each ..."""
    candidates = [
        flag
        for rank in range(NUM_THUMBNAILS)
        for name in WORST_FIRST
        for flag in _by_size(examples.get(name, ()))[rank : rank + 1]
        if flag.file
    ]
    worst: dict[str, dict[str, str]] = {}
    for flag in candidates:
        if flag.file in worst:
            worst[flag.file]["what"] += f"; {flag.flag} {flag.found}".rstrip()
        elif len(worst) < NUM_THUMBNAILS:
            what = f"{flag.flag} {flag.found}".rstrip()
            worst[flag.file] = {"id": flag.id, "file": flag.file, "what": what, "image": thumbnail(root / flag.file)}
    return list(worst.values())


def _by_size(flags: Sequence[Any]) -> list[Any]:
    """Largest deviation first; flags without numbers stay in order."""

    def size(flag: Any) -> float:
        numbers = [float(word) for word in flag.found.split() if word.replace(".", "").isdecimal()]
        return -abs(numbers[0] - numbers[1]) if len(numbers) == 2 else -sum(numbers)

    return sorted(flags, key=size) if flags and flags[0].flag != "duplicate_clip" else list(flags)


def thumbnail(path: Path) -> str:
    """The first picture as a data URI, or nothing where there is none."""
    from PIL import Image

    try:
        picture = Image.fromarray(read_frames(path, fps=0.1)[0])
    except (MediaError, MsencError):
        return ""
    picture.thumbnail((320, 240))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=70)
    return data_uri("image/jpeg", buffer.getvalue())


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit of {{ name }}</title>
<style>
{{ style|safe }}
td.id, figcaption, li { overflow-wrap: anywhere; }
svg { width: 100%; max-width: 36rem; height: auto; display: block; } rect { fill: var(--bar); }
svg text { font-size: 11px; fill: currentColor; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
figure { margin: 0; font-size: .8rem; }
img, .none { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: #8882; border-radius: 4px; }
.none { display: grid; place-items: center; }
</style>
</head>
<body>
<h1>Audit of {{ name }}</h1>
<p>Nothing was dropped by this audit. What cannot be used stands first; everything else is a flag that
<code>data.filter=no_&lt;flag&gt;</code> can act on.</p>
{% macro head(first) %}
<tr><th>{{ first }}</th>{% for split in splits %}<th class="n">{{ split }}</th>{% endfor %}</tr>
{% endmacro %}
{% macro number(value) %}
{% if value is none or value is undefined %}{% elif value is integer %}{{ "{:,}".format(value) }}
{% else %}{{ value }}{% endif %}
{% endmacro %}
<h2>Not usable</h2>
{% if rejected %}
<div class="scroll"><table>{{ head("what: reason") }}
{% for reason, counts in rejected.items() %}
<tr><td>{{ reason }}</td>
{% for split in splits %}<td class="n">{{ number(counts.get(split, 0)) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<details><summary>The first {{ rejections|length }} of {{ "{:,}".format(num_rejections) }} (all: rejected.csv)</summary>
<ul>{% for r in rejections %}<li>{{ r.id }}: {{ r.what }}: {{ r.reason }} <small>{{ r.file }}
{% if r.row %}row {{ r.row }}{% endif %} {{ r.found }}</small></li>{% endfor %}</ul></details>
{% else %}<p>Everything can be used.</p>{% endif %}
<h2>Flags</h2>
{% if flagged %}
<div class="scroll"><table>{{ head("flag") }}
{% for flag, counts in flagged.items() %}
<tr><td><details><summary>{{ flag }} <small>{{ meanings[flag] }}</small></summary>
<ul>{% for f in examples[flag] %}<li>{{ f.id or f.file }} <small>{{ f.found }}</small></li>{% endfor %}</ul>
</details></td>
{% for split in splits %}<td class="n">{{ number(counts.get(split, 0)) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% else %}<p>Nothing looks odd.</p>{% endif %}
{% if worst %}
<h2>Worst cases</h2>
<div class="grid">
{% for case in worst %}
<figure>{% if case.image %}<img src="{{ case.image }}" alt="first picture of {{ case.file }}">
{% else %}<div class="none">no picture</div>{% endif %}
<figcaption>{{ case.id }}<br><small>{{ case.what }}</small></figcaption></figure>
{% endfor %}
</div>
{% endif %}
<h2>Histograms</h2>
{% for h in histograms %}
<p>{{ h.title }} <small>{{ "{:,}".format(h.num) }} values,
{{ "{:,}".format(h.beyond) }} beyond the scale, in the outer bars</small></p>
{% if h.num %}
<svg viewBox="0 -14 400 152" role="img" aria-label="{{ h.title }}">
<text x="0" y="-3">{{ "{:,}".format(h.highest) }}</text>
{% for x, y, width, height, label in h.bars %}
<rect x="{{ x }}" y="{{ y }}" width="{{ width }}" height="{{ height }}"><title>{{ label }}</title></rect>
{% endfor %}
<line x1="0" y1="120" x2="400" y2="120" stroke="currentColor" stroke-width=".5"/>
<text x="0" y="134">{{ h.limits[0] }}</text><text x="200" y="134" text-anchor="middle">{{ h.unit }}</text>
<text x="400" y="134" text-anchor="end">{{ h.limits[1] }}</text>
</svg>
{% endif %}
{% endfor %}
<h2>Facts</h2>
<div class="scroll"><table>{{ head("of the annotations") }}
{% for fact in fact_names %}
<tr><td>{{ fact }}</td>
{% for split in splits %}<td class="n">{{ number(facts.get(split, {}).get(fact)) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p><small>Hash of the audit: <code style="overflow-wrap:anywhere">{{ hash }}</code></small></p>
</body>
</html>
"""
