"""Have runs on a generated world found what can be known, and nothing else?

    python train.py -m experiment=known_answer world=beats,graded modality=text,text_audio,text_video,text_audio_video \
        seed=1,2,3
    python benchmarks/known_answer.py SWEEP [RUN ...]

Printed for each world, modality and kind of planted word: the share of its bits that was recovered (mean and standard
deviation over runs), what an ideal listener recovers of the same items (docs/worlds.md), and a verdict. A kind is
*own* where the modality has all streams that tell it: there, PASS takes 95 % of the ideal share or more. Everywhere,
it takes 5 points above the ideal share at most: more is a leak. Of the graded world also the share at each level of the
own stream; there, PASS is within 10 points of the ideal listener's.

The hidden truth is read from the raw material below --data, in the folder that the run's config names.
"""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import parser, print_table, write_json
from omegaconf import OmegaConf

from msenc.demo.frame import CSV_NAMES, World
from msenc.demo.ideal import Cue, expected_share, ideal_loss
from msenc.demo.script import read_cues
from msenc.demo.table import find_world
from msenc.evaluation.losses import read_predictions
from msenc.report.collect import Run, collect_runs
from msenc.types import MsencError

OWN_SHARE = 0.95
UNKNOWN_SHARE = 0.05
LEVEL_SHARE = 0.1
NEEDS = {"text": (), "audio": ("audio",), "video": ("video",), "both": ("audio", "video")}
"""Kind of planted word -> the streams that tell it, beside the text."""


@dataclass(frozen=True)
class Item:
    """One target's planted words of one kind.

    Args:
        kind: of the words.
        loss: of the model, in nats.
        ideal: of the ideal listener with the run's modality, in nats.
        bits: of the words.
        level: of the own stream in the turn that is asked about; infinite where bits are shown outright.
    """

    kind: str
    loss: float
    ideal: float
    bits: float
    level: float


@dataclass(frozen=True)
class Scored:
    """A run's items.

    Args:
        world: its name.
        modality: of the run.
        items: of the evaluated split.
    """

    world: str
    modality: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Cell:
    """What runs of one world and modality recovered of one kind, or of one kind at one level.

    Args:
        world: its name.
        modality: of the runs.
        kind: of the planted words.
        level: of the own stream; None: all.
        runs: how many.
        mean: share recovered, mean over runs.
        spread: its standard deviation over runs; None of a single run.
        ideal: share that the ideal listener recovers of the same items.
        expected: share that it recovers of endlessly many.
        passes: the verdict.
    """

    world: str
    modality: str
    kind: str
    level: float | None
    runs: int
    mean: float
    spread: float | None
    ideal: float
    expected: float
    passes: bool


def streams_of(modality: str) -> tuple[str, ...]:
    """The streams of a modality beside the text: ``text_audio`` -> ``audio``."""
    return tuple(part for part in modality.split("_") if part != "text")


def read_truth(world: World, root: Path, split: str) -> dict[tuple[str, int], tuple[Cue, Cue]]:
    """Cues of each turn of a split, by the dialogue's number and the turn's.

    Raises:
        MsencError: the world's raw material is not there.
    """
    path = root / CSV_NAMES[split]
    if not path.is_file():
        raise MsencError(
            f"{path}: missing; expected the hidden truth of {world.name}. Say where data lies (--data FOLDER), or make "
            "it again with prepare.py and the run's settings."
        )
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["Dialogue_ID"], int(row["Utterance_ID"])): read_cues(world, row) for row in csv.DictReader(file)}


def items_of(
    predictions: Iterable[dict[str, Any]],
    world: World,
    modality: str,
    truth: dict[tuple[str, int], tuple[Cue, Cue]],
) -> list[Item]:
    """The planted words of predictions, beside what an ideal listener would pay for them."""
    items = []
    for prediction in predictions:
        turn = prediction["dialogue"].rpartition("/dia")[2], prediction["turn"] - 1
        if turn not in truth:
            raise MsencError(f"{prediction['dialogue']}, turn {turn[1]}: not in the hidden truth. Is it of other data?")
        audio, video = truth[turn]
        for name, bits in prediction["bits"].items():
            kind = name.removeprefix("planted_")
            tokens = zip(prediction["nll"], prediction["kinds"], strict=True)
            loss = sum(nll for nll, token_kind in tokens if token_kind == name)
            ideal = ideal_loss(world.belief, kind, streams_of(modality), audio, video)
            level = {"audio": audio.level, "video": video.level}.get(kind, math.inf)
            items.append(Item(kind, loss, ideal, bits, level))
    return items


