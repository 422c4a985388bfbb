"""Who speaks when, in meetings whose truth is known: python benchmarks/speakers.py --kokoro FOLDER [--meetings FOLDER].

Meetings of one to six of Kokoro's voices in rooms of their own, at levels of their own, with noise, short answers,
pauses and speech at once; and every `NAME.wav` with a `NAME.rttm` in a folder. The diarisation error rate is that of
pyannote.metrics, without a collar and with overlapping speech; "one speaker" is the same speech, all of it by one.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from measure import print_table, write_json

from msenc.raw.media import read_audio
from msenc.raw.segment import (
    SAMPLE_RATE,
    SegmentSettings,
    Stretch,
    cut_utterances,
    load_speech_detector,
    quietest_moment,
)
from msenc.raw.speakers import Resemblyzer, SpeakerEncoder, find_speakers

VOICES = (
    *("af_bella", "af_heart", "af_nicole", "af_sarah", "af_kore", "am_adam", "am_fenrir", "am_michael", "am_puck"),
    *("am_onyx", "bf_alice", "bf_emma", "bm_daniel", "bm_george", "bm_fable", "bm_lewis", "hf_alpha", "pm_alex"),
    *("zf_xiaoyi", "im_nicola"),
)
SENTENCES = (
    "I did not expect to see you here today, but it is a lovely surprise.",
    "No, not really, because the button is on the other side of the remote control.",
    "So what we could do is to take the cheaper battery, and then spend the money on a better case.",
    "Mm, I think so.",
    "Okay.",
    "Let us move on to the next point, which is the budget for the second half of the year.",
)
SPEAKERS = (1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6)
MEETING_S = 50


def read_rttm(path: Path) -> list[Stretch]:
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return [(float(r[3]), float(r[3]) + float(r[4]), r[7]) for r in rows if r and r[0] == "SPEAKER"]


def score(found: Sequence[Stretch], true: Sequence[Stretch], length_s: float) -> dict[str, float]:
    """Diarisation error rate, and the share of the time with speech in which a right speaker is named."""
    from pyannote.core import Annotation, Segment, Timeline
    from pyannote.metrics.diarization import DiarizationErrorRate

    sides = []
    for stretches in (true, found):
        sides.append(Annotation())
        for number, (start_s, end_s, speaker) in enumerate(stretches):
            sides[-1][Segment(start_s, end_s), number] = speaker
    whole = Timeline([Segment(0, length_s)])
    rate = DiarizationErrorRate()
    parts = rate(*sides, uem=whole, detailed=True)
    speech_s = sides[0].get_timeline().support().duration()
    return {
        "error rate": parts["diarization error rate"],
        "right": parts["correct"] / speech_s,
        "confused": parts["confusion"] / parts["total"],
        "alone": 1 - DiarizationErrorRate(skip_overlap=True)(*sides, uem=whole),
    }


def beside_one_speaker(found: Sequence[Stretch], true: Sequence[Stretch], length_s: float) -> dict[str, float]:
    """`score`, and the same of one speaker in all of the speech; and the numbers of speakers."""
    one = score([(start_s, end_s, "0") for start_s, end_s, _ in found], true, length_s)
    return {
        **score(found, true, length_s),
        **{f"{name}, one speaker": value for name, value in one.items()},
        "speakers": len({s for *_, s in true}),
        "found": len({s for *_, s in found} - {"-1"}),
    }


def utterances_of(sound: np.ndarray, encode: SpeakerEncoder) -> list[Stretch]:
    """As `msenc.raw.recordings.SegmentWork` finds them, where there is no picture."""
    settings = SegmentSettings()
    speech = load_speech_detector()(sound, settings.speech_threshold)
    return cut_utterances(find_speakers(sound, speech, encode), [], settings, quietest_moment(sound))


def make_meeting(
    clips: Mapping[str, Sequence[np.ndarray]], num_speakers: int, seed: int
) -> tuple[np.ndarray, list[Stretch]]:
    """A sound of `MEETING_S` at 16 kHz, and who speaks when."""
    rng = np.random.default_rng(seed)
    names = list(rng.choice(sorted(clips), num_speakers, replace=False))
    shares = rng.dirichlet(np.full(num_speakers, 2.0)) + 0.1
    levels = {name: 0.05 * 10 ** (rng.uniform(-6, 6) / 20) for name in names}
    rooms = {name: _room(rng) for name in names}
    sound, truth = np.zeros((MEETING_S + 20) * SAMPLE_RATE), []
    time_s, name = float(rng.uniform(0, 0.5)), None
    while time_s < MEETING_S - 1:
        others = [k for k in range(num_speakers) if names[k] != name or num_speakers == 1]
        name = names[rng.choice(others, p=shares[others] / shares[others].sum())]
        for _ in range(rng.choice([1, 1, 2, 3])):
            dry = clips[name][rng.integers(len(clips[name]))]
            wet = np.convolve(dry / np.sqrt((dry**2).mean()) * levels[name], rooms[name])
            first = round(time_s * SAMPLE_RATE)
            wet = wet[: len(sound) - first]
            sound[first : first + len(wet)] += wet
            truth.append((time_s, min(time_s + len(dry) / SAMPLE_RATE, MEETING_S), name))
            time_s += len(dry) / SAMPLE_RATE + rng.choice([0.05, 0.15, 0.3, 0.7])
            if time_s >= MEETING_S - 1:
                break
        time_s = max(time_s + float(rng.choice([-0.5, -0.2, 0, 0.1, 0.3, 0.8])), 0)  # below 0: over the other's end
    sound = sound[: MEETING_S * SAMPLE_RATE]
    hiss = rng.normal(size=len(sound))
    sound += hiss * 0.05 * 10 ** (-rng.uniform(10, 35) / 20)
    return (sound / np.abs(sound).max() / 2).astype(np.float32), truth


def _room(rng: np.random.Generator) -> np.ndarray:
    length = round(rng.uniform(0.2, 0.5) * SAMPLE_RATE)  # in which its sound falls by 60 dB
    echoes = rng.normal(size=length) * 10 ** (-3 * np.arange(length) / length)
    echoes *= 0.25 / np.sqrt((echoes**2).sum())
    echoes[0] = 1
    return echoes


def speak(folder: Path, voices: Sequence[str], cache: Path | None) -> dict[str, list[np.ndarray]]:
    """Sentences of each voice, without the silence around them."""
    from voice_attributes import render

    from msenc.speech.synthesizers.libespeak import to_phonemes

    phonemes = to_phonemes(list(SENTENCES))
    clips: dict[str, list[np.ndarray]] = {}
    for voice in voices:
        file = cache / f"{voice}.npz" if cache else None
        if file and file.is_file():
            clips[voice] = list(np.load(file).values())
            continue
        sounds = [render(folder, ipa, voice) for ipa in phonemes]
        loud = [np.flatnonzero(np.abs(s) > 0.02 * np.abs(s).max()) for s in sounds]
        clips[voice] = [s[i[0] : i[-1] + 1] for s, i in zip(sounds, loud, strict=True)]
        if file:
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(file, *clips[voice])
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kokoro", type=Path, metavar="FOLDER", help="a local Kokoro model, for synthetic meetings")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where its sentences are kept")
    parser.add_argument("--meetings", type=Path, metavar="FOLDER", help="recordings with RTTM files")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic meetings")
    parser.add_argument("--quick", action="store_true", help="two meetings of two voices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    meetings: dict[str, tuple[np.ndarray, list[Stretch]]] = {}
    for path in sorted(options.meetings.glob("*.rttm")) if options.meetings else []:
        meetings[path.stem] = (read_audio(path.with_suffix(".wav"), SAMPLE_RATE), read_rttm(path))
    if options.kokoro:
        clips = speak(options.kokoro, VOICES[:9:4] if options.quick else VOICES, options.cache)
        for number, count in enumerate((1, 2) if options.quick else SPEAKERS):
            meetings[f"synthetic {number}, {count}"] = make_meeting(clips, count, options.seed + number)
    encode = Resemblyzer()
    results = {
        name: beside_one_speaker(utterances_of(sound, encode), truth, len(sound) / SAMPLE_RATE)
        for name, (sound, truth) in meetings.items()
    }
    print_scores(results)
    write_json(options.json, results)


def print_scores(results: Mapping[str, Mapping[str, float]]) -> None:
    made = [r for name, r in results.items() if name.startswith("synthetic")]
    mean = {"synthetic, mean": {k: float(np.mean([r[k] for r in made])) for k in made[0]}} if made else {}
    columns = ("error rate", "right", "alone")
    print_table(
        "Speakers (in brackets: one speaker in all of the same speech)",
        ("meeting", "speakers", "found", *columns),
        [
            (
                name,
                f"{r['speakers']:.3g}",
                f"{r['found']:.3g}",
                *(f"{r[column]:.1%} ({r[f'{column}, one speaker']:.1%})" for column in columns),
            )
            for name, r in {**results, **mean}.items()
        ],
    )


if __name__ == "__main__":
    main()
