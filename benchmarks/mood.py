"""Does mood reach the voice? The spoken replies of runs on the demo, measured against what the references ask for.

python evaluate.py run_dir=RUN speech=espeak     # first: speaks the replies of the test split
python benchmarks/mood.py RUN [RUN ...]          # then: measures their sound
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measure import parser, print_table, write_json
from rich.progress import track

from msenc.data.annotations import read_meld
from msenc.prepare.describe import (
    Bin,
    VoiceSettings,
    attributes_of,
    describe_dialogues,
    estimate_gender,
    measured_values,
)
from msenc.speech.description import parse
from msenc.speech.voice import VoiceMeasures, measure
from msenc.speech.wav import from_wav
from msenc.types import UNKNOWN, MsencError, VoiceAttributes


def bins_of_the_demo(root: Path, num_dialogues: int, num_workers: int) -> dict[str, Bin]:
    """Where one word ends and the next begins, as the describe stage finds it on the demo's own speech."""
    train = [d for d in read_meld(root, "demo").dialogues if d.split == "train"][:num_dialogues]
    with tempfile.TemporaryDirectory() as folder:
        return describe_dialogues(train, root, Path(folder), VoiceSettings(levels=2), num_workers, [])[1]


def spoken_predictions(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folder and the rows of the latest evaluation of the test split whose replies were spoken."""
    files = sorted(run.glob("evaluation/*-test-*/predictions.jsonl"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if any(row.get("speech") for row in rows):
            return [(file.parent, row) for row in rows]
    raise MsencError(f"{run}: no spoken replies. First: python evaluate.py run_dir={run} speech=espeak")


def listen(file: Path) -> VoiceMeasures:
    return measure(*from_wav(file.read_bytes()))


def heard_attributes(measures: VoiceMeasures, bins: Mapping[str, Bin]) -> VoiceAttributes:
    gender = estimate_gender([measures.f0_hz]) if measures.f0_hz else UNKNOWN
    return attributes_of(measured_values(measures, 0), gender, bins)


def mood_of(run: Path, bins: Mapping[str, Bin], num_workers: int) -> dict[str, float]:
    """Shares of the replies whose sound, and whose description, has what the reference asks for."""
    rows = spoken_predictions(run)
    asked = [parse(row["reference"]["description"]) for _, row in rows]
    written = [parse(row["reply"]["description"] or "") for _, row in rows]
    files = sorted({folder / row["speech"] for folder, row in rows if row["speech"]})
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
        heard_by_file = dict(zip(files, track(pool.map(listen, files), run.name, len(files)), strict=True))
    silence = VoiceMeasures()
    heard = [
        heard_attributes(heard_by_file[folder / row["speech"]] if row["speech"] else silence, bins)
        for folder, row in rows
    ]
    ranges = Counter(voice.range for voice in asked)
    return {
        "replies": len(rows),
        "range: heard as asked": share(heard, asked, "range"),
        "range: written as asked": share(written, asked, "range"),
        "range: heard as written": share(heard, written, "range"),
        "range: majority": ranges.most_common(1)[0][1] / len(rows),
        "gender: heard as asked": share(heard, asked, "gender"),
        "both: heard as asked": sum(
            (h.range, h.gender) == (a.range, a.gender) for h, a in zip(heard, asked, strict=True)
        )
        / len(rows),
    }


def share(voices: list[VoiceAttributes], wanted: list[VoiceAttributes], name: str) -> float:
    """Share that has the wanted word of an attribute.

    Example:
        >>> share([parse("a man speaks")], [parse("a man speaks fast")], "gender")
        1.0
    """
    return sum(getattr(v, name) == getattr(w, name) for v, w in zip(voices, wanted, strict=True)) / len(voices)


def main() -> None:
    arguments = parser(__doc__)
    data = Path(os.environ.get("MSENC_DATA", "data"))
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run on the demo")
    arguments.add_argument("--root", type=Path, default=data / "demo-raw", help="its raw clips; default: %(default)s")
    arguments.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    options = arguments.parse_args()
    bins = bins_of_the_demo(options.root, 20 if options.quick else 100, options.workers)
    results = {str(run): mood_of(run, bins, options.workers) for run in options.runs}
    names = list(next(iter(results.values())))[1:]
    print_table(
        "Replies of the test split, spoken",
        ("run", "replies", *names),
        [(Path(run).name, v["replies"], *(f"{v[name]:.1%}" for name in names)) for run, v in results.items()],
    )
    write_json(options.json, {"runs": results, "range edges, semitones": bins["range"].edges})


if __name__ == "__main__":
    main()
