"""Long recordings -> ``utterances.csv``: who says what, from when to when, dialogue by dialogue.

Two stages keep one result per dialogue: *segment* finds the utterances, of one speaker each, *transcribe* their words.
*speakers* is the whole: the table of them. Nothing is cut or encoded anew: an utterance is a span of its recording.
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from msenc.files import digest, inside, write_text
from msenc.raw import channels, container, segment, speakers
from msenc.raw.container import SUFFIXES, MediaError, StoredNames, is_same_name, shown, with_track
from msenc.raw.hashes import hash_clips
from msenc.raw.media import read_audio
from msenc.raw.segment import (
    SAMPLE_RATE,
    SegmentSettings,
    Stretch,
    cut_utterances,
    find_cuts,
    load_speech_detector,
    quietest_moment,
)
from msenc.raw.speakers import SpeakerEncoder, find_speakers
from msenc.raw.splits import split_dialogues
from msenc.raw.timestamps import FILE_NAME, DialogueSpan, read_timestamps
from msenc.store.manifest import write_rejections
from msenc.types import UNKNOWN_SPEAKER, MsencError, Rejection
from msenc.work.items import Item, Members, Part, read_result, run_items, say_missing
from msenc.work.threads import one_thread

STAGES = ("segment", "transcribe", "speakers")
COLUMNS = ("clip", "start", "end", "dialogue", "speaker", "text", "split")
UTTERANCES, REJECTED, DIGEST = "utterances.csv", "utterances-rejected.csv", ".utterances.sha256"

_MARGIN_S = 0.1  # of sound around an utterance that the recogniser hears, where nobody else speaks in it


@dataclass(frozen=True)
class Recipe:
    """How recordings become utterances.

    Args:
        segment: when an utterance ends.
        make_recogniser: builds what turns sounds into words (`msenc.models.recognition.Recogniser`); picklable.
        make_encoder: builds what tells voices apart; picklable.
        settings: the configs of both, by ``recogniser`` and ``speaker_encoder``: work is done anew where they change.
        split: `msenc.raw.splits.split_dialogues`'s rule, fractions and seed.
        track: of the recordings' audio, from 1 on; None: the one marked as default.
        per_channel: whether each channel holds one speaker, and is listened to by itself.
    """

    segment: SegmentSettings
    make_recogniser: Callable[[], Any]
    make_encoder: Callable[[], SpeakerEncoder]
    settings: Mapping[str, Any]
    split: Mapping[str, Any]
    track: int | None = None
    per_channel: bool = False


@dataclass(frozen=True)
class Transcript:
    """What `transcribe_recordings` made.

    Args:
        file: ``utterances.csv``.
        num_dialogues: with at least one utterance.
        num_utterances: rows of the file.
        num_unknown: of them without a speaker.
        rejections: dialogues and utterances that cannot be used; also in ``utterances-rejected.csv``.
        notes: what else a user should know.
    """

    file: Path
    num_dialogues: int
    num_utterances: int
    num_unknown: int
    rejections: list[Rejection]
    notes: list[str]


@dataclass(frozen=True)
class _Found:
    """The dialogues, by number, and what is wrong with the material."""

    spans: list[DialogueSpan]
    rejections: list[Rejection]
    notes: list[str]


def transcribe_recordings(
    name: str,
    root: Path,
    folder: Path,
    recipe: Recipe,
    num_workers: int,
    last_stage: str | None = None,
    part: Part | None = None,
) -> Transcript | list[str]:
    """Make ``utterances.csv`` from a folder of recordings, doing what is not done yet.

    Args:
        name: of the data set; begins every id.
        root: recordings, and ``timestamp.json`` where they hold several dialogues each; nothing is written there.
        folder: of the prepared data.
        recipe: how.
        num_workers: processes; 0 works in this one.
        last_stage: stop behind this stage.
        part: do only this part of the dialogues.

    Returns:
        What was made; or, where something remains to be done, what, in words.

    Raises:
        MsencError: the folder has no usable recording, a package or model is missing, ``utterances.csv`` was edited
            where this would write it anew, or the disk refuses.
    """
    _check_unedited(folder)
    found = _find_dialogues(root)
    sources = [span.video for span in found.spans]
    split_dialogues(videos=sources, **recipe.split)  # refuses what cannot be before anything is listened to
    videos = dict.fromkeys(sources)
    hashes = hash_clips(root, videos, folder, num_workers)
    rejected = {n: "recording missing" for n, span in enumerate(found.spans) if hashes[span.video] is None}
    # number of the dialogue -> its utterances so far, one list per stage: stretches, texts
    columns: dict[int, list[Any]] = {n: [] for n in range(len(found.spans)) if n not in rejected}
    if not columns:
        raise MsencError(
            f"{root}: found none of the {len(videos)} recordings that {FILE_NAME} names, as {next(iter(videos))!r}. "
            "Put them there, or set data.root to their folder."
        )
    stages = STAGES[: STAGES.index(last_stage) + 1] if last_stage else STAGES
    for stage in stages[:2]:
        items = {n: _item(stage, n, found.spans[n], hashes, recipe, columns[n]) for n in columns}
        results = inside(folder, f".{stage}.items")
        missing = run_items(
            list(items.values()), results, _make_work(stage, root, recipe), num_workers, stage, "dialogues", part
        )
        if missing:
            return [f"{stage}: {say_missing(list(items.values()), missing, part)}"]
        for number, item in items.items():
            outcome = read_result(item, results)["outcome.json"]
            if "rejected" in outcome:
                rejected[number] = outcome["rejected"]
                del columns[number]
            else:
                columns[number].append(outcome["found"])
    if stages != STAGES:
        return []
    # of all dialogues, so that one that cannot be used takes no other one's place
    has_target = [sum(map(_has_words, columns[n][1])) > 1 if n in columns else False for n in range(len(found.spans))]
    splits = split_dialogues(videos=sources, has_target=has_target, **recipe.split)
    ids = [f"{name}/{split}/dia{number}" for number, split in enumerate(splits)]
    rejections = [*found.rejections, *(_rejection(ids[n], found.spans[n], rejected[n]) for n in sorted(rejected))]
    return _write(folder, found, columns, ids, rejections, recipe.per_channel)


def _find_dialogues(root: Path) -> _Found:
    root = Path(root)
    if not root.is_dir():
        raise MsencError(f"{root}: no such folder. Expected recordings in it; set data.root to their folder.")
    if (root / FILE_NAME).is_file():
        times = read_timestamps(root / FILE_NAME)
        notes = [f"{FILE_NAME}: {len(times.spans):,} dialogues, {times.hours:.2f} h."]
        notes += [f"Overlap, used as it is: {line}" for line in times.overlaps]
        stored = StoredNames(root)
        named = {span.video: stored.find(span.video) for span in times.spans}
        notes += [
            f"Several files are {video}, so none is taken: {', '.join(map(ascii, names))}. Rename them."
            for video, names in named.items()
            if len(names) > 1
        ]
        notes += [
            f"Found under a name of other capitals: {video} as {names[0]}."
            for video, names in named.items()
            if len(names) == 1 and not is_same_name(video, names[0])
        ]
        spans = [replace(s, video=n[0]) if len(n := named[s.video]) == 1 else s for s in times.spans]
        return _Found(spans, times.rejections, notes)
    names = sorted(
        p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")
    )
    videos = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not videos:
        seen = f"{len(names)} other files, as {names[0]!r}" if names else "nothing"
        raise MsencError(
            f"{root}: found no recording, but {seen}. Expected files that end in {', '.join(SUFFIXES)}, or a "
            f"{FILE_NAME} that names others."
        )
    odd = [name for name in videos if shown(name) != name]  # no table or JSON can name them
    if len(odd) == len(videos):
        raise MsencError(f"{root}: found no recording whose name is UTF-8, as {shown(odd[0])}. Rename them.")
    notes = [f"No {FILE_NAME} in {root}: each of the {len(videos):,} recordings is one dialogue."]
    if others := len(names) - len(videos):
        notes.append(f"Not taken for recordings: {others:,} files, by their names.")
    spans = [DialogueSpan(name) for name in videos if name not in odd]
    return _Found(spans, [Rejection(shown(name), "dialogue", "name is not UTF-8", shown(name)) for name in odd], notes)


def _item(
    stage: str,
    number: int,
    span: DialogueSpan,
    hashes: Mapping[str, str | None],
    recipe: Recipe,
    columns: Sequence[Any],
) -> Item:
    place = [hashes[span.video], span.start_s, span.end_s, recipe.track]
    place += [channels.VERSION] if recipe.per_channel else []
    settings = {
        "segment": [segment.VERSION, speakers.VERSION, asdict(recipe.segment), recipe.settings["speaker_encoder"]],
        "transcribe": [recipe.settings["recogniser"]],
    }[stage]
    return Item(
        id=f"dia{number} ({span.video})",
        key=digest([stage, container.VERSION, place, settings, columns[:1]], length=64),
        input=(span, columns[0] if columns else None),
    )


def _make_work(stage: str, root: Path, recipe: Recipe) -> Callable[[], Callable[[Any], Members]]:
    if stage == "segment":
        return partial(SegmentWork, root, recipe)
    return partial(TranscribeWork, root, recipe)


Sounds = dict[str | None, np.ndarray]
"""Who speaks in a sound, where it is known -> the sound."""


class _Work:
    """A dialogue -> what a stage finds in it, or why it cannot be used."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root = root
        self.track = recipe.track
        self.per_channel = recipe.per_channel

    def __call__(self, input: tuple[DialogueSpan, list[Stretch] | None]) -> Members:
        span, utterances = input
        try:
            with one_thread():
                video = span.video if self.track is None else with_track(span.video, self.track)
                place = self.root / video, SAMPLE_RATE, (span.start_s, span.end_s)
                if self.per_channel:
                    sounds: Sounds = {str(n): sound for n, sound in enumerate(channels.read_channels(*place))}
                else:
                    sounds = {None: read_audio(*place)}
                return {"outcome.json": {"found": self.find(span, sounds, utterances)}}
        except MediaError as error:
            return {"outcome.json": {"rejected": error.reason}}

    def find(self, span: DialogueSpan, sounds: Sounds, utterances: list[Stretch] | None) -> list[Any]:
        raise NotImplementedError


