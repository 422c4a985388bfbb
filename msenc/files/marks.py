"""Marks as text, for a CSV column: written by the demo's generator, read with the annotations."""

import re
from collections.abc import Iterable

from msenc.types import Mark, MsencError

KINDS = ("text", "audio", "video", "both")
FIELDS = ("text", "description")

_MARK = re.compile(
    rf"(?P<kind>{'|'.join(KINDS)}):(?P<field>{'|'.join(FIELDS)}):(?P<start>\d+)-(?P<end>\d+)"
    r"(?:\*(?P<bits>\d+(?:\.\d+)?(?:e-?\d+)?))?"
)


def format_marks(marks: Iterable[Mark]) -> str:
    """Marks in one line: ``kind:field:start-end``, joined by ``;``; bits other than 1 follow a ``*``.

    Example:
        >>> format_marks([Mark("audio", "text", 10, 17), Mark("video", "description", 21, 35, bits=0.5)])
        'audio:text:10-17;video:description:21-35*0.5'
    """
    return ";".join(
        f"{m.kind}:{m.field}:{m.start}-{m.end}" + ("" if m.bits == 1 else f"*{float(m.bits)!r}") for m in marks
    )


def parse_marks(text: str) -> tuple[Mark, ...]:
    """Read back what `format_marks` wrote; an empty string is no mark.

    Raises:
        MsencError: if a part is not of that form, or its span is empty.

    Example:
        >>> parse_marks("both:text:0-3")
        (Mark(kind='both', field='text', start=0, end=3, bits=1.0),)
    """
    marks = []
    for part in text.split(";") if text.strip() else ():
        match = _MARK.fullmatch(part.strip())
        if match is None or int(match["start"]) >= int(match["end"]):
            raise MsencError(
                f"Found the mark {part!r} in {text!r}; expected kind:field:start-end with kind one of "
                f"{', '.join(KINDS)}, field one of {', '.join(FIELDS)} and start < end, such as 'audio:text:10-17'. "
                "Correct the column, or leave it empty."
            )
        bits = 1.0 if match["bits"] is None else float(match["bits"])
        marks.append(Mark(match["kind"], match["field"], int(match["start"]), int(match["end"]), bits))
    return tuple(marks)
