"""The results of an audit, next to the streams in ``audit/``, and the filter that excludes flagged items.

``audit/audit.csv``: one line per flag; ``audit/audit.json``: its hash, which ``dataset.json`` and runs record.
`left_out` -> ids -> `FilteredReader`, which reads shards as if those ids had never been in them.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from msenc.files import parse_csv, read_json, read_text
from msenc.store.location import Place
from msenc.store.manifest import DatasetManifest
from msenc.store.shards import ShardReader
from msenc.types import SPLITS, UNKNOWN, MsencError, Rejection

SCHEMA_VERSION = 1
AUDIT = "audit"
AGAIN = "Audit again: python prepare.py stage=audit"

FLAGS = {
    "clip_missing": "the clip does not exist",
    "clip_corrupt": "the clip cannot be decoded, or ends long before the duration in its header",
    "decoder_died": "the process that decoded the clip was killed",
    "sound_missing": "the clip has no audio",
    "silent": "the clip's audio is silent",
    "picture_missing": "the clip has no video",
    "track_missing": "fewer audio tracks or channels than `data.audio_track` or the clip's name asks for",
    "playlist": "a list of other files, which is never opened",
    "clip_too_long": "longer than 4 hours, whatever the header says",
    "clip_too_large": "frames larger than 8192 x 8192 pixels, or more frames than fit into memory",
    "bad_sample_rate": "a sample rate below 1 kHz or above 768 kHz",
    "gap_in_audio": "a gap in the audio's timestamps; filled with silence",
    "late_start": "audio or video starts after the file does; preceded by silence, or by its first frame",
    "damaged_packets": "packets that cannot be decoded; replaced by silence, or by the previous frame",
    "cut_off": "the clip ends before the duration in its header, and is used all the same",
    "bad_samples": "floating-point audio with samples that are no numbers (silenced) or beyond full scale",
    "dc_offset": "the audio's samples are lifted or lowered as a whole, by more than 2 % of full scale; left as stored",
    "new_clock": "timestamps restart inside the clip; what follows is appended to what came before",
    "format_change": "channels, sample rate or frame size change inside the clip; converted to one format",
    "several_tracks": "several audio or video tracks; the default one is read, or of audio `data.audio_track`",
    "still_picture": "the video is a single picture",
    "stream_lengths": "audio and video end at different times",
    "channels_cancel": "the channels cancel out when averaged; the loudest channel is used",
    "surround_sound": "more than two channels; mixed down to mono",
    "low_sample_rate": "audio below 16 kHz: half the bandwidth that speech encoders expect is missing",
    "rotated": "the video is stored rotated; rotated back when read",
    "tilted": "the video's rotation is no multiple of 90 degrees; left as stored",
    "mirrored": "the video is stored mirrored; mirrored back when read",
    "pixel_aspect": "non-square pixels; rescaled to square ones",
    "interlaced": "two fields per frame; one is kept, and its lines are doubled",
    "no_times": "frames without timestamps; timed by the stream's nominal frame rate",
    "variable_frame_rate": "unevenly spaced frames; sampled by their timestamps",
    "wrong_extension": "the file's format does not match its extension",
    "duplicate_clip": "the same bytes as an earlier clip",
    "shared_clip": "the same clip, or part of a recording, as an earlier utterance names",
    "other_case": "the clip was found under a name of other capitals than the table's",
    "clip_without_row": "a file among the clips that no utterance refers to",
    "length_deviation": "the clip is longer or shorter than its row says",
    "fast_text": "more characters per second than anybody can speak",
    "no_length": "the row's end time is not after its start time",
    "short": "the row lasts less than 0.3 s",
    "long": "the row lasts more than 60 s",
    "unreadable_time": "a time in the row cannot be parsed",
    "repaired_text": "the text or speaker had wrongly encoded characters, which were repaired",
    "lost_text": "the text was lost when the table was saved: \ufffd, ???? ??, or a spreadsheet's #NAME?",
    "markup": "the text holds tags, such as <i>; they are read as words",
    "overlapping_speech": "another speaker of the dialogue speaks during more than a third of the row's time",
    "row_overlap": "starts before the row above it ends",
    "backward_time": "starts before the row above it starts",
    "long_gap": "starts more than 60 s after the row above it ends",
    "missing_ids": "gaps in the utterance ids of the dialogue",
    "speaker_spelling": "names of speakers that differ in capitals, spaces or signs alone; taken for several speakers",
    "single_turn": "a dialogue of one utterance: no target",
    "duplicate_dialogue": "the same words as an earlier dialogue of two or more utterances",
    "leakage": "a val or test dialogue with a clip of a train dialogue, or within 30 s of one in the same recording",
    "text_in_train": "an utterance of val or test that occurs word for word in train",
}
"""Flag -> what it means. The filter ``no_<flag>`` excludes items with that flag."""


@dataclass(frozen=True)
class Flag:
    """A finding about an item that is still usable, at least in part.

    Args:
        id: the dialogue or utterance; empty for a file that belongs to none.
        split: of the dialogue, or of the folder that the file lies in.
        flag: one of `FLAGS`.
        file: the clip it concerns, if any.
        found: what was found there.
    """

    id: str
    split: str
    flag: str
    file: str = ""
    found: str = ""


class _Record(TypedDict):
    hash: str
    content: str
    flags: str


def flags_csv(flags: Iterable[Flag]) -> str:
    """The text of ``audit.csv``."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([f.name for f in fields(Flag)])
    writer.writerows(astuple(flag) for flag in flags)
    return buffer.getvalue()


