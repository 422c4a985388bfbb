"""Trials of a listening study -> a folder with a page that any browser opens without a server, and its key."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from msenc.files import digest, inside, whole_folder, write_json, write_text
from msenc.pages.render import PAGES, render
from msenc.raw.audit_page import thumbnail
from msenc.raw.container import MediaError, moving, open_clip
from msenc.raw.media import read_audio
from msenc.report.listening.study import (
    ANSWERS,
    KEY,
    QUESTIONS,
    VERSION,
    Clip,
    Study,
    Trial,
    draft_trials,
    hash_of,
    name_trials,
)
from msenc.report.panels.examples import open_dialogues, raw_folder
from msenc.report.table import Table
from msenc.speech.wav import from_wav, to_wav
from msenc.types import MsencError, Utterance

CONTEXT_TURNS = 8
SAMPLE_RATE = 16_000
MAX_SECONDS = 60
CONSENT = (
    "I take part voluntarily and can stop at any time. My answers are kept without my name and used for research; they "
    "stay in this browser until I pass the file on."
)

# What every browser plays; of other clips the sound is written as WAV, beside a picture.
_SUFFIXES = (".mp4", ".m4v", ".webm")
_FORMATS = {"mp4", "webm"}
_VIDEO = ("h264", "vp8", "vp9", "av1")
_AUDIO = ("aac", "mp3", "opus", "vorbis")
_PIXELS = ("yuv420p", "yuvj420p")


def write_page(
    table: Table,
    folders: Sequence[Path],
    target: Path,
    *,
    kind: str = "ab",
    num_trials: int = 24,
    seed: int = 1,
    consent: str | None = None,
) -> tuple[Path, list[str]]:
    """Write a listening page; the same call writes the same page, and another one beside it.

    Args:
        table: of the report.
        folders: reported ones, for commands.
        target: folder for all pages; a page's is named by a hash of what it holds, with ``page/`` to give away and
            ``key.json`` to keep.
        kind: ``ab``: two replies side by side; ``rating``: one, from 1 to 5.
        num_trials: in all, without checks.
        seed: of the choice of targets, and of each listener's order.
        consent: what listeners agree to; None: `CONSENT`.

    Returns:
        The page, and notes for whoever made it.

    Raises:
        MsencError: as `draft_trials`; the conversations are not found; or a sound cannot be read.
    """
    drafts, pairs, notes = draft_trials(table, folders, kind, num_trials, seed)
    used = {clip.of for draft in drafts for clip in draft.clips}
    shown = [c for c in table.configurations if c.name in used]
    dialogues, lacking = open_dialogues(shown[0], table.split)
    if dialogues is None:
        raise MsencError(f"listen: {lacking[0]} Listeners judge what fits them: put the data where the run has it.")
    root = raw_folder(shown[0])
    notes += [] if root else ["The raw clips were not found: turns are shown as text, with what is said of the voice."]
    sounds = {clip: _read_sound(clip) for draft in drafts for clip in draft.clips}
    trials = name_trials(drafts, lambda clip: _id(sounds[clip]), seed)
    data: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "questions": [[name, asked[kind]] for name, asked in QUESTIONS.items()],
        "answers": list(ANSWERS[kind]),
        "consent": consent or CONSENT,
    }
    study: Study = {
        "schema_version": VERSION,
        "page": digest([data, [trial for _, trial in trials]]),
        "kind": kind,
        "split": table.split,
        "seeds": {c.name: c.runs[0].seed for c in shown},
        "pairs": pairs,
        "trials": [trial for _, trial in trials],
        "hash": "",
    }
    study["hash"] = hash_of(study)
    with whole_folder(inside(target, study["page"])) as folder:
        page = folder / "page"
        for sound in sounds.values():
            _write(page / "sounds" / f"{_id(sound)}.wav", sound)
        show_clip = cache(lambda name: _show_clip(root, name, page))
        data["trials"] = []
        for draft, trial in trials:
            row = draft.row
            first = max(row.get("history", [0])[0], row["turn"] - CONTEXT_TURNS)
            turns = [dialogues.utterance(row["dialogue"], n) for n in range(first, row["turn"])]
            data["trials"].append(_shown(trial, row, [turn for turn in turns if turn is not None], show_clip))
        write_text(page / "index.html", _html({"page": study["page"], **data}))
        write_json(folder / KEY, study)
    return target / study["page"] / "page" / "index.html", notes


def _shown(trial: Trial, row: Mapping[str, Any], turns: Sequence[Utterance], show_clip: Any) -> dict[str, Any]:
    """A trial as the page has it: nothing in it says which configuration or which check it is."""
    clip = show_clip(turns[-1].clip) if turns and turns[-1].clip else {}
    heard = len(turns) - 1 if clip else len(turns)
    return {
        "id": trial["id"],
        "block": trial["block"],
        "sounds": [sound["id"] for sound in trial["sounds"]],
        "speaker": row.get("speaker", ""),
        # how the clip sounds is for listeners to hear
        "turns": [[t.speaker, t.text, (t.description or "") if n < heard else ""] for n, t in enumerate(turns)],
        "clip": clip,
    }


def _read_sound(clip: Clip) -> bytes:
    """As WAV without anything else that the file may hold."""
    try:
        samples, sample_rate = from_wav(clip.file.read_bytes())
    except (OSError, MsencError) as error:
        raise MsencError(f"{clip.file}: cannot be read ({error}). Speak the replies again (evaluate.py).") from error
    return to_wav(samples[::-1] if clip.is_backward else samples, sample_rate)


def _show_clip(root: Path | None, name: str, page: Path) -> dict[str, str]:
    """Puts a turn's clip into the page: a ``video``, or the ``audio`` and a ``picture``; empty where there is none."""
    if root is None:
        return {}
    path = root / name  # inside it, as readers of shards ensure
    try:
        if _is_playable(path):
            content, place = path.read_bytes(), f"clips/{{}}{path.suffix.lower()}"
            return {"video": _write(page / place.format(_id(content)), content).relative_to(page).as_posix()}
        sound = to_wav(read_audio(path, SAMPLE_RATE)[: MAX_SECONDS * SAMPLE_RATE], SAMPLE_RATE)
    except (MediaError, MsencError, OSError):  # it is not there, has no sound, or PyAV is not installed
        return {}
    place = _write(page / "clips" / f"{_id(sound)}.wav", sound).relative_to(page).as_posix()
    return {"audio": place, "picture": thumbnail(path)}


def _is_playable(path: Path) -> bool:
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        return False
    with open_clip(path) as container:
        videos, audios = moving(container), container.streams.audio
        names = [stream.codec_context.codec.canonical_name for stream in (*videos, *audios)]
        return (
            not _FORMATS.isdisjoint(container.format.name.split(","))
            and (len(videos), len(audios)) == (1, 1)
            and (names[0] in _VIDEO and names[1] in _AUDIO)
            and videos[0].codec_context.pix_fmt in _PIXELS
        )


def _id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _html(data: Mapping[str, Any]) -> str:
    """The page; it runs nothing but its own script, and loads nothing but what lies beside it."""
    script = (PAGES / "listen.js").read_text(encoding="utf-8")
    style = "".join((PAGES / name).read_text(encoding="utf-8") for name in ("style.css", "listen.css"))
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; media-src 'self' file:; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return render("listen", data=data, policy=policy, script=Markup(script), style=Markup(style))


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
