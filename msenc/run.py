"""A run's folder: what is written there, and how it is read again.

- ``run.json``: what ran, on what, and how it ended
- ``metrics.json``: validation metrics at the end of training
- ``.hydra/``: the config, as it was composed (written by Hydra)
- ``checkpoints/``: best.ckpt and last.ckpt, what trained
- ``evaluation/``: one folder per data set, split and settings
"""

import hashlib
import json
import os
import platform
import resource
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from msenc.types import MsencError

SCHEMA_VERSION = 1
PACKAGES = ("msenc", "torch", "lightning", "transformers", "peft", "hydra-core")


class RunRecord:
    """``run.json``, kept up to date: written when the run starts, and again whenever something is known.

    Args:
        folder: the run's folder; it is made.
        **facts: what is known at the start.
    """

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self.facts = {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "commit": _commit(),
            "versions": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **facts,
        }
        self.add()

    def add(self, **facts: Any) -> None:
        """Note facts, with the seconds and the peak memory so far."""
        self.facts.update(facts)
        self.facts["seconds"] = round(time.monotonic() - self._start, 2)
        self.facts["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if rank_zero_only.rank == 0:  # of several processes, the first one keeps the record
            write_json(self.folder / "run.json", self.facts)


def read_run(run_dir: str | Path) -> tuple[dict[str, Any], DictConfig]:
    """Open a run: its record and its config.

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
                f"run_dir={run_dir}: {what} (no {file.relative_to(folder)}).{inside} Expected a folder that train.py "
                "wrote, such as runs/single/TIME."
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
