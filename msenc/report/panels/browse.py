"""All targets of an evaluation with the replies of each configuration, as data that the page's script shows."""

import json
import os
import shlex
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from msenc.report.compare import Configuration
from msenc.report.panels.examples import open_dialogues, raw_folder
from msenc.report.style import Style
from msenc.types import Utterance
from msenc.work.command import as_typed

MAX_CHARACTERS = 8_000_000
"""Of the data in a page; the rest is left out, with a note."""


def browse(
    configurations: Sequence[Configuration], split: str, style: Style, page_folder: Path
) -> tuple[dict[str, Any] | None, list[str]]:
    """Every target, with the turn before and the reply of each configuration's first run.

    Args:
        configurations: of the report.
        split: that was evaluated.
        style: how configurations are named.
        page_folder: where the page will lie; sounds are linked from there, and loaded when they are asked for.

    Returns:
        ``columns`` (names), ``kinds`` (of planted words) and ``rows``; None without replies. And notes.
    """
    shown = [(c, c.items[0]) for c in configurations if c.items[0] is not None and "reply" in c.items[0].rows[0]]
    if not shown:
        return None, []
    dialogues, _ = open_dialogues(shown[0][0], split)
    root = raw_folder(shown[0][0])
    read = lru_cache(maxsize=64)(dialogues.utterance) if dialogues else lambda id, turn: None
    rows, size = [], 0
    for place, row in enumerate(shown[0][1].rows):
        reference = row.get("reference") or {}
        before = read(row["dialogue"], row["turn"] - 1) if row["turn"] > 0 else None
        entry = {
            "title": f"{row['dialogue']}, turn {row['turn']}",
            "kinds": [kind.removeprefix("planted_") for kind in row["bits"]],
            "before": _before(before, root, page_folder) if before is not None else None,
            "reference": [row.get("speaker", ""), reference.get("text", ""), reference.get("description") or ""],
            "replies": [_reply(c, items.rows[place], page_folder) for c, items in shown],
        }
        size += len(json.dumps(entry))
        if size > MAX_CHARACTERS:
            break
        rows.append(entry)
    notes = []
    total = len(shown[0][1].rows)
    if len(rows) < total:
        notes.append(f"The first {len(rows)} of {total} targets; all are in each evaluation's predictions.jsonl.")
    silent = [c for c, items in shown if not any(r.get("speech") for r in items.rows)]
    if silent:
        folders = ",".join(str(c.runs[0].folder) for c in silent)
        run_dir = f"run_dir={folders}" if len(silent) == 1 else f"run_dir=[{folders}]"
        command = shlex.join(["python", "evaluate.py", run_dir, f"split={split}", "speech=espeak"])
        notes.append(as_typed(f"Replies without sound are spoken by: {command}"))
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    return {"columns": [style.row(c) for c, _ in shown], "kinds": kinds, "rows": rows}, notes


def _before(turn: Utterance, root: Path | None, page_folder: Path) -> list[str]:
    clip = root / turn.clip_of("audio") if root is not None and turn.clips else None
    return [turn.speaker, turn.text, turn.description or "", _link(clip, page_folder)]


def _reply(configuration: Configuration, row: dict[str, Any], page_folder: Path) -> list[str]:
    reply = row.get("reply") or {}
    sound = configuration.evaluations[0].folder / row["speech"] if row.get("speech") else None
    return [reply.get("text", ""), reply.get("description") or "", _link(sound, page_folder)]


def _link(path: Path | None, page_folder: Path) -> str:
    """A relative address, or "" for what is not there."""
    if path is None or not path.is_file():
        return ""
    return quote(Path(os.path.relpath(path.resolve(), page_folder.resolve())).as_posix())
