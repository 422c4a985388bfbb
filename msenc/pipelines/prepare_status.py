"""prepare.py status=true: what is done of a folder, stage by stage and part by part, and the command for the rest."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.table import Table

from msenc.prepare.dataset import parts_begun
from msenc.runs.overrides import key_of, task_overrides
from msenc.store.location import local_folder
from msenc.store.manifest import DatasetManifest
from msenc.types import Dialogue, MsencError
from msenc.work.console import console
from msenc.work.items import Item, Part, surveying


def show_status(config: Mapping[str, Any], survey: Callable[[], bool]) -> None:
    """Print what is done and missing; the process ends with status 1 unless the folder is complete.

    Args:
        config: of ``prepare.py``.
        survey: goes through the stages; returns whether it came to the end of them.
    """
    folder = local_folder(config["data"]["dir"], "data.dir")
    begun = parts_begun(folder)
    given = Part.parse(config["part"]) if config["part"] else None
    of = given.of if given else max((part.of for part in begun), default=1)
    parts = [Part(number, of) for number in range(1, of + 1)]
    with surveying() as stages:
        reaches_end = survey()
    missing = [{item.key for item in stage.missing} for stage in stages]
    table = Table(title=f"{config['data']['name']}: done / all")
    table.add_column("part")
    for stage in stages:
        table.add_column(stage.description, justify="right")
    table.add_column("hours known", justify="right")
    table.add_column("state")
    left = []
    for part in parts:
        shares = [part.select(stage.items) for stage in stages]
        open_items = [[item for item in own if item.key in keys] for own, keys in zip(shares, missing, strict=True)]
        is_open = any(open_items)
        if is_open:
            left.append(part)
        table.add_row(
            str(part),
            *(f"{len(own) - len(some):,} / {len(own):,}" for own, some in zip(shares, open_items, strict=True)),
            _hours_done(shares[-1], open_items[-1]) if shares else "",
            _state(is_open, begun.get(part)),
        )
    if stages:
        console.print(table)
    is_whole = reaches_end and not any(stage.missing for stage in stages) and _has_streams(folder, config)
    if is_whole:
        console.print(f"Complete: {folder}", soft_wrap=True)
        return
    waiting = [str(part) for part in left if not begun.get(part)]
    if left and not waiting:
        console.print("All parts that are left are being prepared.")
    elif left and of > 1:
        console.print(f"For the rest: {_command(['-m', 'part=' + ','.join(waiting)])}", soft_wrap=True)
    else:
        console.print(
            f"{'Nothing is left but to put the shards together' if not left and reaches_end else 'For the rest'}: "
            f"{_command([])}",
            soft_wrap=True,
        )
    sys.exit(1)


def say_stopped(folder: Path, own: Part, remaining: Sequence[str]) -> None:
    """Name the parts that ended before they were done, and that no process is at."""
    open_parts = {text for line in remaining for text in line.rpartition("of the parts ")[2].split(", ")}
    stopped = [str(p) for p, runs in parts_begun(folder).items() if not runs and p != own and str(p) in open_parts]
    if stopped:
        console.print(
            f"Killed or stopped before it was done: part {', '.join(sorted(stopped))}. "
            f"{_command(['-m', 'part=' + ','.join(sorted(stopped))])} goes on with it.",
            style="yellow",
            soft_wrap=True,
        )


def _state(is_open: bool, runs: bool | None) -> str:
    if not is_open:
        return "done"
    return "not begun" if runs is None else "running" if runs else "killed or stopped"


def _command(added: Sequence[str]) -> str:
    overrides = task_overrides(HydraConfig.get()) if HydraConfig.initialized() else []
    kept = [override for override in overrides if key_of(override) not in ("status", "part")]
    return shlex.join(["python", "prepare.py", *kept, *added])


def _has_streams(folder: Path, config: Mapping[str, Any]) -> bool:
    try:
        manifest = DatasetManifest.read(folder)
    except MsencError:
        return False
    wanted = {f"{kind}-{stream['name']}" for kind, stream in config["model"]["streams"].items()}
    return wanted <= manifest.streams.keys()


def _hours_done(items: Sequence[Item], missing: Sequence[Item]) -> str:
    hours = [sum(map(_seconds, some)) / 3600 for some in (items, missing)]
    return f"{hours[0] - hours[1]:.2f} / {hours[0]:.2f}"


def _seconds(item: Item) -> float:
    """How long the clips of an item are, as far as the annotations say."""
    spans = item.input if isinstance(item.input, tuple | list) else ()
    found = 0.0
    for value in spans:
        for span in value.utterances if isinstance(value, Dialogue) else (value,):
            start, end = getattr(span, "start_s", None), getattr(span, "end_s", None)
            found += end - start if start is not None and end is not None and end > start else 0.0
    return found
