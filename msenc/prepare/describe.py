"""The describe stage: measures of all clips -> bins fitted on the train split -> attributes and a sentence per turn.

Measures are cached by a clip's content, so a second call measures nothing. Bins pool all train clips, pitch per
gender; never by speaker id, which in many data sets is local to its dialogue.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, NotRequired, TypedDict

from msenc.files import digest, inside, parse_json, read_json, write_text
from msenc.files.kinds import Sha256
from msenc.prepare.writer import choose_sentence, write_sentences
from msenc.raw import container
from msenc.raw.container import MediaError, part_of, split_part, tracks_of
from msenc.raw.hashes import hash_clips
from msenc.raw.media import read_audio
from msenc.speech.attributes import (
    Bin,
    MeasuredTurn,
    VoiceSettings,
    attributes_of,
    estimate_gender,
    fit_bins,
    has_espeak,
    measured_values,
    relate_to_recording,
    syllables_of,
)
from msenc.speech.description import parse, read
from msenc.speech.voice import SAMPLE_RATE, VERSION, VoiceMeasures, measure
from msenc.store.labels import VOICE_TURNS
from msenc.types import UNKNOWN, UNKNOWN_SPEAKER, Dialogue, MsencError, Rejection, Utterance, VoiceAttributes
from msenc.work.items import Item, Members, Part, read_result, run_items

MADE_BY = [VERSION, container.VERSION]
"""What an outcome depends on beside its clip; of other measures, or other decoding, it is none."""

CACHE = "voice-cache.jsonl"
BINS = "voice-bins.json"
ITEMS = ".voice.items"
ITEM_CLIPS = 32
AROUND_S = 1.0  # of a recording, on each side of a clip, whose pauses tell the noise


def describe_dialogues(
    dialogues: Sequence[Dialogue],
    root: Path,
    folder: Path,
    settings: VoiceSettings,
    num_workers: int,
    rejections: list[Rejection],
) -> tuple[list[Dialogue], dict[str, Bin]]:
    """Give every turn its attributes and, where it has none, a description.

    Writes ``voice-bins.json`` and ``voice-turns.jsonl`` (per turn: measures, attributes, where gender and description
    come from) into `folder`, and keeps ``voice-cache.jsonl`` there.

    Args:
        dialogues: of all splits.
        root: folder that the clips' paths start from.
        folder: of the prepared data set.
        settings: how to describe.
        num_workers: processes that measure; 0 works in this one. The result does not depend on it.
        rejections: receives the clips that have no sound.

    Returns:
        The dialogues, described; and the bins by name (``pitch/woman``, ``rate``, ...).

    Raises:
        MsencError: no clip of the train split has a voice, a worker died, or the disk refuses.
    """
    measures = _measure_all(dialogues, Path(root), folder, num_workers, rejections)
    measures = _related(dialogues, measures, settings.loudness == "relative")
    turns = _turns(dialogues, measures, settings)
    bins = fit_bins((turns[d.id, u.id] for d in dialogues if d.split == "train" for u in d.utterances), settings)
    sentences = {}
    if settings.writer is not None and not settings.only_measure:
        voices = (
            (u, attributes_of(turns[d.id, u.id].values, turns[d.id, u.id].gender, bins))
            for d in dialogues
            for u in d.utterances
        )
        wanted = (v for u, v in voices if v != VoiceAttributes() and (u.description is None or settings.overwrite))
        sentences = write_sentences(wanted, settings, folder)
    described, lines = [], []
    for dialogue in dialogues:
        utterances = []
        for utterance in dialogue.utterances:
            turn = turns[dialogue.id, utterance.id]
            measured = attributes_of(turn.values, turn.gender, bins)
            rng = Random(f"{settings.seed}/{dialogue.id}/{utterance.id}")
            new, source = _described(utterance, measured, settings, sentences, rng)
            utterances.append(new)
            lines.append(
                {
                    "id": f"{dialogue.id}/utt{utterance.id}",
                    **asdict(measures.get(utterance.clip_of("audio")) or VoiceMeasures()),
                    "rate": turn.values["rate"],
                    "gender_source": turn.gender_source,
                    "measured": asdict(measured),
                    "description_source": source,
                    "not_understood": list(read(new.description or "").unread),
                }
            )
        described.append(replace(dialogue, utterances=tuple(utterances)))
    value = {"settings": describe_settings(settings), "bins": {name: asdict(b) for name, b in bins.items()}}
    write_text(folder / BINS, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / VOICE_TURNS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return described, bins


def describe_settings(settings: VoiceSettings) -> dict[str, Any]:
    """The settings as plain values, with the version of the measures and what counts the syllables."""
    plain = json.loads(json.dumps(asdict(settings)))
    del plain["writer_url"]  # what is written there depends on the model alone
    if settings.writer is None:
        del plain["writer"]
    return {**plain, "measures": VERSION, "syllables": "espeak" if has_espeak() else "letters"}


class _Bins(TypedDict):
    bins: dict[str, Bin]


class _Outcome(TypedDict):
    sha256: Sha256
    version: list[int]
    reason: NotRequired[str]
    measures: NotRequired[VoiceMeasures]


def read_bins(folder: Path) -> dict[str, Bin]:
    """The bins that `describe_dialogues` wrote; the same words can then be given to other sound.

    Raises:
        MsencError: if the folder has none.
    """
    path = Path(folder) / BINS
    advice = "Expected the bins of a described data set: prepare.py describe=true."
    value = read_json(path, _Bins, advice)["bins"]
    for name, found in value.items():
        if found["edges"] is not None and len(found["words"]) != len(found["edges"]) + 1:
            raise MsencError(
                f"{path}, bins.{name}: found {len(found['words'])} words for {len(found['edges'])} edges, "
                f"expected one more. {advice}"
            )
    return {
        name: Bin(**{**b, **{k: tuple(b[k]) if b[k] else None for k in ("edges", "words", "percentiles")}})
        for name, b in value.items()
    }


def _related(
    dialogues: Sequence[Dialogue], measures: Mapping[str, VoiceMeasures], is_relative: bool
) -> dict[str, VoiceMeasures]:
    """What each clip's measures are in its recording: the file that it is a part of, else the dialogue's clips."""
    recordings: dict[tuple[str, ...], dict[str, VoiceMeasures]] = {}
    for dialogue in dialogues:
        for clip in (c for u in dialogue.utterances if (c := u.clip_of("audio")) in measures):
            file, span = split_part(clip)
            recording = (dialogue.id,) if span is None else (file, str(tracks_of(clip)))
            recordings.setdefault(recording, {})[clip] = measures[clip]
    return {clip: m for own in recordings.values() for clip, m in relate_to_recording(own, is_relative).items()}


def _turns(
    dialogues: Sequence[Dialogue], measures: Mapping[str, VoiceMeasures], settings: VoiceSettings
) -> dict[tuple[str, str], MeasuredTurn]:
    texts = [u.text for d in dialogues for u in d.utterances]
    syllables = iter(syllables_of(texts))
    turns = {}
    for dialogue in dialogues:
        own = [(u, measures.get(u.clip_of("audio")) or VoiceMeasures()) for u in dialogue.utterances]
        for utterance, measured in own:
            gender, source = settings.genders.get(utterance.speaker, UNKNOWN), "given"
            if gender == UNKNOWN:
                gender = parse(utterance.description or "").gender
            if gender == UNKNOWN:
                # unknown speakers are not one person
                is_known = utterance.speaker != UNKNOWN_SPEAKER
                heard = [m for u, m in own if u.speaker == utterance.speaker] if is_known else [measured]
                gender, source = estimate_gender(heard), "estimated"
            values = measured_values(measured, next(syllables))
            turns[dialogue.id, utterance.id] = MeasuredTurn(values, gender, source if gender != UNKNOWN else None)
    return turns


def _described(
    utterance: Utterance,
    measured: VoiceAttributes,
    settings: VoiceSettings,
    sentences: Mapping[VoiceAttributes, Sequence[str | None]],
    rng: Random,
) -> tuple[Utterance, str | None]:
    """A turn with its description, and where that comes from."""
    if utterance.description is not None and not settings.overwrite:
        return replace(utterance, attributes=parse(utterance.description)), "given"
    marks = _marks_of_text(utterance)
    if measured == VoiceAttributes():
        return replace(utterance, description=None, attributes=None, marks=marks), None
    description, source = choose_sentence(sentences, measured, rng)
    return replace(utterance, description=description, attributes=measured, marks=marks), source


def _marks_of_text(utterance: Utterance) -> tuple[Any, ...]:
    """Marks in a description that is replaced would point into another sentence."""
    return tuple(mark for mark in utterance.marks if mark.field == "text")


# ---------------------------------------------------------------------------------------------------- measuring


def audio_hashes(dialogues: Iterable[Dialogue], hashes: Mapping[str, str | None]) -> dict[str, str | None]:
    """Of hashes of clips, those of the clips that audio is read from."""
    clips = (u.clip_of("audio") for d in dialogues for u in d.utterances)
    return {clip: hashes[clip] for clip in clips if clip in hashes}


def measure_items(hashes: Mapping[str, str | None], root: Path, folder: Path) -> list[Item]:
    """Cut the measuring of clips that `folder` has no measures of into items."""
    known = _read_cache(folder / CACHE)
    new = {digest: clip for clip, digest in hashes.items() if digest is not None and digest not in known}
    groups = [list(new.items())[first : first + ITEM_CLIPS] for first in range(0, len(new), ITEM_CLIPS)]
    return [
        Item(
            id=f"{group[0][1]} .. {group[-1][1]}",
            key=digest([MADE_BY, [sha256 for sha256, _ in group]], length=64),
            input=[(digest, root / clip) for digest, clip in group],
            size=len(group),
        )
        for group in groups
    ]


def run_measures(items: Sequence[Item], folder: Path, num_workers: int, part: Part | None = None) -> list[Item]:
    """Measure; returns the items that other parts have to do."""
    return run_items(items, inside(folder, ITEMS), _make_measure, num_workers, "voice: measuring", "clips", part)


def _make_measure() -> Callable[[Any], Members]:
    return lambda clips: {"outcomes.json": {digest: measure_clip(path) for digest, path in clips}}


def _measure_all(
    dialogues: Sequence[Dialogue], root: Path, folder: Path, num_workers: int, rejections: list[Rejection]
) -> dict[str, VoiceMeasures]:
    """Clip -> its measures; only clips that the cache does not know are decoded."""
    turns = [(f"{d.id}/utt{u.id}", u.clip_of("audio")) for d in dialogues for u in d.utterances]
    clips = (clip for d in dialogues for u in d.utterances for clip in u.clips)  # all: what is known of others is kept
    hashes = audio_hashes(dialogues, hash_clips(root, clips, folder, num_workers))
    items = measure_items(hashes, root, folder)
    run_measures(items, folder, num_workers)
    outcomes = _read_cache(folder / CACHE)
    for item in items:
        outcomes |= read_result(item, inside(folder, ITEMS))["outcomes.json"]
    wanted = dict.fromkeys(digest for digest in hashes.values() if digest is not None)
    lines = ({**outcomes[digest], "sha256": digest, "version": MADE_BY} for digest in wanted)
    write_text(folder / CACHE, "".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(inside(folder, ITEMS), ignore_errors=True)
    measures = {}
    for id, clip in turns:
        digest = hashes.get(clip)
        outcome = {"reason": "clip missing"} if digest is None else outcomes[digest]
        if outcome.get("reason"):
            rejections.append(Rejection(id, "audio", outcome["reason"], clip or ""))
        else:
            measures[clip] = VoiceMeasures(**outcome["measures"])
    return measures


def measure_clip(path: Path) -> dict[str, Any]:
    """``{"measures": ...}`` of one clip, or ``{"reason": ...}`` where it has no sound."""
    try:
        samples, around = read_audio(path, SAMPLE_RATE), None
        _, span = split_part(str(path))
        if span is not None:
            wider = part_of(str(path), max(span[0] - AROUND_S, 0), span[1] + AROUND_S)
            around = read_audio(Path(wider), SAMPLE_RATE)
        return {"measures": asdict(measure(samples, SAMPLE_RATE, around))}
    except MediaError as error:
        return {"reason": error.reason}


def _read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by hash; lines that are damaged, or of another version, count as not there."""
    if not path.is_file():
        return {}
    cache = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        with suppress(MsencError):
            entry = parse_json(line, number, _Outcome)
            if entry["version"] == MADE_BY and ("reason" in entry or "measures" in entry):
                cache[entry["sha256"]] = entry
    return cache
