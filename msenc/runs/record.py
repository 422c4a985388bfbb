"""A run's folder: what is written there, and how it is read.

- ``run.json``: code, settings, data, and how the run ended
- ``metrics.json``: validation metrics at the end of training
- ``.hydra/``: the config and the overrides that it was composed from
- ``checkpoints/``: best.ckpt, last.ckpt and previous.ckpt: the trained parameters
- ``export/``: the trained parameters, for use elsewhere
- ``evaluation/``: one folder per data set, split and settings
"""

import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from msenc.config.stored import read_config
from msenc.files import check_no_way_out, inside, read_json, write_json
from msenc.files.kinds import Count, Must, Name
from msenc.types import MsencError
from msenc.work.processes import is_first_process

SCHEMA_VERSION = 1
PACKAGES = ("msenc", "torch", "lightning", "transformers", "peft", "hydra-core")


class _Alignment(TypedDict):
    hash: str
    used: bool


class _Tracked(TypedDict):
    """By what a run is known to the services that track it (`msenc.tracking`)."""

    id: Annotated[str, Must(lambda text: re.fullmatch(r"[0-9a-z]{1,40}", text) is not None, "an id")]
    name: str
    group: str | None


class Facts(TypedDict):
    """Fields of ``run.json`` that are read; a run that was stopped early has few of them."""

    status: str
    error: NotRequired[str | None]
    identity: NotRequired[str]
    modality: NotRequired[str]
    seed: NotRequired[Count]
    overrides: NotRequired[list[str]]
    prepare_command: NotRequired[str]
    data: NotRequired[str]
    machine: NotRequired[str]
    commit: NotRequired[str | None]
    resumed: NotRequired[Count]
    seconds: NotRequired[float]
    peak_memory_mib: NotRequired[float]
    peak_gpu_memory_mib: NotRequired[float]
    threads: NotRequired[Count]
    processes: NotRequired[Count]
    steps: NotRequired[Count]
    epochs: NotRequired[Count]
    best_loss: NotRequired[float | None]
    stop_reason: NotRequired[str]
    task_hash: NotRequired[str | None]
    turns_hash: NotRequired[str | None]
    streams: NotRequired[dict[Name, str] | None]
    alignments: NotRequired[dict[Name, _Alignment] | None]
    trainable_parameters: NotRequired[dict[str, Count]]
    loss_weights: NotRequired[dict[str, float] | None]
    drop: NotRequired[dict[str, float] | None]
    metrics: NotRequired[dict[str, float | None]]
    speakers: NotRequired[list[str]]
    warnings: NotRequired[list[str] | None]
    tracked: NotRequired[_Tracked]


def read_facts(path: Path) -> dict[str, Any]:
    """Read a ``run.json``.

    Raises:
        MsencError: it is missing, damaged, or has other content; names the place in it.
    """
    return read_json(path, Facts, "Run that job again, or move its folder away.")


