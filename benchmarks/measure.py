"""What every benchmark shares: interleaved repetitions, medians with their spread, ratios, the machine, the commit.

A benchmark is one command: ``python benchmarks/loading.py [--quick] [--repetitions N] [--json FILE]``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(width=None if Console().is_terminal else 120)


def parser(description: str | None, repetitions: int = 5) -> argparse.ArgumentParser:
    """The arguments of every benchmark: ``--json``, ``--quick``, ``--repetitions``."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    arguments.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures little")
    arguments.add_argument("--repetitions", type=int, default=repetitions, metavar="N", help="default: %(default)s")
    return arguments


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each variant once per round, in an order that turns by one each round.

    What slows the machine for a while then slows all variants alike.

    Args:
        variants: name -> what is timed; on a GPU it synchronises by itself.
        repetitions: rounds that count.
        warm_up: run each once before, uncounted (caches, lazy imports, memory that grows).
        clock: in seconds; ``time.process_time`` leaves out what others take of the machine, of one thread alone.

    Returns:
        name -> seconds of each round.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    if warm_up:
        for run in variants.values():
            run()
    for turn in range(repetitions):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            variants[name]()
            seconds[name].append(clock() - start)
    return seconds


def summarise(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Any]]:
    """Seconds per round -> median, fastest and slowest of each variant, and ratios.

    Args:
        seconds: what `interleave` returned.
        base: the variant that the others are compared with.

    Returns:
        ``{"ratios": {name: median / median of base}, "seconds": {name: {"median", "min", "max", "all"}}}``.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ratios": {name: median / medians[base] for name, median in medians.items() if name != base},
        "seconds": {
            name: {"median": medians[name], "min": min(values), "max": max(values), "all": list(values)}
            for name, values in seconds.items()
        },
    }


def machine(device: str = "cpu") -> str:
    """The machine in one line: processor, cores, threads, versions, and the GPU if `device` names one."""
    parts = [_processor(), f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"]
    if device.startswith("cuda"):
        import torch

        parts.insert(0, torch.cuda.get_device_name(device))
    parts.append(f"{platform.system()}, Python {platform.python_version()}, torch {version('torch')}")
    return "; ".join(parts)


def commit() -> str:
    """The checkout's commit, marked where files differ from it; ``unknown`` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], device: str = "cpu") -> None:
    """Print rows under their columns, then the machine and the commit.

    Args:
        title: what was measured, with its unit.
        columns: the first is the variant's name.
        rows: of each variant; floats are shown with three digits that count.
        device: see `machine`.
    """
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_shown(cell) for cell in row))
    console.print(table)
    console.print(f"{machine(device)}; commit {commit()}", soft_wrap=True, highlight=False)


def time_rows(results: Mapping[str, Mapping[str, Any]], base: str) -> list[list[Any]]:
    """`summarise`'s value -> rows of a table with the columns variant, median s, fastest, slowest, ratio to base."""
    return [
        [name, t["median"], t["min"], t["max"], "1" if name == base else results["ratios"][name]]
        for name, t in results["seconds"].items()
    ]


def write_json(path: Path | None, results: Mapping[str, Any], device: str = "cpu") -> None:
    """Write results with the machine and the commit; nothing if `path` is None."""
    if path is not None:
        text = json.dumps({**results, "machine": machine(device), "commit": commit()}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _shown(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