def find_audit(folder: Path, content: str) -> str:
    """The hash of the audit in `folder`, if there is one of annotations with this digest, else empty."""
    try:
        record = _read_record(folder, "")
    except MsencError:
        return ""
    return record["hash"] if record["content"] == content else ""


def left_out(folder: Place, filters: Sequence[str], manifest: DatasetManifest, hint: str = "") -> frozenset[str]:
    """Ids of the dialogues and utterances that filters exclude.

    Args:
        folder: prepared data that were audited.
        filters: ``no_<flag>`` each.
        manifest: of the data; the audit must be the one it records.
        hint: added to error messages: the command that prepares the data.

    Raises:
        MsencError: a filter that does not exist, no audit of these data, or another one than the manifest records.
    """
    for name in filters:
        if name.removeprefix("no_") not in FLAGS or not name.startswith("no_"):
            known = ", ".join(f"no_{flag}" for flag in FLAGS)
            raise MsencError(f"data.filter: no filter {name!r}. Expected one of: {known}.")
    wanted = f"data.filter={','.join(filters)}"
    if not manifest.audit_hash:
        raise MsencError(
            f"{folder}: {wanted} needs an audit, and these data have none. Run: python prepare.py stage=audit, with "
            "the same data.* settings."
        )
    record = _read_record(folder, hint)
    path = folder / AUDIT / "audit.csv"
    text = read_text(path, AGAIN)
    if record["hash"] != manifest.audit_hash or hashlib.sha256(text.encode()).hexdigest() != record["flags"]:
        raise MsencError(
            f"{path}: not the audit that dataset.json records. {wanted} would exclude the wrong items. {AGAIN}"
        )
    flags = {name.removeprefix("no_") for name in filters}
    rows = parse_csv(text, path, [f.name for f in fields(Flag)], AGAIN)
    return frozenset(row["id"] for row in rows if row["flag"] in flags and row["id"])


def count_left_out(ids: Iterable[str]) -> dict[str, dict[str, int]]:
    """Split -> how many dialogues, and how many utterances of other dialogues, `left_out` excludes.

    Example:
        >>> count_left_out({"meld/test/dia3", "meld/test/dia3/utt1", "meld/test/dia4/utt0"})
        {'test': {'dialogues': 1, 'utterances': 1}}
    """
    counts: dict[str, dict[str, int]] = {}
    ids = set(ids)
    for id in sorted(ids):
        dialogue, _, _ = id.partition("/utt")
        of_split = counts.setdefault(_split_of(id), {"dialogues": 0, "utterances": 0})
        if dialogue == id:
            of_split["dialogues"] += 1
        elif dialogue not in ids:
            of_split["utterances"] += 1
    return counts


