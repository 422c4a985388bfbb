"""Hours of recordings that are prepared per hour, by encoder: python benchmarks/preparing.py [--quick] [--json FILE].

Two processes of one thread each, as ``prepare.py prepare_workers=2``, from 720p clips with audio to float16 features in
memory; encoders are built before. ``logmel`` and ``pixels`` need no weights; ``whisper`` is whisper-base of
``MSENC_MODELS``, on windows of 30 s (full) or on each clip's own length (short). The clips are of MELD's mean length,
3.1 s: longer ones fill Whisper's windows better.
"""

import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from features import PROCESSES, SECONDS, write_clip
from measure import interleave, parser, print_table, write_json

from msenc.models.encoders import LogMel, Pixels, WhisperEncoder
from msenc.prepare.features import extract
from msenc.types import Dialogue, Utterance

_encoders: dict[str, Any] = {}  # of a worker process


def main() -> None:
    arguments = parser(__doc__, repetitions=3).parse_args()
    variants: dict[str, Any] = {"logmel": LogMel, "pixels": Pixels}
    whisper = Path(os.environ.get("MSENC_MODELS", "")) / "whisper-base"
    if whisper.is_dir():
        for window in ("full", "short"):
            variants[f"whisper, {window}"] = partial(WhisperEncoder, str(whisper), window=window)
    else:
        print("Without whisper-base: MSENC_MODELS names no folder that has it.")
    with tempfile.TemporaryDirectory(prefix="msenc-preparing-") as name:
        clips = [write_clip(Path(name) / f"{i}.mp4", seed=i) for i in range(2 if arguments.quick else 8)]
        pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(PROCESSES)]

        def run(variant: str) -> None:
            tasks = [
                pool.submit(work, variant, variants[variant], Path(name), [clip.name for clip in clips[n::PROCESSES]])
                for n, pool in enumerate(pools)
            ]
            for task in tasks:
                task.result()

        seconds = interleave({variant: partial(run, variant) for variant in variants}, arguments.repetitions)
        for pool in pools:
            pool.shutdown()
    rates = {v: [len(clips) * SECONDS / s for s in times] for v, times in seconds.items()}
    medians = {variant: statistics.median(values) for variant, values in rates.items()}
    rows = [[v, medians[v], min(rates[v]), max(rates[v]), medians[v] / medians["logmel"]] for v in variants]
    columns = ("encoder", "hours per hour", "slowest", "fastest", "to logmel")
    print_table(f"{len(clips)} clips of {SECONDS} s by {PROCESSES} processes", columns, rows)
    write_json(arguments.json, {"hours_per_hour": rates})


def work(variant: str, make: Any, root: Path, clips: list[str]) -> None:
    torch.set_num_threads(1)
    if variant not in _encoders:
        _encoders[variant] = make()
    encoder = _encoders[variant]
    utterances = tuple(Utterance(str(i), "", "", clip=clip) for i, clip in enumerate(clips))
    found = extract([Dialogue("d", "train", utterances)], root, encoder, encoder.kind)
    assert not found["rejections.json"]


if __name__ == "__main__":
    sys.exit(main())