class SegmentWork(_Work):
    """A dialogue -> [start, end, speaker] of its utterances, in seconds of the recording."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        super().__init__(root, recipe)
        self.settings = recipe.segment
        self.detect = load_speech_detector()
        self.encode = None if recipe.per_channel else recipe.make_encoder()

    def find(self, span: DialogueSpan, sounds: Sounds, utterances: list[Stretch] | None) -> list[Any]:
        """Speech, speakers and cuts -> utterances."""
        spoken = {speaker: self.detect(sound, self.settings.speech_threshold) for speaker, sound in sounds.items()}
        if not any(spoken.values()):
            raise MediaError("no speech")
        cuts = find_cuts(self.root / span.video, (span.start_s, span.end_s), self.settings.scene_threshold)
        found: list[Stretch] = []
        for speaker, speech in spoken.items():
            if speaker is None:
                stretches = find_speakers(sounds[speaker], speech, self.encode)
            else:
                stretches = [(*times, speaker) for times in speech]
            found += cut_utterances(stretches, cuts, self.settings, quietest_moment(sounds[speaker]))
        return [[*(round(span.start_s + t, 3) for t in times), speaker] for *times, speaker in sorted(found)]


class TranscribeWork(_Work):
    """A dialogue's utterances -> their words."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        super().__init__(root, recipe)
        self.recogniser = recipe.make_recogniser()

    def find(self, span: DialogueSpan, sounds: Sounds, utterances: list[Stretch] | None) -> list[Any]:
        """Words of each utterance, which is heard with a little of the pauses around it."""
        heard: dict[int, np.ndarray] = {}
        for speaker, sound in sounds.items():
            own = [n for n, stretch in enumerate(utterances) if speaker in (None, stretch[2])]
            heard |= zip(own, self._slices(span, sound, [utterances[n] for n in own]), strict=True)
        return self.recogniser.texts([heard[n] for n in range(len(utterances))])

    def _slices(self, span: DialogueSpan, sound: np.ndarray, utterances: list[Stretch]) -> list[np.ndarray]:
        starts = [start for start, *_ in utterances]
        ends = [end for _, end, _ in utterances]
        sounds = []
        for start, end, previous, following in zip(
            starts, ends, [-np.inf, *ends[:-1]], [*starts[1:], np.inf], strict=True
        ):
            first = max(start - _MARGIN_S, (previous + start) / 2, span.start_s)
            last = min(end + _MARGIN_S, (end + following) / 2)
            sounds.append(_slice(sound, first - span.start_s, last - span.start_s))
        return sounds


