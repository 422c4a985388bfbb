"""An audit -> one HTML page that needs no other file: counts, histograms, thumbnails of the worst cases."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msenc.pages.render import data_uri, render
from msenc.raw.container import MediaError
from msenc.raw.media import read_frames
from msenc.raw.probe import ClipFacts
from msenc.store.flags import FLAGS, Audit
from msenc.types import Dialogue, MsencError

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
    name: str, root: Path, dialogues: Sequence[Dialogue], facts: Mapping[str, ClipFacts], audit: Audit
) -> str:
    """The page's text; whatever the data hold, it is shown as text and never run."""
    turns = [u for d in dialogues for u in d.utterances]
    timed = [(u, u.end_s - u.start_s) for u in turns if u.start_s is not None and u.end_s is not None]
    lengths = [seconds for _, seconds in timed]
    rates = [len(u.text) / seconds for u, seconds in timed if seconds > 0]
    deviations = [
        facts[clip].duration_s - seconds
        for u, seconds in timed
        if (clip := u.clip_of("audio")) in facts and facts[clip].duration_s is not None
    ]
    examples: dict[str, list[Any]] = {}
    for flag in audit.flags:
        examples.setdefault(flag.flag, []).append(flag)
    return render(
        "audit",
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
