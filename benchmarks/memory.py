"""Peak memory of a training step against the length of the dialogue, for both layouts.

    python benchmarks/memory.py [--quick] [--json FILE] [--size small] [--device cuda]

One dialogue of a given number of turns, all of its targets in one step, each case in a process of its own. What is
shown is the peak on top of the loaded model and the batch.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from measure import parser, print_table, write_json
from meld import DIMS, meld_dialogues, random_tokens
from training_step import NO_BUDGET, SIZES, make_model, to_device

from msenc.data.collate import collate, dialogue_rows
from msenc.types import Dialogue

LAYOUTS = ("dialogue", "sample")
TURNS = (4, 8, 16, 24, 33)


def main() -> None:
    arguments = parser(__doc__, repetitions=1)
    arguments.add_argument("--size", default="small", choices=SIZES)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--case", nargs=2, help="measure one layout and number of turns in this process")
    given = arguments.parse_args()
    if given.case:
        print(json.dumps(measure(given.case[0], int(given.case[1]), given)))
        return
    results: dict[str, dict[int, dict[str, float]]] = {layout: {} for layout in LAYOUTS}
    for turns in TURNS[:2] if given.quick else TURNS:
        for layout in LAYOUTS:
            results[layout][turns] = in_own_process(layout, turns, given)
    rows = []
    for turns, dialogue in results["dialogue"].items():
        sample = results["sample"][turns]
        assert abs(sample["loss"] / dialogue["loss"] - 1) < 1e-4, f"{turns} turns: the layouts' losses differ"
        ratio = sample["peak_mib"] / dialogue["peak_mib"]
        rows.append(
            [turns, int(dialogue["tokens"]), dialogue["peak_mib"], int(sample["tokens"]), sample["peak_mib"], ratio]
        )
    columns = ["turns", "tokens, dialogue", "MiB", "tokens, sample", "MiB", "x dialogue"]
    print_table(f"Peak memory of a step on one dialogue, {given.size} model", columns, rows, given.device)
    ratios = {str(row[0]): row[-1] for row in rows}
    write_json(given.json, {"ratios": ratios, "layouts": results}, given.device)


def in_own_process(layout: str, turns: int, given: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", layout, str(turns), "--size", given.size, "--device", given.device]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{layout}, {turns} turns: {found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def measure(layout: str, turns: int, given: Any) -> dict[str, float]:
    size = replace(SIZES[given.size], dialogues=1)
    device = torch.device(given.device)
    utterances = [u for d in meld_dialogues(20) for u in d.utterances][:turns]
    tokens, features = random_tokens(Dialogue("d", "train", tuple(utterances)), np.random.default_rng(0), size.vocab)
    queries = dict.fromkeys(DIMS, size.queries)
    rows = dialogue_rows(tokens, NO_BUDGET, queries, layout)
    batch = to_device(collate([tokens], [features], [rows], queries, pack=layout == "dialogue"), device)
    model = make_model(size).to(device).train()
    before = peak_mib(device)
    start = time.perf_counter()
    loss = model(batch).nll.sum()
    loss.backward()
    return {
        "tokens": batch.input_ids.numel(),
        "peak_mib": peak_mib(device) - before,
        "loss": loss.item(),
        "seconds": time.perf_counter() - start,
    }


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