def judge(scored: Sequence[Scored]) -> list[Cell]:
    """Runs -> a cell per world, modality and kind, and one per level of a stream that has levels.

    Runs of the same world and modality may have seen other data of it: each is compared with its own items.
    """
    cells = []
    groups: dict[tuple[str, str], list[tuple[Item, ...]]] = defaultdict(list)
    for one in scored:
        groups[one.world, one.modality].append(one.items)
    for (name, modality), runs in groups.items():
        belief, streams = find_world(name).belief, streams_of(modality)
        for kind, needs in NEEDS.items():
            levels = belief.levels if kind in streams else ()
            for level in (None, *levels):
                chosen = [[i for i in items if i.kind == kind and level in (None, i.level)] for items in runs]
                chosen = [items for items in chosen if items]
                if not chosen:
                    continue
                found = [_share(items, "loss") for items in chosen]
                mean, ideal = statistics.mean(found), statistics.mean(_share(items, "ideal") for items in chosen)
                if level is not None:
                    passes = abs(mean - ideal) <= LEVEL_SHARE
                else:
                    is_own = set(needs) <= set(streams)
                    passes = mean <= ideal + UNKNOWN_SHARE and (mean >= OWN_SHARE * ideal or not is_own)
                spread = statistics.stdev(found) if len(found) > 1 else None
                expected = expected_share(belief, kind, streams, level)
                cells.append(Cell(name, modality, kind, level, len(found), mean, spread, ideal, expected, passes))
    return cells


def _share(items: Sequence[Item], loss: str) -> float:
    return 1 - sum(getattr(i, loss) for i in items) / (math.log(2) * sum(i.bits for i in items))


def score_run(run: Run, split: str, data_dir: Path | None, on_data: Path | None = None) -> Scored:
    """A run's planted words, from its newest plain evaluation of a split on the data that it was trained on.

    Args:
        run: finished.
        split: that was evaluated.
        data_dir: where the data lies now, if it has moved.
        on_data: other prepared data of the same world that was evaluated on; its raw material lies beside it.

    Raises:
        MsencError: the run has no such evaluation, is of no generated world, or its raw material is not there.
    """
    config = OmegaConf.load(run.folder / ".hydra" / "config.yaml")
    if data_dir is not None:
        config.paths.data_dir = str(data_dir)
    evaluations = [
        e
        for e in run.evaluations
        if e.split == split
        and e.control is None
        and e.data == run.facts.get("data")
        and ("on_data=" in e.settings) == (on_data is not None)
    ]
    if not evaluations:
        where = f" on_data={on_data}" if on_data else ""
        raise MsencError(
            f"{run.folder}: no evaluation of {split} on {on_data or 'its own data'}. First: python evaluate.py "
            f"run_dir={run.folder} split={split}{where}"
        )
    newest = max(evaluations, key=lambda e: e.written)
    generate = config.data.generate
    if generate is None:
        raise MsencError(f"{run.folder}: trained on {config.data.name}, which is no generated world.")
    world = find_world(generate.get("world", "demo"))
    root = Path(config.data.root) if on_data is None else on_data.with_name(f"{on_data.name}-raw")
    truth = read_truth(world, root, split)
    return Scored(
        world.name,
        config.modality,
        tuple(items_of(read_predictions(newest.folder), world, config.modality, truth)),
    )


def rows_of(cells: Iterable[Cell], with_level: bool) -> list[list[str]]:
    """Cells as rows of a table, shares in percent."""
    return [
        [
            c.world,
            c.modality,
            c.kind,
            *([f"{c.level:g}"] if with_level else []),
            str(c.runs),
            f"{100 * c.mean:.1f}" + ("" if c.spread is None else f" ± {100 * c.spread:.1f}"),
            f"{100 * c.ideal:.1f}",
            f"{100 * c.expected:.1f}",
            f"{100 * (c.mean - c.ideal):+.1f}",
            "PASS" if c.passes else "FAIL",
        ]
        for c in cells
        if with_level == (c.level is not None)
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("folders", nargs="+", type=Path, metavar="SWEEP", help="sweeps, runs, or folders above them")
    arguments.add_argument("--split", default="test", help="default: %(default)s")
    arguments.add_argument("--data", type=Path, metavar="FOLDER", help="where data lies now, if it has moved")
    arguments.add_argument(
        "--on-data", type=Path, metavar="FOLDER", help="judge evaluations with on_data=FOLDER, of the same world"
    )
    options = arguments.parse_args()
    runs = [run for folder in options.folders for run in collect_runs(folder)]
    finished = [run for run in runs if run.status == "finished"]
    if not finished:
        raise MsencError(f"No finished run among {len(runs)} in {', '.join(map(str, options.folders))}.")
    cells = judge([score_run(run, options.split, options.data, options.on_data) for run in finished])
    columns = ["runs", "recovered %", "ideal %", "ideal % of all", "difference", ""]
    print_table("Planted bits", ("world", "modality", "kind", *columns), rows_of(cells, with_level=False))
    if by_level := rows_of(cells, with_level=True):
        print_table("Planted bits by level", ("world", "modality", "kind", "level", *columns), by_level)
    write_json(options.json, {"cells": [vars(cell) for cell in cells]})


if __name__ == "__main__":
    main()