def _slice(sound: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    return sound[max(round(start_s * SAMPLE_RATE), 0) : round(end_s * SAMPLE_RATE)]


def _rejection(id: str, span: DialogueSpan, reason: str) -> Rejection:
    found = f"{span.start_s:g} to {'its end' if span.end_s is None else f'{span.end_s:g}'} s"
    return Rejection(id, "dialogue", reason, span.video, found=found)


def _check_unedited(folder: Path) -> None:
    path = folder / UTTERANCES
    if not path.is_file() or not (folder / DIGEST).is_file():
        return
    if hashlib.sha256(path.read_bytes()).hexdigest() not in (folder / DIGEST).read_text(encoding="utf-8"):
        raise MsencError(
            f"{path}: this file was edited, and would be written anew. Move it to the folder of the recordings "
            f"(data.root), where it is read instead of listening to them; or delete it."
        )


def _write(
    folder: Path,
    found: _Found,
    columns: Mapping[int, list[Any]],
    ids: Sequence[str],
    rejections: list[Rejection],
    per_channel: bool,
) -> Transcript:
    rows: list[tuple[str, ...]] = []
    for number, (stretches, texts) in columns.items():
        video = found.spans[number].video
        _, split, dialogue = ids[number].split("/")
        for turn, ((start_s, end_s, speaker), text) in enumerate(zip(stretches, texts, strict=True)):
            text = re.sub(r"\s+", " ", text).strip()
            clip = f"{video}#channel={int(speaker) + 1}" if per_channel else video
            if _has_words(text):
                rows.append((clip, f"{start_s:.3f}", f"{end_s:.3f}", dialogue, speaker, text, split))
            else:
                place = f"{start_s:g} to {end_s:g} s"
                rejections.append(Rejection(f"{ids[number]}/span{turn}", "row", "no words", video, found=place))
    if not rows:
        raise MsencError(f"{folder}: no utterance was found in {len(found.spans)} dialogues. {_counted(rejections)}")
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    write_rejections(folder / REJECTED, rejections)
    table = buffer.getvalue()
    digest = hashlib.sha256(table.encode()).hexdigest()
    before = (folder / DIGEST).read_text(encoding="utf-8")[: len(digest)] if (folder / DIGEST).is_file() else ""
    write_text(folder / DIGEST, f"{digest}\n{before}\n")  # both, as a kill may come before the next line
    write_text(folder / UTTERANCES, table)
    return Transcript(
        file=folder / UTTERANCES,
        num_dialogues=len({row[3] for row in rows}),
        num_utterances=len(rows),
        num_unknown=sum(row[4] == UNKNOWN_SPEAKER for row in rows),
        rejections=rejections,
        notes=found.notes,
    )


def _has_words(text: str) -> bool:
    return any(c.isalnum() for c in text)


def _counted(rejections: Sequence[Rejection]) -> str:
    counts: dict[str, int] = {}
    for rejection in rejections:
        counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())
