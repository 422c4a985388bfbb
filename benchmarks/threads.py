"""Seconds of a training step against the number of threads and how they wait, alone and beside busy processes.

    python benchmarks/threads.py [--quick] [--repetitions N] [--json FILE] [--sizes tiny,small,smollm2] [--beside 0,1]

A step is forward and backward of random weights on dialogues of MELD's lengths (``training_step.py``). How OpenMP's
threads wait for each other is fixed when torch is loaded, so every case runs in a process of its own: ``active`` is
OpenMP's own way, ``passive`` is OMP_WAIT_POLICY=PASSIVE. A busy process is an endless loop. On a machine that has other
work, the fastest rounds and their ratios are what counts.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from measure import parser, print_table, write_json
from meld import DIMS, meld_dialogues, random_tokens
from training_step import NO_BUDGET, SIZES, Size, make_model

from msenc.data.collate import collate, dialogue_rows

# The demo's sizes; a step between; a fifth of SmolLM2-135M's layers, with less vocabulary.
TRAINED = {
    "tiny": (Size(3, 96, 4, 1024, 2, 64, 4, 8), "float32"),
    "small": (SIZES["small"], "float32"),
    "smollm2": (Size(6, 576, 9, 8192, 2, 64, 4, 2), "bfloat16"),
}
SECONDS = 2.0
"""That the steps of a case may take, once it has warmed up; it does one in any case."""


def main() -> None:
    arguments = parser(__doc__, repetitions=3)
    arguments.add_argument("--sizes", default=",".join(TRAINED), help="default: %(default)s")
    arguments.add_argument("--beside", default="0,1", help="numbers of busy processes; default: %(default)s")
    arguments.add_argument("--case", help="measure one size in this process")
    given = arguments.parse_args()
    if given.case:
        print(json.dumps(steps(given.case, 0.1 if given.quick else SECONDS)))
        return
    cores = len(os.sched_getaffinity(0))
    ways = {"1 thread": (1, None), f"{cores} threads, active": (cores, None), f"{cores}, passive": (cores, "PASSIVE")}
    results, rows = {}, []
    for size in given.sizes.split(","):
        for number in map(int, given.beside.split(",")):
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            with busy_processes(number):
                for _ in range(given.repetitions):
                    for way, (threads, policy) in ways.items():
                        seconds[way].append(in_own_process(size, threads, policy, given.quick))
                        print(f"{size}, {way}, beside {number}: {seconds[way][-1]:.3g} s", file=sys.stderr)
            fastest = {way: min(values) for way, values in seconds.items()}
            base = fastest["1 thread"]
            rows += [
                [f"{size}, {way}", number, value, statistics.median(seconds[way]), value / base]
                for way, value in fastest.items()
            ]
            results[f"{size}, beside {number}"] = {
                "seconds": seconds,
                "ratios": {w: v / base for w, v in fastest.items()},
            }
    print_table(
        f"A training step: median of a process's steps, over {given.repetitions} processes each",
        ["case", "busy processes", "fastest s", "median s", "x 1 thread"],
        rows,
    )
    write_json(given.json, {"cases": results})


def steps(size_name: str, seconds: float) -> float:
    """The median seconds of a step."""
    size, dtype = TRAINED[size_name]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = make_model(size).to(getattr(torch, dtype)).train()
    rng = np.random.default_rng(0)
    drawn = [random_tokens(d, rng, size.vocab) for d in meld_dialogues(size.dialogues)]
    queries = dict.fromkeys(DIMS, size.queries)
    rows = [dialogue_rows(tokens, NO_BUDGET, queries) for tokens, _ in drawn]
    batch = collate([t for t, _ in drawn], [f for _, f in drawn], rows, queries, pack=True)
    taken: list[float] = []
    while len(taken) < 2 or sum(taken[1:]) < seconds:
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        model(batch).nll.sum().backward()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def in_own_process(size: str, threads: int, policy: str | None, quick: bool) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_NUM_THREADS": str(threads), **({"OMP_WAIT_POLICY": policy} if policy else {})}
    command = [sys.executable, __file__, "--case", size, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    processes: list[Any] = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