class RunRecord:
    """``run.json``, kept up to date: written when the run starts, and whenever something new is known.

    It locks the run's folder for this process until `close`; the lock is released when the process ends, however it
    ends. With several processes, the first one keeps the record.

    Args:
        folder: the run's folder, which is created.
        **facts: what is known at the start.

    Raises:
        MsencError: the folder already has a run, or another process is using it.
    """

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        if is_first_process() and (self.folder / "run.json").is_file():
            self.close()
            raise MsencError(
                f"{self.folder}: already has a run. Resume it (python train.py resume={self.folder}), or choose "
                "another folder."
            )
        self._begin(0.0, 0)
        self.facts = {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "commit": _commit(),
            "versions": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "machine": machine(),
            "resumed": 0,
            **facts,
        }
        self.add()

    @classmethod
    def reopen(cls, folder: Path, wait: bool = False) -> "RunRecord":
        """Open an earlier run's record to resume the run.

        Args:
            folder: of the run.
            wait: for another process that works in the folder, until it ends.

        Raises:
            MsencError: another process is using the folder, a link in it leads elsewhere, or the record cannot be read.
        """
        record = cls.__new__(cls)
        record.folder = Path(folder)
        check_no_way_out(record.folder)
        record._hold(wait)
        record._continue()
        return record

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.release()

    def add(self, **facts: Any) -> None:
        """Record facts, with the total seconds of all starts and the peak memory so far."""
        self.facts.update(facts)
        self.facts["seconds"] = round(self._seconds_before + time.monotonic() - self._start, 2)
        memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        self.facts["peak_memory_mib"] = max(self._memory_before, memory)
        if (gpu := gpu_memory()) is not None:
            self.facts["peak_gpu_memory_mib"] = max(self.facts.get("peak_gpu_memory_mib", 0), gpu)
        if is_first_process():
            write_json(self.folder / "run.json", self.facts)

    def _hold(self, wait: bool = False) -> None:
        self._lock = None
        if is_first_process():
            lock = FileLock(inside(self.folder, ".lock"), timeout=0)
            try:
                lock.acquire()
            except Timeout as e:
                if wait:
                    from msenc.work.console import console, shown  # not for --help, which needs no rich

                    console.print(f"Another process is using {shown(self.folder)}: waiting for it.", soft_wrap=True)
                    lock.acquire(timeout=-1, poll_interval=1)
                    self._lock = lock
                    return
                raise MsencError(
                    f"{self.folder}: another process is using this run's folder. Wait for it, or end it, then repeat "
                    "the command."
                ) from e
            self._lock = lock

    def _begin(self, seconds_before: float, memory_before: int) -> None:
        with suppress(OSError):  # Linux: reset the peak, which may be from an earlier job in this process
            Path("/proc/self/clear_refs").write_text("5")
        if gpu_memory() is not None:
            sys.modules["torch"].cuda.reset_peak_memory_stats()
        self._start = time.monotonic()
        self._seconds_before = seconds_before
        self._memory_before = memory_before

    def _continue(self) -> None:
        self.facts = read_facts(self.folder / "run.json")
        self._begin(self.facts.get("seconds", 0.0), self.facts.get("peak_memory_mib", 0))
        if not is_finished(self.facts):
            self.facts.pop("error", None)
            self.add(status="running", resumed=self.facts.get("resumed", 0) + 1, commit_resumed=_commit())


def machine() -> str:
    """What kind of machine this is, its GPU included."""
    torch = sys.modules.get("torch")  # who has not imported it has nothing on a GPU
    gpu = f", {torch.cuda.get_device_name()}" if torch is not None and torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}"


def gpu_memory() -> int | None:
    """The most memory that this process has taken on its GPU so far, in MiB; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20)


def is_finished(facts: Mapping[str, Any]) -> bool:
    """Whether a run has finished; the record of a killed one still says that it is running."""
    return facts["status"] == "finished"


# ---------------------------------------------------------------------------------------------------- which run


# ---------------------------------------------------------------------------------------------------- files


def read_run(run_dir: str | Path, argument: str = "run_dir") -> tuple[dict[str, Any], DictConfig]:
    """Open a run: its record and its config.

    Args:
        run_dir: its folder.
        argument: the config key that named it, for messages.

    Raises:
        MsencError: the folder is not a run, or one that never got a config.
    """
    folder = Path(run_dir)
    for file in (folder / "run.json", folder / ".hydra" / "config.yaml"):
        if not file.is_file():
            runs = sorted(str(f.parent.relative_to(folder)) for f in folder.glob("*/run.json"))[:3]
            inside = f" It contains runs, though: {', '.join(runs)}." if runs else ""
            what = "is not a run's folder" if folder.is_dir() else "does not exist"
            raise MsencError(
                f"{argument}={run_dir}: {what} (no {file.relative_to(folder)}).{inside} Expected a folder that "
                "train.py wrote, such as runs/single/TIME."
            )
    return read_facts(folder / "run.json"), read_config(folder / ".hydra" / "config.yaml")


def _commit() -> str | None:
    """The checkout's commit, marked if files differ from it; None outside a checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "pyproject.toml").is_file():  # installed, perhaps within a repository of something else
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
