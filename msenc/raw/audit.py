"""Annotations and clips -> what cannot be used, what looks odd, and a page to look at. Nothing is dropped here.

``audit/rejected.csv`` lists what preparation will not use, in its words; ``audit/audit.csv`` everything that a filter
can act on; ``audit/audit.json`` counts, facts and the hash; ``audit/audit.html`` shows the worst.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from msenc.files import inside, write_text
from msenc.raw.annotations import Annotations, content_digest
from msenc.raw.audit_page import render_page
from msenc.raw.container import SUFFIXES, shown, split_part
from msenc.raw.probe import ClipFacts, deviates, probe_clips
from msenc.store.flags import AUDIT, SCHEMA_VERSION, Audit, Flag, flags_csv
from msenc.store.manifest import MANIFEST, DatasetManifest, write_rejections
from msenc.store.shards import read_index
from msenc.types import SPLITS, UNKNOWN_SPEAKER, Dialogue, MsencError, Rejection, Utterance

LEAKAGE_S = 30.0
GAP_S = 60.0
SHORT_S = 0.3
LONG_S = 60.0
MAX_CHARACTERS_PER_S = 30.0  # fast speech reaches 25
MAX_TOGETHER_SHARE = 1 / 3
_LOST = re.compile(r"\ufffd|^\?{2,}(?:\s+\?+)+$|^#(?:NAME\?|REF!|VALUE!|N/A|NULL!|NUM!|DIV/0!)$")
_MARKUP = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>|\{\\[a-z]")
TOO_LITTLE_DATA = "not known: the annotations name no recording"

REASON_FLAGS = {
    "clip missing": "clip_missing",
    "clip corrupt": "clip_corrupt",
    "decoder died": "decoder_died",
    "no sound": "sound_missing",
    "silent": "silent",
    "no picture": "picture_missing",
    "playlist": "playlist",
    "no such track": "track_missing",
    "clip too long": "clip_too_long",
    "clip too large": "clip_too_large",
    "bad sample rate": "bad_sample_rate",
}
"""Reason of a rejection -> the flag that a filter can name."""


def audit_dataset(name: str, annotations: Annotations, root: Path, folder: Path, num_workers: int) -> Audit:
    """Look through raw material, and write what is found to ``audit/`` in `folder`.

    Where `folder` holds shards of the same annotations, its manifest records the audit's hash.

    Args:
        name: of the data set.
        annotations: of the raw material.
        root: folder that the clips' paths start from.
        folder: of the prepared data.
        num_workers: processes that decode clips.

    Raises:
        MsencError: clips that may not be read, or a full disk.
    """
    out = inside(folder, AUDIT)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MsencError(f"{out}: cannot be made ({error.strerror}). Free space or permissions there.") from error
    clips = list(dict.fromkeys(clip for _, _, u in _utterances(annotations.dialogues) for clip in u.clips))
    facts = probe_clips(root, clips, num_workers, out / "clips.jsonl")
    rejections = annotations.rejections + reject_clips(annotations.dialogues, facts)
    flags = [
        *flag_clips(annotations.dialogues, facts, root),
        *flag_rows(annotations),
        *flag_dialogues(annotations.dialogues),
        *flag_leakage(annotations, facts),
    ]
    content = content_digest(annotations.dialogues)
    text = flags_csv(flags)
    write_rejections(out / "rejected.csv", rejections)
    listed = (out / "rejected.csv").read_text(encoding="utf-8")
    identity = json.dumps([SCHEMA_VERSION, content, text, listed])
    audit = Audit(rejections, flags, split_facts(annotations, flags), hashlib.sha256(identity.encode()).hexdigest())
    write_text(out / "audit.html", render_page(name, root, annotations.dialogues, facts, audit))
    write_text(out / "audit.csv", text)
    record = {
        "schema_version": SCHEMA_VERSION,
        "hash": audit.hash,
        "content": content,
        "flags": hashlib.sha256(text.encode()).hexdigest(),
        "rejected": audit.rejected_by_split(),
        "flagged": audit.flagged_by_split(),
        "facts": audit.facts,
    }
    write_text(out / "audit.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    _record(folder, content, audit.hash)
    return audit


def _record(folder: Path, content: str, hash: str) -> None:
    """Name the audit in the manifest of shards that were made of the same annotations."""
    if not (folder / MANIFEST).is_file():
        return
    manifest = DatasetManifest.read(folder)
    if read_index(folder / "turns")["settings"].get("content") == content and manifest.audit_hash != hash:
        replace(manifest, audit_hash=hash).write(folder)


def reject_clips(dialogues: Iterable[Dialogue], facts: Mapping[str, ClipFacts]) -> list[Rejection]:
    """What preparation will say of the streams that utterances lack."""
    return [
        Rejection(id, what, reason, u.clip_of(what) or "")
        for id, _, u in _utterances(dialogues)
        for what, reason in _reasons(u, facts)
        if reason is not None
    ]


def _reasons(utterance: Utterance, facts: Mapping[str, ClipFacts]) -> list[tuple[str, str | None]]:
    clips = {stream: utterance.clip_of(stream) for stream in ("audio", "video")}
    return [(s, "clip missing" if clip is None else getattr(facts[clip], s)) for s, clip in clips.items()]


def flag_clips(dialogues: Sequence[Dialogue], facts: Mapping[str, ClipFacts], root: Path) -> list[Flag]:
    """What is odd about clips: taken alone, beside their rows, beside each other, and files that no row names."""
    flags = []
    first_of: dict[str, str] = {}
    named_by: dict[str, str] = {}
    for id, split, u in _utterances(dialogues):
        lacking = [(reason, u.clip_of(stream) or "") for stream, reason in _reasons(u, facts) if reason]
        flags += [Flag(id, split, REASON_FLAGS[reason], clip) for reason, clip in dict.fromkeys(lacking)]
        for clip in u.clips:
            found = facts[clip]
            flags += [Flag(id, split, flag, clip, what) for flag, what in found.notes]
            row_s = _length(u)
            if deviates(found.duration_s, row_s):
                flags.append(
                    Flag(id, split, "length_deviation", clip, f"clip {found.duration_s:.2f} s, row {row_s:.2f} s")
                )
            if found.sha256 and (first := first_of.setdefault(found.sha256, clip)) != clip:
                flags.append(Flag(id, split, "duplicate_clip", clip, first))
            if (first := named_by.setdefault(clip, id)) != id and None in (found.audio, found.video):
                flags.append(Flag(id, split, "shared_clip", clip, first))
    files = {split_part(clip)[0]: split for _, split, u in _utterances(dialogues) for clip in u.clips}
    for name, split in {str(Path(file).parent): split for file, split in files.items()}.items():
        for path in sorted((root / name).iterdir()) if (root / name).is_dir() else ():
            clip = str(path.relative_to(root))
            if clip not in files and path.is_file() and path.suffix.lower() in SUFFIXES:
                flags.append(Flag("", split, "clip_without_row", shown(clip)))
    return flags


def flag_rows(annotations: Annotations) -> list[Flag]:
    """What is odd about the rows: times, text rate, repaired characters."""
    repaired = set(annotations.repaired)
    has_times = any(_length(u) is not None for _, _, u in _utterances(annotations.dialogues))
    flags = []
    for dialogue in annotations.dialogues:
        before: Utterance | None = None
        for u in dialogue.utterances:
            id = f"{dialogue.id}/utt{u.id}"

            def add(flag: str, found: str = "", id: str = id, u: Utterance = u, split: str = dialogue.split) -> None:
                flags.append(Flag(id, split, flag, u.clip or "", found))

            row_s = _length(u)
            if id in repaired:
                add("repaired_text", u.text)
            if id in annotations.other_case:
                add("other_case", annotations.other_case[id])
            if _LOST.search(u.text):
                add("lost_text", u.text)
            if _MARKUP.search(u.text):
                add("markup", u.text)
            if row_s is None:
                if has_times:  # whole clips need none
                    add("unreadable_time")
            elif row_s <= 0:
                add("no_length", f"{row_s:.3f} s")
            else:
                if row_s < SHORT_S:
                    add("short", f"{row_s:.3f} s")
                if row_s > LONG_S:
                    add("long", f"{row_s:.1f} s")
                if len(u.text) / row_s > MAX_CHARACTERS_PER_S:
                    add("fast_text", f"{len(u.text) / row_s:.0f} characters/s")
            if before is not None and u.start_s is not None:
                if before.start_s is not None and u.start_s < before.start_s:
                    add("backward_time", f"by {before.start_s - u.start_s:.3f} s")
                if before.end_s is not None and u.start_s < before.end_s:
                    add("row_overlap", f"by {before.end_s - u.start_s:.3f} s")
                if before.end_s is not None and u.start_s - before.end_s > GAP_S:
                    add("long_gap", f"{u.start_s - before.end_s:.1f} s")
            before = u
        for u, other_s in _spoken_together(dialogue):
            if other_s > MAX_TOGETHER_SHARE * _length(u):
                found = f"{other_s:.2f} of {_length(u):.2f} s"
                flags.append(
                    Flag(f"{dialogue.id}/utt{u.id}", dialogue.split, "overlapping_speech", u.clip or "", found)
                )
    return flags


def _spoken_together(dialogue: Dialogue) -> Iterable[tuple[Utterance, float]]:
    """Utterances with a length, and how many seconds of each are another speaker's in the same recording, too."""
    recordings: dict[str, list[Utterance]] = {}
    for u in dialogue.utterances:
        if (_length(u) or 0) > 0:
            file, part = split_part(u.clip or "")
            recordings.setdefault(file if part else "", []).append(u)  # files of their own have their rows' clock
    for spoken in recordings.values():
        edges = [edge for u in spoken for edge in ((u.start_s, 1, u.speaker), (u.end_s, -1, u.speaker))]
        active: Counter[str] = Counter()
        together_s, until_s, until = 0.0, 0.0, {}  # seconds up to a time in which two or more speakers speak
        for at_s, change, speaker in sorted(edges):
            together_s += (at_s - until_s) * (len(active) > 1)
            until_s, until[at_s] = at_s, together_s
            active[speaker] += change
            if not active[speaker]:
                del active[speaker]
        for u in spoken:
            yield u, until[u.end_s] - until[u.start_s]


