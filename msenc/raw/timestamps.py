"""``timestamp.json`` -> where each dialogue lies in the long videos, and which spans cannot be used.

The file maps a video's name to the spans of its dialogues, ``[[start, end], ...]`` in seconds, as MSenC's does.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msenc.files import check_regular
from msenc.files.kinds import is_below
from msenc.types import MsencError, Rejection

FILE_NAME = "timestamp.json"


@dataclass(frozen=True)
class DialogueSpan:
    """One dialogue of a long video.

    Args:
        video: path of the video, relative to the folder of all videos.
        start_s: its first second.
        end_s: its last second, or None where the dialogue lasts to the video's end.
    """

    video: str
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True)
class Timestamps:
    """What ``timestamp.json`` says.

    Args:
        spans: in the order of the file; a dialogue's place in this list is its number, whatever videos are at hand.
        rejections: one per span, or video, that cannot be used.
        overlaps: one line per span that begins before an earlier one of its video ends; such spans are used.
    """

    spans: list[DialogueSpan]
    rejections: list[Rejection]
    overlaps: list[str]

    @property
    def hours(self) -> float:
        """Length of all spans together."""
        return sum(span.end_s - span.start_s for span in self.spans if span.end_s is not None) / 3600


def read_timestamps(path: Path) -> Timestamps:
    """Read the spans of all dialogues; the videos need not be there.

    Args:
        path: the JSON file.

    Raises:
        MsencError: if the file is missing, is no such JSON, or names a video twice.
    """
    table = _read_json(path)
    spans: list[DialogueSpan] = []
    rejections: list[Rejection] = []
    overlaps: list[str] = []
    for video, entries in table.items():
        if not is_below(video):
            fault = "video name leads out of the folder"
            rejections.append(Rejection(video, "dialogue", fault, path.name, found=video))
            continue
        if not isinstance(entries, list):
            rejections.append(
                Rejection(video, "dialogue", "not a list of spans", path.name, found=_short(entries)),
            )
            continue
        latest_s = 0.0
        for number, entry in enumerate(entries):
            id = f"{video}, span {number}"
            if isinstance(entry, list):
                entry = [clock_seconds(t) if isinstance(t, str) and ":" in t else t for t in entry]
            if fault := _span_fault(entry):
                rejections.append(Rejection(id, "dialogue", fault, path.name, found=_short(entry)))
                continue
            start_s, end_s = map(float, entry)
            if start_s < latest_s:
                overlaps.append(f"{id}: starts at {start_s:.3f} s, an earlier one ends at {latest_s:.3f} s")
            latest_s = max(latest_s, end_s)
            spans.append(DialogueSpan(video, start_s, end_s))
    if not spans:
        raise MsencError(
            f"{path}: found no usable span (of {len(rejections)} entries). Expected "
            '{"video.mp4": [[start, end], ...]} with times in seconds. Correct the file.'
        )
    return Timestamps(spans, rejections, overlaps)


def _read_json(path: Path) -> dict[str, Any]:
    expected = 'Expected {"video.mp4": [[start, end], ...]} with times in seconds.'
    try:
        text = check_regular(Path(path)).read_text(encoding="utf-8-sig")
        table = json.loads(text, object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise MsencError(f"{path}: no such file. {expected} Put it there.") from error
    except OSError as error:
        raise MsencError(f"{path}: cannot be read ({error.strerror}). {expected}") from error
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no JSON
        raise MsencError(f"{path}: not readable as JSON ({error}). {expected} Correct the file.") from error
    except _DuplicateError as error:
        raise MsencError(f"{path}: names {error} twice. {expected} Put all spans of a video in one list.") from error
    if not isinstance(table, dict):
        raise MsencError(f"{path}: found {_short(table)}. {expected} Correct the file.")
    return table


class _DuplicateError(Exception):
    """JSON itself lets the last of two equal names win, without a word."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise _DuplicateError(repr(name))
        table[name] = value
    return table


_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")
MAX_CLOCK_S = 60.0
"""Seconds and, behind hours, minutes beyond it are no part of a clock's time; 60 itself is what rounding leaves."""


def clock_seconds(time: str) -> float | None:
    """Seconds of ``1:02:03,5`` or ``2:03.5``; None of anything else, as minutes with hundredths behind a colon.

    Example:
        >>> clock_seconds("0:02"), clock_seconds("1:00:02.5"), clock_seconds("2"), clock_seconds("1:75")
        (2.0, 3602.5, None, None)
    """
    match = _CLOCK.fullmatch(time.strip())
    if match is None:
        return None
    hours, minutes, seconds = int(match[1] or 0), int(match[2]), float(match[3].replace(",", "."))
    if seconds > MAX_CLOCK_S or (match[1] and minutes > MAX_CLOCK_S):
        return None
    return round(3600 * hours + 60 * minutes + seconds, 6)


def _span_fault(entry: Any) -> str | None:
    if not isinstance(entry, list) or len(entry) != 2:
        return "span is no pair of times"
    if not all(isinstance(t, int | float) and not isinstance(t, bool) and math.isfinite(t) for t in entry):
        return "span time is no number"
    start_s, end_s = entry
    if start_s < 0:
        return "span time negative"
    if end_s <= start_s:
        return "span inverted"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