def _read_record(folder: Place, hint: str) -> dict[str, Any]:
    path = folder / AUDIT / "audit.json"
    return read_json(path, _Record, f"{AGAIN} {hint}".rstrip(), SCHEMA_VERSION)


class FilteredReader:
    """A `ShardReader` without some dialogues and utterances.

    Args:
        reader: of turns, or of one stream's features.
        turns: of the same split, which name the utterances; `reader` itself where that reads turns.
        ids: to exclude: dialogue ids, and ``<dialogue id>/utt<utterance id>``.
    """

    def __init__(self, reader: ShardReader, turns: ShardReader, ids: frozenset[str]) -> None:
        self.reader = reader
        self.folder = reader.folder
        self.split = reader.split
        self.settings = reader.settings
        self.hash = hashlib.sha256(json.dumps([reader.hash, sorted(ids)]).encode()).hexdigest()
        touched = {id.rpartition("/")[0] for id in ids}
        self._kept: dict[str, list[int]] = {}
        self.ids, self.lengths = [], []
        for id, lengths in zip(reader.ids, reader.lengths, strict=True):
            if id in ids:
                continue
            kept = list(range(len(lengths)))
            if id in touched:
                utterances = turns.read(id)["turns.json"]["utterances"]
                kept = [k for k, u in enumerate(utterances) if f"{id}/utt{u['id']}" not in ids]
                self._kept[id] = kept
            self.ids.append(id)
            self.lengths.append([lengths[k] for k in kept])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, id: str) -> dict[str, Any]:
        """As `ShardReader.read`, without excluded items."""
        members = self.reader.read(id)
        if id not in self._kept:
            return members
        kept = self._kept[id]
        if "turns.json" in members:
            turns = members["turns.json"]
            return {"turns.json": {**turns, "utterances": [turns["utterances"][k] for k in kept]}}
        spans = list(pairwise(members["offsets.npy"]))
        frames = [members["features.npy"][slice(*spans[k])] for k in kept]
        offsets = np.cumsum([0, *(len(f) for f in frames)], dtype=np.int64)
        return {"features.npy": np.concatenate([members["features.npy"][:0], *frames]), "offsets.npy": offsets}

    def check(self) -> None:
        """As `ShardReader.check`."""
        self.reader.check()

    def close(self) -> None:
        """As `ShardReader.close`."""
        self.reader.close()


@dataclass(frozen=True)
class Audit:
    """What was found.

    Args:
        rejections: unusable items: rows, and streams of utterances.
        flags: everything else.
        facts: split -> name -> number.
        hash: of all of it, and of the annotations.
    """

    rejections: list[Rejection]
    flags: list[Flag]
    facts: dict[str, dict[str, Any]]
    hash: str

    def rejected_by_split(self) -> dict[str, dict[str, int]]:
        """``what: reason`` -> split -> number; items in no split are under ``unknown``."""
        return _table((f"{r.what}: {r.reason}", _split_of(r.id)) for r in self.rejections)

    def flagged_by_split(self) -> dict[str, dict[str, int]]:
        """Flag -> split -> number, in the order of `FLAGS`."""
        found = _table((flag.flag, flag.split) for flag in self.flags)
        return {flag: found[flag] for flag in FLAGS if flag in found}

    @property
    def columns(self) -> list[str]:
        """The splits that tables show."""
        return [*self.facts, *([UNKNOWN] if any(_split_of(r.id) == UNKNOWN for r in self.rejections) else [])]


def _table(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for (reason, split), count in Counter(pairs).items():
        table.setdefault(reason, {})[split] = count
    return table


def _split_of(id: str) -> str:
    """The split in an id; a part of a recording that never became a dialogue has none."""
    parts = id.split("/")
    return parts[1] if len(parts) > 2 and parts[1] in SPLITS else UNKNOWN
