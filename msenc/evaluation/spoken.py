"""The replies of a split -> their audio, one WAV per distinct reply, and measurements of it.

A file's name is a hash of everything that determines its audio, so existing files are reused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from msenc.config.build import build, with_first_targets
from msenc.data.batches import share
from msenc.evaluation.metrics.sound import PredictedMos, speaker_similarity
from msenc.evaluation.metrics.speech import heard_voice, score_voices, score_words
from msenc.files import digest, inside
from msenc.models.recognition import Recogniser
from msenc.raw.speakers import Resemblyzer
from msenc.speech.attributes import Bin, syllables_of
from msenc.speech.description import parse
from msenc.speech.synthesis import Synthesizer, settle_gender
from msenc.speech.voice import VoiceMeasures, measure
from msenc.speech.wav import from_wav, write_wav
from msenc.types import UNKNOWN, VoiceAttributes, needing
from msenc.work.group import ALONE, Group
from msenc.work.pool import map_in_order
from msenc.work.progress import progress_bar

T = TypeVar("T")
R = TypeVar("R")


class _Line(NamedTuple):
    """One reply to synthesize."""

    file: Path
    text: str
    voice: VoiceAttributes
    speaker: str


def speak_replies(
    predictions: Sequence[dict[str, Any]],
    synthesizer: Mapping[str, Any],
    folder: Path,
    num_workers: int,
    group: Group = ALONE,
) -> int:
    """Synthesize the reply of every prediction, and store its file there (``speech``; None if a reply has no words).

    Args:
        predictions: of an evaluation, with replies.
        synthesizer: ``_target_`` node, built in every process.
        folder: of the evaluation; the audio goes to ``speech/`` in it.
        num_workers: processes that this one starts; 0 works in this one. The audio does not depend on it.
        group: processes that share the files out; all see the folder.

    Returns:
        The number of new files.

    Raises:
        MsencError: synthesis failed, a worker died, or the disk is full. Finished files are kept.
    """
    voices = settle_gender(
        {
            index: (f"{p['dialogue']}/{p['speaker']}", parse(p["reply"]["description"] or ""))
            for index, p in enumerate(predictions)
        }
    )
    lines, by = [], with_first_targets(synthesizer)
    for index, prediction in enumerate(predictions):
        text, voice, speaker = prediction["reply"]["text"], voices[index], prediction["speaker"]
        prediction["speech"] = None
        if any(character.isalnum() for character in text):
            key = digest({"by": by, "text": text, "voice": asdict(voice), "speaker": speaker})
            prediction["speech"] = f"speech/{key}.wav"
            lines.append(_Line(folder / prediction["speech"], text, voice, speaker))
    new = group.told(lambda: [line for line in {line.file: line for line in lines}.values() if not line.file.is_file()])
    if new:
        inside(folder, "speech").mkdir(parents=True, exist_ok=True)
        make = partial(_Speaker, build({**synthesizer, "_partial_": True}, "speech"))
        _map(make, new, [len(line.text) for line in new], num_workers, "speaking", group)
    return len(new)


def listen_to_replies(
    predictions: Sequence[dict[str, Any]],
    folder: Path,
    bins: Mapping[str, Bin] | None,
    recogniser: str | None,
    num_workers: int,
    sound_metrics: Sequence[str] = (),
    device: str = "cpu",
    group: Group = ALONE,
) -> dict[str, Any]:
    """Measure the files of `speak_replies`, and store the results in the predictions.

    Args:
        predictions: with replies and their ``speech``; each gets ``spoken_attributes``, and its word and character
            error rate among its ``scores``.
        folder: of the evaluation.
        bins: thresholds of the voice attributes, see `prepare.describe.read_bins`; None skips the voices.
        recogniser: a Whisper model by hub id or folder; None skips the words.
        num_workers: processes that measure voices, started by this one; 0 works in this one.
        sound_metrics: of `metrics.sound.SOUND_METRICS`.
        device: where the recogniser and the models of the sound metrics compute.
        group: processes that share the files out; all see the folder.

    Returns:
        ``speech/spoken`` (replies with audio), ``speech/wer``, ``speech/cer``, per attribute the share that is measured
        ``as_written`` in the reply's description, and as in the reference's (``as_reference``), and the sound metrics.
    """
    texts = [p["reply"]["text"] for p in predictions]
    files = sorted({folder / p["speech"] for p in predictions if p["speech"]})
    found: dict[str, Any] = {"speech/spoken": sum(p["speech"] is not None for p in predictions)}
    if recogniser is not None:
        listen = Recogniser(recogniser, device=device)
        words = _hear_all(files, listen.text, listen.sample_rate, "words", group)
        scores = score_words([words[folder / p["speech"]] if p["speech"] else "" for p in predictions], texts)
        found |= scores.corpus
        for name, values in scores.items.items():
            _note_scores(predictions, name, values)
    if "mos" in sound_metrics:
        predict = PredictedMos(device)
        quality = _hear_all(files, predict, predict.sample_rate, "MOS", group)
        for name in ("overall", "sig", "bak"):
            scores = [quality[folder / p["speech"]][name] if p["speech"] else math.nan for p in predictions]
            found[f"speech/mos/{name}"] = float(np.nanmean(scores)) if files else math.nan
            _note_scores(predictions, f"speech/mos/{name}", scores)
    if "speaker_similarity" in sound_metrics:
        embed = Resemblyzer(device)
        voices = _hear_all(files, embed, embed.sample_rate, "speakers", group)
        # a file that occurs twice would be compared with itself
        once = {(p["dialogue"], p["speech"]): p for p in predictions if p["speech"]}.values()
        found |= speaker_similarity(
            [voices[folder / p["speech"]] for p in once], [p["dialogue"] for p in once], [p["speaker"] for p in once]
        )
    if bins is not None:
        measures = _map(_make_measurer, files, _sizes(files), num_workers, "voices", group)
        heard = [
            heard_voice(measures[folder / p["speech"]] if p["speech"] else VoiceMeasures(), num_syllables, bins)
            for p, num_syllables in zip(predictions, syllables_of(texts), strict=True)
        ]
        for prediction, voice in zip(predictions, heard, strict=True):
            prediction["spoken_attributes"] = {k: v for k, v in asdict(voice).items() if v != UNKNOWN}
        for side, name in {"reply": "as_written", "reference": "as_reference"}.items():
            asked = [parse(p[side]["description"] or "") for p in predictions]
            found |= score_voices(heard, asked, name)
    return found


def check_sound_metrics(names: Sequence[str]) -> None:
    """Refuse metrics whose packages are missing, before anything is synthesized.

    Raises:
        MsencError: names what is missing.
    """
    if "mos" in names:
        PredictedMos()
    if "speaker_similarity" in names:
        Resemblyzer()


def _note_scores(predictions: Sequence[dict[str, Any]], name: str, values: Sequence[float]) -> None:
    for prediction, value in zip(predictions, values, strict=True):
        if not math.isnan(value):
            prediction.setdefault("scores", {})[name] = value


def _hear_all(
    files: Sequence[Path], hear: Callable[[np.ndarray], R], sample_rate: int, doing: str, group: Group
) -> dict[Path, R]:
    with needing("measuring spoken replies", "demo"):
        import soxr

    def hear_file(file: Path) -> R:
        samples, own_rate = from_wav(file.read_bytes())
        return hear(soxr.resample(samples, own_rate, sample_rate))

    return _map(lambda: hear_file, files, _sizes(files), 0, doing, group)


def _sizes(files: Sequence[Path]) -> list[int]:
    return [file.stat().st_size for file in files]


def _read_measure(file: Path) -> VoiceMeasures:
    return measure(*from_wav(file.read_bytes()))


def _make_measurer() -> Callable[[Path], VoiceMeasures]:
    return _read_measure


class _Speaker:
    """Writes the audio of a line.

    Args:
        make: builds the synthesizer.
    """

    def __init__(self, make: Callable[[], Synthesizer]) -> None:
        self.speak = make()

    def __call__(self, line: _Line) -> None:
        write_wav(line.file, *self.speak(line.text, line.voice, line.speaker))


def _map(
    make_work: Callable[[], Callable[[T], R]],
    values: Sequence[T],
    sizes: Sequence[int],
    num_workers: int,
    doing: str,
    group: Group,
) -> dict[T, R]:
    """Value -> result, shared out by size, with a progress bar; each process builds its worker once."""
    advice = "Set fewer (speech_workers=1). Finished files are kept."
    own = [values[i] for i in share(range(len(values)), sizes, group.rank, group.size)]
    results = zip(own, map_in_order(make_work, own, num_workers, doing, advice), strict=True)
    return dict(group.gather(results, len(values), progress_bar("replies"), doing))
