"""Real recordings, prepared end to end: python benchmarks/real.py --whisper FOLDER.

All below `$MSENC_SHARED/data/real` is one data set, with the settings of `data=folder`: LibriVox (a novel, read),
GRID (talking faces; a file's name spells its sentence) and meetings (with RTTM files). Error rates of words are after
Whisper's normaliser; speakers are scored as in benchmarks/speakers.py.
"""

import argparse
import csv
import json
import os
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from measure import print_table, write_json
from speakers import beside_one_speaker, print_scores, read_rttm

from msenc.config.messages import CONFIGS
from msenc.config.schema import register_schemas
from msenc.evaluation.metrics.speech import score_words
from msenc.pipelines.prepare import prepare
from msenc.raw.media import read_audio
from msenc.raw.recordings import UTTERANCES
from msenc.raw.segment import SAMPLE_RATE, Stretch
from msenc.runs.overrides import quoted_value
from msenc.store.labels import VOICE_TURNS
from msenc.types import UNKNOWN, UNKNOWN_SPEAKER

DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRID_WORDS = (
    {"b": "bin", "l": "lay", "p": "place", "s": "set"},
    {"b": "blue", "g": "green", "r": "red", "w": "white"},
    {"a": "at", "b": "by", "i": "in", "w": "with"},
    {},
    {
        "z": "zero",
        **dict(zip("123456789", ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"], strict=True)),
    },
    {"a": "again", "n": "now", "p": "please", "s": "soon"},
)
GRID_WOMEN = ("brbk7n", "lrwp9a")  # by pitch and formants, measured apart from msenc; the others are men
MIN_ALONE = 0.7  # of a meeting's utterance, in which its speaker alone speaks, for the gender to be judged


def grid_sentence(name: str) -> str:
    """The sentence that a GRID file's name spells.

    Example:
        >>> grid_sentence("bbaf2n")
        'bin blue at f two now'
    """
    return " ".join(words.get(letter, letter) for words, letter in zip(GRID_WORDS, name, strict=True))


def prepare_all(root: Path, whisper: str, folder: Path) -> tuple[list[dict[str, str]], dict[str, dict[str, Any]]]:
    """The rows of ``utterances.csv``, and the lines of the described voices by dialogue and turn."""
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            "prepare",
            [
                "data=folder",
                "data.name=real",
                f"data.root={quoted_value(str(root))}",
                f"data.dir={quoted_value(str(folder / 'real'))}",
                f"data.recordings.recogniser.name_or_path={quoted_value(whisper)}",
                "data.recordings.split.fractions={train:1,val:0,test:0}",
                "modality=text_audio",
                "describe=true",
                "prepare_workers=0",
                f"paths.output_dir={quoted_value(str(folder))}",
            ],
        )
    prepare(config)
    with (folder / "real" / UTTERANCES).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = (folder / "real" / VOICE_TURNS).read_text(encoding="utf-8").splitlines()
    return rows, {line["id"]: line for line in map(json.loads, lines)}


def word_errors(rows: list[dict[str, str]], root: Path) -> dict[str, float]:
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        texts[row["clip"]].append(row["text"])
    said = {}
    for line in (root / "librivox" / "transcription").read_text(encoding="utf-8").splitlines():
        words, _, name = line.rpartition(" (")
        said[f"librivox/{name.rstrip(')')}.wav"] = words.replace("<s>", "").replace("</s>", "").strip()
    said |= {f"grid/{path.name}": grid_sentence(path.stem) for path in (root / "grid").glob("*.mpg")}
    found = {}
    for source in ("librivox", "grid"):
        clips = sorted(clip for clip in said if clip.startswith(source))
        found[f"{source}: word error rate"] = score_words(
            [" ".join(texts[clip]) for clip in clips], [said[clip] for clip in clips]
        ).corpus["speech/wer"]
        found[f"{source}: files"] = len(clips)
        found[f"{source}: files with words"] = sum(clip in texts for clip in clips)
    return found


def true_gender(row: dict[str, str], meetings: dict[str, list[Stretch]]) -> str | None:
    """Of who says it; None where that is not one person, or not known."""
    source, name = Path(row["clip"]).parts[0], Path(row["clip"]).stem
    if source != "meetings":
        return "woman" if name in GRID_WOMEN else "man"
    start_s, end_s = float(row["start"]), float(row["end"])
    shared: Counter[str] = Counter()
    for first_s, last_s, speaker in meetings[name]:
        shared[speaker] += max(min(end_s, last_s) - max(start_s, first_s), 0)
    (speaker, most_s), *others = shared.most_common()
    if most_s < MIN_ALONE * (end_s - start_s) or sum(s for _, s in others) > (1 - MIN_ALONE) * (end_s - start_s):
        return None
    return {"F": "woman", "M": "man"}[speaker[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(os.environ.get("MSENC_SHARED", "shared"))
    parser.add_argument("--whisper", required=True, help="folder or hub id of a Whisper")
    parser.add_argument("--root", type=Path, default=shared / "data/real", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, turns = prepare_all(options.root, options.whisper, Path(folder))
    meetings = {p.stem: read_rttm(p) for p in sorted((options.root / "meetings").glob("*.rttm"))}
    results: dict[str, Any] = word_errors(rows, options.root)
    counted: Counter[str] = Counter()
    genders: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        id = f"real/train/{row['dialogue']}/utt{counted[row['dialogue']]}"
        counted[row["dialogue"]] += 1
        line, source = turns[id], Path(row["clip"]).parts[0]
        results[f"{source}: utterances with a voice"] = results.get(f"{source}: utterances with a voice", 0) + (
            line["f0_hz"] is not None
        )
        if (true := true_gender(row, meetings)) is not None:
            found = line["measured"]["gender"]
            genders[source]["unknown" if found == UNKNOWN else "right" if found == true else "wrong"] += 1
    for source, counts in genders.items():
        results[f"{source}: gender right, unknown, wrong"] = tuple(counts[k] for k in ("right", "unknown", "wrong"))
    print_table(
        "Real recordings",
        ("", ""),
        [(k, f"{v:.3f}" if isinstance(v, float) else str(v)) for k, v in sorted(results.items())],
    )
    speakers = {}
    for name, truth in meetings.items():
        own = [row for row in rows if Path(row["clip"]) == Path("meetings", f"{name}.wav")]
        length_s = len(read_audio(options.root / "meetings" / f"{name}.wav", SAMPLE_RATE)) / SAMPLE_RATE
        stretches = [(float(r["start"]), float(r["end"]), r["speaker"]) for r in own if r["speaker"] != UNKNOWN_SPEAKER]
        speakers[name] = beside_one_speaker(stretches, truth, length_s)
    print_scores(speakers)
    write_json(options.json, {**results, "speakers": speakers})


if __name__ == "__main__":
    main()
