"""How well recordings become utterances, on the raw demo: python benchmarks/raw.py --whisper FOLDER.

Boundaries: F1 of starts and ends within 0.25 s, matched one to one. Words: error rate over whole dialogues, case,
punctuation and contractions aside. Speakers: true utterances whose most overlapping utterance has the right speaker,
after the best one-to-one naming of a dialogue's speakers.
"""

import argparse
import csv
import re
import tempfile
from pathlib import Path

import jiwer
import numpy as np
from hydra import compose, initialize_config_dir
from scipy.optimize import linear_sum_assignment

from msenc.config.messages import CONFIGS
from msenc.config.schema import register_schemas
from msenc.demo.raw_demo import TrueDialogue, read_truth
from msenc.pipelines.prepare import prepare
from msenc.raw.recordings import UTTERANCES
from msenc.runs.overrides import quoted_value

TOLERANCE_S = 0.25
_CONTRACTIONS = (
    (r"\bi'm\b", "i am"),
    (r"\bthey're\b", "they are"),
    (r"\b(that|it|here|what|how)'s\b", r"\1 is"),
)


def num_matched(found: np.ndarray, true: np.ndarray) -> int:
    """Times that lie within the tolerance of each other, one to one."""
    is_near = np.abs(found[:, None] - true) <= TOLERANCE_S
    return int(is_near[linear_sum_assignment(is_near, maximize=True)].sum())


def num_right(found: list[str], true: list[str]) -> int:
    """Labels that agree after the best one-to-one naming; ``-1`` is never right."""
    table = np.array(
        [
            [sum((f, t) == pair for pair in zip(found, true, strict=True)) for t in set(true)]
            for f in set(found) - {"-1"}
        ]
    ).reshape(-1, len(set(true)))
    return int(table[linear_sum_assignment(table, maximize=True)].sum())


def plain(text: str) -> str:
    text = text.lower()
    for pattern, full in _CONTRACTIONS:
        text = re.sub(pattern, full, text)
    return " ".join(re.sub(r"[^\w' ]", " ", text).split())


def nearest_speaker(rows: list[dict[str, str]], start_s: float, end_s: float) -> str:
    return max(rows, key=lambda r: min(float(r["end"]), end_s) - max(float(r["start"]), start_s))["speaker"]


def score(truth: list[TrueDialogue], rows: list[dict[str, str]]) -> dict[str, float]:
    matched = num_found = num_true = right = 0
    texts: tuple[list[str], list[str]] = [], []
    for number, dialogue in enumerate(truth):
        own = [row for row in rows if row["dialogue"] == f"dia{number}"]
        said = dialogue.utterances
        for key, times in (("start", [u.start_s for u in said]), ("end", [u.end_s for u in said])):
            matched += num_matched(np.array([float(row[key]) for row in own]), np.array(times))
        num_found, num_true = num_found + len(own), num_true + len(said)
        texts[0].append(plain(" ".join(u.text for u in said)))
        texts[1].append(plain(" ".join(row["text"] for row in own)))
        if own:
            right += num_right([nearest_speaker(own, u.start_s, u.end_s) for u in said], [u.speaker for u in said])
    return {
        "dialogues": len(truth),
        "of them with utterances": len({row["dialogue"] for row in rows}),
        "utterances": num_true,
        "found": num_found,
        "boundaries F1 at 0.25 s": matched / (num_found + num_true),
        "word error rate": jiwer.wer(*texts),
        "speakers right": right / num_true,
    }


def measure(whisper: str, folder: Path, num_videos: int, dialogues_per_video: int) -> dict[str, float]:
    """What `prepare.py data=raw_demo stage=speakers` makes of the raw demo, beside the truth."""
    root, out = folder / "raw", folder / "prepared"
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            "prepare",
            [
                "data=raw_demo",
                f"data.root={quoted_value(str(root))}",
                f"data.dir={quoted_value(str(out))}",
                f"data.generate.num_videos={num_videos}",
                f"data.generate.dialogues_per_video={dialogues_per_video}",
                f"data.recordings.recogniser.name_or_path={quoted_value(whisper)}",
                "data.recordings.split.fractions={train:0.5,val:0,test:0.5}",
                "stage=speakers",
                "prepare_workers=0",
                f"paths.output_dir={quoted_value(str(folder))}",
            ],
        )
    prepare(config)
    with (out / UTTERANCES).open(encoding="utf-8", newline="") as file:
        return score(read_truth(root), list(csv.DictReader(file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whisper", required=True, help="folder or hub id of a Whisper")
    parser.add_argument("--quick", action="store_true", help="two dialogues")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.whisper, Path(folder), *((1, 2) if arguments.quick else (4, 3)))
    for name, value in figures.items():
        print(f"{name:26} {value:.3f}" if isinstance(value, float) else f"{name:26} {value}")


if __name__ == "__main__":
    main()