def flag_dialogues(dialogues: Iterable[Dialogue]) -> list[Flag]:
    """What is odd about dialogues as a whole."""
    flags = []
    first_of: dict[tuple[str, ...], str] = {}
    for d in dialogues:
        ids = [int(u.id) for u in d.utterances if u.id.isdecimal()]
        missing = sorted(set(range(min(ids), max(ids))) - set(ids)) if ids else []
        if missing:
            flags.append(Flag(d.id, d.split, "missing_ids", found=" ".join(map(str, missing))))
        spellings: dict[str, list[str]] = {}
        for name in dict.fromkeys(u.speaker for u in d.utterances if u.speaker != UNKNOWN_SPEAKER):
            spellings.setdefault("".join(filter(str.isalnum, name.casefold())) or name, []).append(name)
        if alike := [name for names in spellings.values() if len(names) > 1 for name in names]:
            flags.append(Flag(d.id, d.split, "speaker_spelling", found=", ".join(alike)))
        if len(d.utterances) == 1:
            flags.append(Flag(d.id, d.split, "single_turn"))
        elif (first := first_of.setdefault(tuple(_words(u) for u in d.utterances), d.id)) != d.id:
            flags.append(Flag(d.id, d.split, "duplicate_dialogue", found=first))
    return flags


def flag_leakage(annotations: Annotations, facts: Mapping[str, ClipFacts]) -> list[Flag]:
    """What of val and test stands in train too, or right beside it in the same recording."""
    flags = []
    train = [d for d in annotations.dialogues if d.split == "train"]
    spans: dict[str, list[tuple[float, float, str]]] = {}
    for d in train:
        span = _span(d)
        if d.id in annotations.recordings and span is not None:
            spans.setdefault(annotations.recordings[d.id], []).append((*span, d.id))

    def contents(dialogue: Dialogue) -> list[tuple[str, str]]:
        """The dialogue's clips that give anything, and what tells each from others."""
        clips = [clip for u in dialogue.utterances for clip in u.clips]
        return [(c, facts[c].sha256 or c) for c in clips if facts[c].audio is None or facts[c].video is None]

    first_of = {content: d.id for d in reversed(train) for _, content in contents(d)}
    words = {_words(u) for d in train for u in d.utterances}
    for d in annotations.dialogues:
        if d.split == "train":
            continue
        span = _span(d)
        for start, end, id in spans.get(annotations.recordings.get(d.id, ""), ()):
            if span is not None and span[0] - LEAKAGE_S <= end and start - LEAKAGE_S <= span[1]:
                flags.append(Flag(d.id, d.split, "leakage", found=id))
                break
        else:
            shared = [(clip, first_of[content]) for clip, content in contents(d) if content in first_of]
            flags += [Flag(d.id, d.split, "leakage", clip, id) for clip, id in shared[:1]]
        flags += [
            Flag(f"{d.id}/utt{u.id}", d.split, "text_in_train", u.clip or "", u.text)
            for u in d.utterances
            if _words(u) in words
        ]
    return flags


