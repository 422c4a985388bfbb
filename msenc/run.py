"""A run's folder: what is written there, and how it is read again.

- ``run.json``: what ran, on what, and how it ended
- ``metrics.json``: validation metrics at the end of training
- ``.hydra/``: the config, as it was composed (written by Hydra)
- ``checkpoints/``: best.ckpt, last.ckpt and previous.ckpt, what trained
- ``export/``: what trained, for use elsewhere
- ``evaluation/``: one folder per data set, split and settings
"""

import hashlib
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from msenc.types import MsencError

SCHEMA_VERSION = 1
PACKAGES = ("msenc", "torch", "lightning", "transformers", "peft", "hydra-core")


ANOTHER_PLACE = {
    "": ("paths", "logger", "resume", "plan", "dry_run", "prepare_workers", "init_from"),
    "data": ("dir", "root", "table", "recordings", "labels", "num_workers", "verify"),
}
"""Keys that do not tell one run from another: where things lie, who watches, and how many help.

What a run starts from is told by its tensors' hashes, not by their folder.
"""


class RunRecord:
    """``run.json``, kept up to date: written when the run starts, and again whenever something is known.

    It holds the run's folder for this process alone, until `close`; the hold goes when the process ends, however it
    ends. Of several processes that train together, the first one keeps the record.

    Args:
        folder: the run's folder; it is made.
        **facts: what is known at the start.

    Raises:
        MsencError: the folder holds a run, or another process works in it.
    """

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        if is_first_process() and (self.folder / "run.json").is_file():
            self.close()
            raise MsencError(
                f"{self.folder}: holds a run already. Continue it (python train.py resume={self.folder}), or give "
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
    def reopen(cls, folder: Path) -> "RunRecord":
        """Open an earlier run's record to continue the run.

        Raises:
            MsencError: another process works in the folder, or the record cannot be read.
        """
        record = cls.__new__(cls)
        record.folder = Path(folder)
        record._hold()
        record._continue()
        return record

    def move(self, folder: Path) -> None:
        """Continue an earlier run in its folder instead, and remove this one, in which nothing has happened yet."""
        empty, hold = self.folder, self._lock
        if Path(folder).resolve() == empty.resolve():
            raise ValueError(f"{folder}: the run is here already")
        self.folder = Path(folder)
        try:
            self._hold()
        except MsencError:  # whoever works there keeps its record; this one says so in its own
            self.folder, self._lock = empty, hold
            raise
        if hold is not None:
            hold.release()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == empty:
                handler.close()
                handler.baseFilename = str(self.folder / Path(handler.baseFilename).name)
        shutil.rmtree(empty, ignore_errors=True)
        self._continue()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()

    def add(self, **facts: Any) -> None:
        """Note facts, with the seconds of all starts together and the peak memory so far."""
        self.facts.update(facts)
        self.facts["seconds"] = round(self._seconds_before + time.monotonic() - self._start, 2)
        memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        self.facts["peak_memory_mib"] = max(self._memory_before, memory)
        if is_first_process():
            write_json(self.folder / "run.json", self.facts)

    def _hold(self) -> None:
        self._lock = None
        if is_first_process():
            lock = FileLock(self.folder / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout as e:
                raise MsencError(
                    f"{self.folder}: another process works in this run's folder. Wait for it, or end it, then repeat."
                ) from e
            self._lock = lock

    def _begin(self, seconds_before: float, memory_before: int) -> None:
        with suppress(OSError):  # Linux: the peak of what this process did before, such as another job, is forgotten
            Path("/proc/self/clear_refs").write_text("5")
        self._start = time.monotonic()
        self._seconds_before = seconds_before
        self._memory_before = memory_before

    def _continue(self) -> None:
        self.facts = read_json(self.folder / "run.json")
        self._begin(self.facts["seconds"], self.facts["peak_memory_mib"])
        if not is_finished(self.facts):
            self.facts.pop("error", None)
            self.add(status="running", resumed=self.facts.get("resumed", 0) + 1, commit_resumed=_commit())


def machine() -> str:
    """What kind of machine this is."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def is_first_process() -> bool:
    """Whether this is the process that writes, of those that train one run together."""
    from lightning.pytorch.utilities import rank_zero_only  # late: train.py's --help must not wait for it

    return rank_zero_only.rank == 0


def is_finished(facts: Mapping[str, Any]) -> bool:
    """Whether a record is of a run that is done; one that was killed still says that it is running."""
    return facts["status"] == "finished"


# ---------------------------------------------------------------------------------------------------- which run


def run_settings(cfg: DictConfig) -> dict[str, Any]:
    """What tells a run from others, of its config: all that changes what is trained or measured.

    Places do not: they are replaced by their names before anything refers to them.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    cfg.paths = {name: name for name in cfg.paths}
    for path, keys in ANOTHER_PLACE.items():
        node = OmegaConf.select(cfg, path) if path else cfg
        for key in keys:
            if key in node and key != "paths":
                del node[key]
    settings = OmegaConf.to_container(cfg, resolve=True)
    del settings["paths"]
    # What is empty changes nothing, and is absent in runs from before there was such a key.
    if not settings.get("optimizer", {}).get("groups", True):
        del settings["optimizer"]["groups"]
    if not settings.get("loss", {}).get("weights", True):
        del settings["loss"]
    return settings


def check_same_settings(folder: Path, cfg: DictConfig) -> None:
    """Refuse to continue a run with other settings than its own.

    Raises:
        MsencError: it names up to three that differ.
    """
    _, own = read_run(folder)
    before, now = _flat(run_settings(own)), _flat(run_settings(cfg))
    differ = [
        f"{key}={before.get(key, '(none)')} there, {now.get(key, '(none)')} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise MsencError(
            f"{folder}: the run cannot be continued with other settings than its own: {'; '.join(differ[:3])}{more}. "
            "Leave them out (or restore configs/ as it was), or start another run, without resume."
        )


def find_run(folders: Iterable[Path], identity: str) -> Path | None:
    """The run of this identity below any of the folders: a finished one before others, the latest before earlier ones.

    A run's folder holds no other run, so it is not searched.
    """
    found = []
    for path in run_records(folders):
        facts = read_json(path)
        if facts.get("identity") == identity:
            found.append((is_finished(facts), path.stat().st_mtime, path.parent))
    return max(found)[2] if found else None


def run_records(folders: Iterable[Path]) -> Iterator[Path]:
    """Every ``run.json`` below the folders, once; the many files of a run's folder are not looked through."""
    seen = set()
    for folder in folders:
        for place, inner, files in os.walk(folder):
            if "run.json" in files:
                inner.clear()
                path = Path(place, "run.json")
                if (real := path.resolve()) not in seen:
                    seen.add(real)
                    yield path


def resumed_arguments(arguments: list[str]) -> list[str]:
    """A command line with ``resume=RUN`` -> the one that composes that run's config, and works in its folder.

    Args:
        arguments: of `train.py`; returned as they are where they name no run's folder.

    Raises:
        MsencError: the folder is no run, or the command is a multirun.
    """
    named = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("auto", "null", ""):
        return arguments
    if {"-m", "--multirun"} & set(arguments) or any(a.startswith("sweep=") for a in arguments):
        raise MsencError(
            f"resume={named[-1]}: a multirun makes many runs, this is one. Leave out -m, or use resume=auto."
        )
    folder = Path(named[-1])
    read_run(folder, "resume")
    file = folder / ".hydra" / "overrides.yaml"
    given = [a for a in arguments if not a.startswith("resume=")]
    keys = {key_of(a) for a in given}
    own = [o for o in OmegaConf.load(file) if key_of(o) not in keys | {"resume"}] if file.is_file() else []
    quoted = quoted_value(str(folder.resolve()))
    # A job's own overrides name its sweep, which would begin anew; and Hydra would write the run's .hydra/ anew.
    hydra = [f"hydra.run.dir={quoted}", "hydra.mode=RUN", "hydra.output_subdir=null"]
    return [*own, *given, f"resume={quoted}", *hydra]


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """``init_from=RUN`` -> ``init_from.run=RUN``: a run to take everything from is the short form.

    Example:
        >>> spelt_out(["init_from=runs/single/A", "seed=2"])
        ['init_from.run=runs/single/A', 'seed=2']
    """
    return [a.replace("init_from=", "init_from.run=", 1) if a.startswith("init_from=") else a for a in arguments]


def key_of(override: str) -> str:
    """What an override sets, as ``modality`` in ``modality=text``."""
    return override.lstrip("+~").partition("=")[0]


def literal_arguments(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """Command-line arguments with some values taken as they are typed: Hydra reads commas and quotes as its own.

    Args:
        arguments: of a script.
        keys: whose values are literal, but for ``null``.

    Example:
        >>> literal_arguments(["text=Well, yes!", "seed=2"], ["text"])
        ["text='Well, yes!'", 'seed=2']
    """
    parts = [argument.partition("=") for argument in arguments]
    return [
        f"{key}={quoted_value(value)}" if key in keys and value not in ("", "null") else argument
        for argument, (key, _, value) in zip(arguments, parts, strict=True)
    ]


def quoted_value(text: str) -> str:
    r"""A text as an override's value, whatever signs are in it.

    Example:
        >>> print(quoted_value(r"it's in C:\a"))
        'it\'s in C:\a'
    """
    # In quotes Hydra reads a backslash as itself, but for those that stand before a quote.
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text)
    return "'{}'".format(doubled.replace("'", "\\'"))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}".lstrip(".")).items()}


# ---------------------------------------------------------------------------------------------------- files


def read_run(run_dir: str | Path, argument: str = "run_dir") -> tuple[dict[str, Any], DictConfig]:
    """Open a run: its record and its config.

    Args:
        run_dir: its folder.
        argument: what named it, for messages.

    Raises:
        MsencError: the folder is no run, or one that never got as far as a config.
    """
    folder = Path(run_dir)
    for file in (folder / "run.json", folder / ".hydra" / "config.yaml"):
        if not file.is_file():
            runs = sorted(str(f.parent.relative_to(folder)) for f in folder.glob("*/run.json"))[:3]
            inside = f" It holds runs, though: {', '.join(runs)}." if runs else ""
            what = "is not a run's folder" if folder.is_dir() else "does not exist"
            raise MsencError(
                f"{argument}={run_dir}: {what} (no {file.relative_to(folder)}).{inside} Expected a folder that "
                "train.py wrote, such as runs/single/TIME."
            )
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(config, DictConfig)
    return read_json(folder / "run.json"), config


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        MsencError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise MsencError(f"{path}: cannot be read as JSON ({e}).") from e


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        raise MsencError(f"{path}: cannot be written ({e.strerror}).") from e


def digest(value: Any) -> str:
    """A short hash of plain values.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _commit() -> str | None:
    """The checkout's commit, with a mark where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
