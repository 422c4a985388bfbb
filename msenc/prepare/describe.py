"""The describe stage: measures of all clips -> bins fitted on the train split -> attributes and a sentence per turn.

Measures are cached by a clip's content, so a second call measures nothing. Bins pool all train clips, pitch per
gender; never by speaker id, which in many data sets is local to its dialogue.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from msenc.files import digest, write_text
from msenc.raw.hashes import hash_clips
from msenc.raw.media import MediaError, read_audio
from msenc.speech.description import VOCABULARY, describe, parse
from msenc.speech.voice import SAMPLE_RATE, VERSION, VoiceMeasures, count_syllables, guess_syllables, measure
from msenc.store.labels import VOICE_TURNS
from msenc.types import UNKNOWN, Dialogue, MsencError, Rejection, Utterance, VoiceAttributes
from msenc.work.items import Item, Members, Part, read_result, run_items

CACHE = "voice-cache.jsonl"
BINS = "voice-bins.json"
ITEMS = ".voice.items"
ITEM_CLIPS = 32

UNITS = {
    "pitch": "Hz",
    "range": "semitones",
    "rate": "syllables/s",
    "loudness": "LUFS",
    "pauses": "share",
    "noise": "dB SNR",
}
"""The unit of each attribute's value."""

MIN_SPREAD = {"pitch": 2.0, "range": 1.0, "rate": 0.5, "loudness": 3.0, "pauses": 0.05, "noise": 6.0}
"""What the middle 80 % of the train clips must span for words to say anything; pitch in semitones, others in `UNITS`.

About the smallest difference that one hears between two sentences, or that the measures resolve.
"""

MIN_CLIPS = 10

GENDER_CUES = {"f0_hz": (155.0, 0.25), "f3_hz": (2850.0, 1.0), "f4_hz": (3900.0, 0.5)}
"""Measure -> where women and men part, and how much a semitone above it counts for a woman."""

MIN_GENDER_ST = 0.3
"""Weighted semitones from there, below which a voice may be either."""


class NoVoiceError(MsencError):
    """No clip of the train split has a voice that could be measured."""


@dataclass(frozen=True)
class VoiceSettings:
    """How turns are described.

    Args:
        levels: words per attribute: 3, or 2 without the middle one.
        genders: speaker -> ``woman`` or ``man``, where the data set tells; others are estimated by pitch.
        edges: values at which the next word begins, for those that are not to be quantiles of the train split, by
            name: ``noise``, ``pitch/woman``, ...
        overwrite: replace the data set's own descriptions; else they stay and are read for their attributes.
        seed: of the sentences' templates.
        only_measure: measures and attributes are written, and the turns stay as they are.
    """

    levels: int = 3
    genders: Mapping[str, str] = field(default_factory=dict)
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    overwrite: bool = False
    seed: int = 1
    only_measure: bool = False

    def __post_init__(self) -> None:
        """Refuse what no bins could be made of."""
        if self.levels not in (2, 3):
            raise MsencError(f"data.voice.levels: found {self.levels!r}, expected 2 or 3 words per attribute.")
        for speaker, gender in self.genders.items():
            if gender not in VOCABULARY["gender"]:
                raise MsencError(
                    f"data.voice.genders: found {gender!r} for {speaker}, expected {' or '.join(VOCABULARY['gender'])}."
                )
        for name, edges in self.edges.items():
            if name not in _GROUPS:
                raise MsencError(f"data.voice.edges: no value {name!r}; there are {', '.join(_GROUPS)}.")
            if len(edges) != self.levels - 1 or list(edges) != sorted(edges):
                raise MsencError(
                    f"data.voice.edges.{name}: found {list(edges)}, expected {self.levels - 1} rising number(s) for "
                    f"{self.levels} levels."
                )


