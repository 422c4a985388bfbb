"""A sweep whose replies are spoken, and listeners to it that answer as they are told."""

import csv
import json

import numpy as np
from omegaconf import OmegaConf
from sweeps import write_run

from msenc.pipelines.report import report
from msenc.report.listening.answers import COLUMNS, row_check
from msenc.report.listening.study import BACKWARD, QUESTIONS, read_studies
from msenc.speech.wav import write_wav
from msenc.store.shards import write_stream
from msenc.types import Dialogue, Utterance

HOSTILE = "</script><script>alert(1)</script>"


def write_spoken_sweep(place, names=("text", "text_audio"), dialogues=12, seconds=0.03, clip=None):
    """A run of each modality, with a sound of its own for every reply, and the dialogues that they reply to.

    Args:
        place: where the sweep's folder, the data and the raw clips go.
        names: of the modalities.
        dialogues: how many, of 2 targets each.
        seconds: length of a sound.
        clip: writes the clip of every turn to the path that it is given; None: no turn has one.
    """
    (raw := place / "raw").mkdir(parents=True)
    turns = [Utterance(str(u), f"Ana {HOSTILE}", f"words {u} {HOSTILE}", "softly", clip="a.mp4") for u in range(3)]
    if clip is not None:
        clip(raw / "a.mp4")
    samples = [
        (d.id, d.split, {"turns.json": d.to_json()})
        for d in (Dialogue(f"demo/test/dia{n}", "test", tuple(turns)) for n in range(dialogues))
    ]
    write_stream(place / "data" / "turns", samples, {})
    config = OmegaConf.create({"data": {"dir": str(place / "data"), "root": str(raw)}})
    for number, name in enumerate(names):
        run = write_run(place / "sweep" / f"{number}1", [f"modality={name}"], 1, number / 2, dialogues=dialogues)
        (run / ".hydra").mkdir()
        OmegaConf.save(config, run / ".hydra" / "config.yaml")
        speak(run / "evaluation" / "demo-test-ab12", number, seconds)
    return place / "sweep"


def speak(evaluation, number, seconds=0.03):
    """Give every reply of an evaluation a sound of its own."""
    lines = (evaluation / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for place, row in enumerate(rows):
        row["speech"] = f"speech/{number}-{place}.wav"
        noise = np.random.default_rng([number, place]).uniform(-0.2, 0.2, int(8000 * seconds))
        write_wav(evaluation / row["speech"], noise.astype(np.float32), 8000)
    (evaluation / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(sweep, **options):
    """`report.py` with these options."""
    report(OmegaConf.create({"sweep_dir": str(sweep), **options}))


def make_page(sweep, **options):
    """The folder of a page, and its key."""
    before = set(read_studies(sweep / "report" / "listening"))
    call(sweep, **{"listen": True, **options})
    after = read_studies(sweep / "report" / "listening")
    (name,) = set(after) - before
    return sweep / "report" / "listening" / name / "page", after[name]


def prefer(study, treated, chance, rng):
    """Answers of an attentive listener that prefers `treated`, trial by trial, with some chance.

    Args:
        study: the key.
        treated: a configuration.
        chance: of preferring it; a number, or a function of the dialogue.
        rng: draws.

    Returns:
        (item, question) -> the sound that is preferred.
    """
    chosen = {}
    for trial in study["trials"]:
        by = {sound["of"]: sound["id"] for sound in trial["sounds"]}
        for question in QUESTIONS:
            if trial["is_check"]:
                (right,) = [sound for of, sound in by.items() if of != BACKWARD]
            else:
                p = chance(trial["dialogue"]) if callable(chance) else chance
                (other,) = [sound for of, sound in by.items() if of != treated]
                right = by[treated] if rng.random() < p else other
            chosen[trial["id"], question] = right
    return chosen


def rows_of(study, listener, chosen, rng):
    """The rows that the page would write of these answers; which side a sound is on is drawn."""
    rows = []
    for place, n in enumerate(rng.permutation(len(study["trials"])), start=1):
        trial = study["trials"][n]
        sounds = [sound["id"] for sound in trial["sounds"]]
        first, second = rng.permutation(sounds) if len(sounds) == 2 else (*sounds, "")
        for question in QUESTIONS:
            given = chosen[trial["id"], question]
            answer = {first: "A", second: "B"}.get(given, given)
            row = [study["page"], listener, str(place), trial["id"], question, first, second, answer, "7.5"]
            rows.append([*row, row_check(row)])
    return rows


def write_answers(folder, study, listener, chosen, rng):
    """One listener's file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{listener}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows_of(study, listener, chosen, rng)])
    return path