def split_facts(annotations: Annotations, flags: Iterable[Flag]) -> dict[str, dict[str, Any]]:
    """Counts and lengths of each split."""
    leaking = Counter(flag.split for flag in flags if flag.flag == "leakage")
    repeated = Counter(flag.split for flag in flags if flag.flag == "text_in_train")
    facts = {}
    for split in SPLITS:
        dialogues = [d for d in annotations.dialogues if d.split == split]
        turns = [u for d in dialogues for u in d.utterances]
        seconds = [s for u in turns if (s := _length(u)) is not None]
        if not dialogues:
            continue
        facts[split] = {
            "utterances": len(turns),
            "dialogues": len(dialogues),
            "longest dialogue": max(len(d.utterances) for d in dialogues),
            "samples": sum(d.num_samples for d in dialogues),
            "samples with another speaker": sum(
                a.speaker != b.speaker for d in dialogues for a, b in pairwise(d.utterances)
            ),
            "speakers": len({u.speaker for u in turns}),
            "median length (s)": _round(np.median(seconds)) if seconds else None,
            "99th percentile (s)": _round(np.percentile(seconds, 99)) if seconds else None,
            "longest (s)": _round(max(seconds)) if seconds else None,
            "hours, without what is longer than 60 s": _round(sum(s for s in seconds if s <= LONG_S) / 3600),
            "texts beyond ASCII": sum(not u.text.isascii() for u in turns),
            "texts with a bracket": sum("(" in u.text for u in turns),
            "missing utterance ids": sum(
                len(flag.found.split()) for flag in flags if flag.flag == "missing_ids" and flag.split == split
            ),
            "repaired texts": sum(id.split("/")[1] == split for id in annotations.repaired),
        }
        if split != "train":
            is_known = annotations.recordings or leaking[split]
            facts[split]["leaking dialogues"] = leaking[split] if is_known else TOO_LITTLE_DATA
            facts[split]["texts that occur in train (%)"] = round(100 * repeated[split] / len(turns), 1)
    return facts


def _utterances(dialogues: Iterable[Dialogue]) -> Iterable[tuple[str, str, Utterance]]:
    return ((f"{d.id}/utt{u.id}", d.split, u) for d in dialogues for u in d.utterances)


def _length(u: Utterance) -> float | None:
    return None if u.start_s is None or u.end_s is None else u.end_s - u.start_s


def _span(dialogue: Dialogue) -> tuple[float, float] | None:
    times = [t for u in dialogue.utterances for t in (u.start_s, u.end_s) if t is not None]
    return (min(times), max(times)) if times else None


def _words(u: Utterance) -> str:
    return " ".join(u.text.casefold().split())


def _round(seconds: float) -> float:
    return round(float(seconds), 2)