@dataclass(frozen=True)
class Bin:
    """Where one attribute's words change.

    Args:
        edges: the values at which the next word begins, rising; None where the words would say nothing.
        words: one more than the edges.
        source: ``quantiles``, ``given``, or why there are no edges.
        clips: train clips that it was fitted on.
        percentiles: their 10th, 50th and 90th, or None without clips.
    """

    edges: tuple[float, ...] | None
    words: tuple[str, ...]
    source: str
    clips: int
    percentiles: tuple[float, float, float] | None

    def word(self, value: float | None) -> str:
        """The word of a value; ``unknown`` without a value, or without edges."""
        if value is None or self.edges is None:
            return UNKNOWN
        return self.words[int(np.searchsorted(self.edges, value, side="right"))]


_GROUPS = (*(f"pitch/{gender}" for gender in VOCABULARY["gender"]), *(name for name in UNITS if name != "pitch"))


@dataclass(frozen=True)
class _Turn:
    """One turn's values by attribute, and its gender with where that comes from (None where there is none)."""

    values: Mapping[str, float | None]
    gender: str
    gender_source: str | None


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
    turns = _turns(dialogues, measures, settings)
    bins = fit_bins((turns[d.id, u.id] for d in dialogues if d.split == "train" for u in d.utterances), settings)
    described, lines = [], []
    for dialogue in dialogues:
        utterances = []
        for utterance in dialogue.utterances:
            turn = turns[dialogue.id, utterance.id]
            measured = attributes_of(turn.values, turn.gender, bins)
            rng = Random(f"{settings.seed}/{dialogue.id}/{utterance.id}")
            utterances.append(_described(utterance, measured, settings, rng))
            lines.append(
                {
                    "id": f"{dialogue.id}/utt{utterance.id}",
                    **asdict(measures.get(utterance.clip) or VoiceMeasures()),
                    "rate": turn.values["rate"],
                    "gender_source": turn.gender_source,
                    "measured": asdict(measured),
                    "description_source": _source(utterance, utterances[-1]),
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
    return {**plain, "measures": VERSION, "syllables": "espeak" if _has_espeak() else "letters"}


def read_bins(folder: Path) -> dict[str, Bin]:
    """The bins that `describe_dialogues` wrote; the same words can then be given to other sound.

    Raises:
        MsencError: if the folder has none.
    """
    path = Path(folder) / BINS
    try:
        value = json.loads(path.read_text(encoding="utf-8"))["bins"]
    except (OSError, ValueError, KeyError) as error:
        raise MsencError(
            f"{path}: cannot be read ({error}). Expected the bins of a described data set: prepare.py describe=true."
        ) from error
    return {
        name: Bin(**{**b, **{k: tuple(b[k]) if b[k] else None for k in ("edges", "words", "percentiles")}})
        for name, b in value.items()
    }


def fit_bins(turns: Iterable[_Turn], settings: VoiceSettings) -> dict[str, Bin]:
    """Edges by name, at quantiles of the train split's clips, or as given.

    An attribute that (nearly) does not vary, or that fewer than ten clips show, gets no edges: its words would tell
    noise.

    Raises:
        MsencError: not one clip has a voice.
    """
    pooled: dict[str, list[float]] = {name: [] for name in _GROUPS}
    num_voices = 0
    for turn in turns:
        num_voices += turn.values["pitch"] is not None
        for name, value in turn.values.items():
            group = f"pitch/{turn.gender}" if name == "pitch" else name
            if value is not None and group in pooled:
                pooled[group].append(value)
    if num_voices == 0:
        raise NoVoiceError(
            "No clip of the train split has a voice that could be measured, so there is nothing to fit the words of "
            "voice descriptions on. Check that data.root holds the clips with their sound, or prepare without "
            "describe=true."
        )
    return {name: _fit_bin(name, np.array(values), settings) for name, values in pooled.items()}


def attributes_of(values: Mapping[str, float | None], gender: str, bins: Mapping[str, Bin]) -> VoiceAttributes:
    """Values in the units of `UNITS` -> words; a pitch without a gender has none."""
    words = {name: bins[name].word(values.get(name)) for name in UNITS if name != "pitch"}
    pitch = bins.get(f"pitch/{gender}")
    return VoiceAttributes(gender=gender, pitch=pitch.word(values.get("pitch")) if pitch else UNKNOWN, **words)


def measured_values(measures: VoiceMeasures, num_syllables: int) -> dict[str, float | None]:
    """A clip's measures -> the value of each attribute, in the units of `UNITS`."""
    speech_s = measures.speech_s
    return {
        "pitch": measures.f0_hz,
        "range": measures.f0_range_st,
        "rate": round(num_syllables / speech_s, 4) if speech_s and num_syllables > 1 else None,
        "loudness": measures.loudness_lufs,
        "pauses": measures.pause_share,
        "noise": measures.snr_db,
    }


def estimate_gender(measures: Sequence[VoiceMeasures]) -> str:
    """The likely gender of one speaker by some clips; ``unknown`` where women and men overlap.

    Pitch and, above all, the third and fourth formant, which a high or low mood does not move: `GENDER_CUES`, chosen on
    synthetic voices (docs/log.md).

    Example:
        >>> low, high = VoiceMeasures(110, f3_hz=2600, f4_hz=3600), VoiceMeasures(210, f3_hz=3000, f4_hz=4200)
        >>> estimate_gender([low, low, high]), estimate_gender([high]), estimate_gender([VoiceMeasures(f0_hz=90)])
        ('man', 'woman', 'unknown')
    """
    scores = [
        sum(weight * 12 * np.log2(getattr(m, cue) / middle) for cue, (middle, weight) in GENDER_CUES.items())
        for m in measures
        if all(getattr(m, cue) is not None for cue in GENDER_CUES)
    ]
    if not scores or abs(score := float(np.median(scores))) < MIN_GENDER_ST:
        return UNKNOWN
    return "woman" if score > 0 else "man"


def _fit_bin(name: str, values: np.ndarray, settings: VoiceSettings) -> Bin:
    vocabulary = VOCABULARY[name.partition("/")[0]]
    words = vocabulary if settings.levels == 3 else (vocabulary[0], vocabulary[-1])
    percentiles = tuple(round(float(p), 4) for p in np.percentile(values, [10, 50, 90])) if len(values) else None
    if name in settings.edges:
        return Bin(tuple(float(e) for e in settings.edges[name]), words, "given", len(values), percentiles)
    if len(values) < MIN_CLIPS:
        return Bin(None, words, f"fewer than {MIN_CLIPS} clips", len(values), percentiles)
    low, _, high = percentiles
    spread = 12 * np.log2(high / low) if name.startswith("pitch") else high - low
    if spread < MIN_SPREAD[name.partition("/")[0]]:
        return Bin(None, words, "does not vary", len(values), percentiles)
    shares = np.arange(1, settings.levels) / settings.levels
    edges = tuple(round(float(e), 4) for e in np.quantile(values, shares))
    if len(set(edges)) < len(edges) or edges[0] <= values.min():
        # many clips share one value (no pause at all): their word would begin at it, and the one below stay empty
        return Bin(None, words, "most clips share one value", len(values), percentiles)
    return Bin(edges, words, "quantiles", len(values), percentiles)


def _turns(
    dialogues: Sequence[Dialogue], measures: Mapping[str, VoiceMeasures], settings: VoiceSettings
) -> dict[tuple[str, str], _Turn]:
    texts = [u.text for d in dialogues for u in d.utterances]
    syllables = iter(syllables_of(texts))
    turns = {}
    for dialogue in dialogues:
        own = [(u, measures.get(u.clip) or VoiceMeasures()) for u in dialogue.utterances]
        for utterance, measured in own:
            gender, source = settings.genders.get(utterance.speaker, UNKNOWN), "given"
            if gender == UNKNOWN:
                gender = parse(utterance.description or "").gender
            if gender == UNKNOWN:
                heard = [m for u, m in own if u.speaker == utterance.speaker]
                gender, source = estimate_gender(heard), "estimated"
            values = measured_values(measured, next(syllables))
            turns[dialogue.id, utterance.id] = _Turn(values, gender, source if gender != UNKNOWN else None)
    return turns


def _described(utterance: Utterance, measured: VoiceAttributes, settings: VoiceSettings, rng: Random) -> Utterance:
    if utterance.description is not None and not settings.overwrite:
        return replace(utterance, attributes=parse(utterance.description))
    if measured == VoiceAttributes():
        return replace(utterance, description=None, attributes=None, marks=_marks_of_text(utterance))
    return replace(utterance, description=describe(measured, rng), attributes=measured, marks=_marks_of_text(utterance))


def _marks_of_text(utterance: Utterance) -> tuple[Any, ...]:
    """Marks in a description that is replaced would point into another sentence."""
    return tuple(mark for mark in utterance.marks if mark.field == "text")


def _source(before: Utterance, after: Utterance) -> str | None:
    if after.description is None:
        return None
    return "given" if after.description == before.description else "template"


# ---------------------------------------------------------------------------------------------------- measuring


def measure_items(hashes: Mapping[str, str | None], root: Path, folder: Path) -> list[Item]:
    """Cut the measuring of clips that `folder` has no measures of into items."""
    known = _read_cache(folder / CACHE)
    new = {digest: clip for clip, digest in hashes.items() if digest is not None and digest not in known}
    groups = [list(new.items())[first : first + ITEM_CLIPS] for first in range(0, len(new), ITEM_CLIPS)]
    return [
        Item(
            id=f"{group[0][1]} .. {group[-1][1]}",
            key=digest([VERSION, [sha256 for sha256, _ in group]], length=64),
            input=[(digest, root / clip) for digest, clip in group],
            size=len(group),
        )
        for group in groups
    ]


def run_measures(items: Sequence[Item], folder: Path, num_workers: int, part: Part | None = None) -> list[Item]:
    """Measure; returns the items that other parts have to do."""
    return run_items(items, folder / ITEMS, _make_measure, num_workers, "voice: measuring", "clips", part)


def _make_measure() -> Callable[[Any], Members]:
    return lambda clips: {"outcomes.json": {digest: measure_clip(path) for digest, path in clips}}


def _measure_all(
    dialogues: Sequence[Dialogue], root: Path, folder: Path, num_workers: int, rejections: list[Rejection]
) -> dict[str, VoiceMeasures]:
    """Clip -> its measures; only clips that the cache does not know are decoded."""
    turns = [(f"{d.id}/utt{u.id}", u.clip) for d in dialogues for u in d.utterances]
    hashes = hash_clips(root, (clip for _, clip in turns), folder, num_workers)
    items = measure_items(hashes, root, folder)
    run_measures(items, folder, num_workers)
    outcomes = _read_cache(folder / CACHE)
    for item in items:
        outcomes |= read_result(item, folder / ITEMS)["outcomes.json"]
    wanted = dict.fromkeys(digest for digest in hashes.values() if digest is not None)
    lines = ({**outcomes[digest], "sha256": digest, "version": VERSION} for digest in wanted)
    write_text(folder / CACHE, "".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(folder / ITEMS, ignore_errors=True)
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
        return {"measures": asdict(measure(read_audio(path, SAMPLE_RATE), SAMPLE_RATE))}
    except MediaError as error:
        return {"reason": error.reason}


def _read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by hash; lines that are damaged, or of another version, count as not there."""
    if not path.is_file():
        return {}
    cache = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["version"] == VERSION and ("reason" in entry or VoiceMeasures(**entry["measures"])):
                cache[entry["sha256"]] = entry
    return cache


def syllables_of(texts: Sequence[str]) -> list[int]:
    """Syllables of each text, by eSpeak NG where it is installed, else by the letters."""
    if not _has_espeak():
        return [guess_syllables(text) for text in texts]
    from msenc.speech.libespeak import to_phonemes

    return [count_syllables(phonemes) for phonemes in to_phonemes(texts)]


def _has_espeak() -> bool:
    return find_spec("espeakng_loader") is not None
