"""Does mood reach the voice? The spoken replies of runs on the demo, measured against what the references ask for.

python evaluate.py run_dir=RUN speech=espeak     # first: speaks the replies of the test split
python benchmarks/mood.py RUN [RUN ...]          # then: measures their sound
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import parser, print_table, write_json

from msenc.evaluation.spoken import listen_to_replies
from msenc.prepare.describe import describe_dialogues
from msenc.raw.annotations import read_meld
from msenc.speech.attributes import Bin, VoiceSettings
from msenc.speech.description import parse
from msenc.types import MsencError


def bins_of_the_demo(root: Path, num_dialogues: int, num_workers: int) -> dict[str, Bin]:
    """Where one word ends and the next begins, as the describe stage finds it on the demo's own speech."""
    train = [d for d in read_meld(root, "demo").dialogues if d.split == "train"][:num_dialogues]
    with tempfile.TemporaryDirectory() as folder:
        return describe_dialogues(train, root, Path(folder), VoiceSettings(levels=2), num_workers, [])[1]


def spoken_evaluation(run: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The latest evaluation of the test split whose replies were spoken: its folder and its rows."""
    files = sorted(run.glob("evaluation/*-test-*/predictions.jsonl"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        if any(row.get("speech") for row in rows):
            return file.parent, rows
    raise MsencError(f"{run}: no spoken replies. First: python evaluate.py run_dir={run} speech=espeak")


def mood_of(run: Path, bins: Mapping[str, Bin], num_workers: int) -> dict[str, float]:
    """Shares of the replies whose sound has what the reference asks for, and what their own description says."""
    folder, rows = spoken_evaluation(run)
    found = listen_to_replies(rows, folder, bins, None, num_workers)
    asked = [parse(row["reference"]["description"]) for row in rows]
    heard = [row["spoken_attributes"] for row in rows]
    both = [(h.get("range"), h.get("gender")) == (a.range, a.gender) for h, a in zip(heard, asked, strict=True)]
    return {
        "range as asked": found["speech/range/as_reference"],
        "range as written": found["speech/range/as_written"],
        "range, majority": Counter(a.range for a in asked).most_common(1)[0][1] / len(rows),
        "gender as asked": found["speech/gender/as_reference"],
        "both as asked": sum(both) / len(rows),
    }


def main() -> None:
    arguments = parser(__doc__)
    data = Path(os.environ.get("MSENC_DATA", "data"))
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run on the demo")
    arguments.add_argument("--root", type=Path, default=data / "demo-raw", help="its raw clips; default: %(default)s")
    arguments.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    options = arguments.parse_args()
    bins = bins_of_the_demo(options.root, 20 if options.quick else 100, options.workers)
    results = {str(run): mood_of(run, bins, options.workers) for run in options.runs}
    names = list(next(iter(results.values())))
    print_table(
        "Spoken replies of the test split",
        ("run", *names),
        [(Path(run).name, *(f"{found[name]:.1%}" for name in names)) for run, found in results.items()],
    )
    write_json(options.json, {"runs": results, "range edges, semitones": bins["range"].edges})


if __name__ == "__main__":
    main()
