"""The identity of a run: its settings, and the hashes of its data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msenc.config.build import with_first_targets
from msenc.data.datamodule import DialogueDataModule
from msenc.data.preferences import PreferenceDataModule, is_table
from msenc.files import digest
from msenc.models.layers import without_absent
from msenc.runs.record import read_run
from msenc.types import MsencError

ANOTHER_PLACE = {
    "": (
        "paths",
        "logger",
        "resume",
        "plan",
        "dry_run",
        "detach",
        "prepare_workers",
        "init_from",
        "plugins",
        "urls",
        "margins",
    ),
    "data": (
        "dir",
        "root",
        "table",
        "encoding",
        "recordings",
        "layout",
        "audio_track",
        "labels",
        "num_workers",
        "verify",
    ),
    "data.voice": ("loudness", "writer", "writer_url"),
}
"""Keys that are not part of a run's identity: paths, loggers, numbers of processes.

Initial weights are identified by their tensors' hashes, not by their folder.
"""


NUMBERS_OF_PROCESSES = ("trainer.devices", "trainer.num_nodes")
"""Keys in which a run may be resumed with other values: they share the same batches out to fewer, or more."""


def task_hash(config: Mapping[str, Any], datamodule: DialogueDataModule) -> str:
    """Hash of what two runs must share to be compared: turns and splits, the form of targets, history truncation."""
    task = {
        "turns": datamodule.manifest.turns_hash,
        "target": config["prompt"]["target"],
        "max_history_tokens": config["data"]["max_history_tokens"],
    }
    if datamodule.left_out:
        task["left_out"] = sorted(datamodule.left_out)
    if windows := config["prompt"].get("windows"):
        task["windows"] = windows
    return digest(task)


def stream_hashes(datamodule: DialogueDataModule) -> dict[str, str]:
    """Stream -> hash of its features, or of their replacement by a control."""
    hashes = {s: datamodule.manifest.streams[f"{s}-{spec.name}"].hash for s, spec in datamodule.streams.items()}
    for control in datamodule.controls:
        if control.stream in hashes:
            hashes[control.stream] = digest([hashes[control.stream], str(control)])
    return hashes


def data_hashes(config: Mapping[str, Any], datamodule: DialogueDataModule) -> dict[str, Any]:
    """What a run reads, by its hashes."""
    hashes = {
        "turns_hash": datamodule.manifest.turns_hash,
        "streams": stream_hashes(datamodule),
        "task_hash": task_hash(config, datamodule),
    }
    if isinstance(datamodule, PreferenceDataModule) and (pairs := datamodule.pairs_hash()) is not None:
        hashes["pairs_hash"] = pairs
    return hashes


def run_identity(cfg: DictConfig, data: Mapping[str, Any]) -> str:
    """The hash by which a repeated command finds its run: all settings that matter, and the data."""
    return digest({**run_settings(cfg), **data})


def check_same_data(record: Mapping[str, Any], config: Mapping[str, Any], datamodule: DialogueDataModule) -> None:
    """Refuse data whose content has changed since the run; imported weights have no data."""
    for what, found in data_hashes(config, datamodule).items():
        if what != "turns_hash" and record.get(what) not in (found, None):
            raise MsencError(
                f"{datamodule.folder}: not the data that the run was trained on ({what} was {record[what]}, is "
                f"{found}). Prepare it as it was, or train again."
            )


def run_settings(cfg: DictConfig) -> dict[str, Any]:
    """The part of a config that identifies a run: everything that affects training or evaluation.

    Paths are not part of it: they are replaced by their names before anything refers to them.
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
    # Empty values change nothing, and are absent in runs older than the key.
    if "groups" in (optimizer := settings.get("optimizer") or {}):
        optimizer["groups"] = {name: group for name, group in (optimizer["groups"] or {}).items() if group is not None}
        if not optimizer["groups"]:
            del optimizer["groups"]
    if not settings.get("loss", {}).get("weights", True):
        del settings["loss"]
    if not settings.get("data", {}).get("drop", True):
        del settings["data"]["drop"]
    if settings.get("data", {}).get("val") == "val":
        del settings["data"]["val"]
    if settings.get("objective", 0) is None:
        del settings["objective"]
    elif "objective" in settings:
        if is_table(settings["objective"]["pairs"]):
            settings["objective"]["pairs"] = "table"  # identified by its content
        if not settings["objective"].get("rpo_alpha", True):
            del settings["objective"]["rpo_alpha"]
    if not (settings.get("align") or {}).get("keep", True):
        del settings["align"]["keep"]
    if settings.get("threads", 0) is None:
        del settings["threads"]
    for stream in (settings["model"].get("streams") or {}).values():
        stream["encoder"] = without_absent(stream["encoder"])
    if "control" in settings:
        settings["controls"] = settings.pop("control")  # its first name
    return with_first_targets(settings)


def check_same_settings(folder: Path, cfg: DictConfig) -> None:
    """Refuse to resume a run with settings other than its own.

    Raises:
        MsencError: names up to three that differ.
    """
    _, own = read_run(folder)
    before, now = flat(run_settings(own)), flat(run_settings(cfg))
    differ = [
        f"{key}={before.get(key, '(none)')} there, {now.get(key, '(none)')} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and key not in NUMBERS_OF_PROCESSES
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise MsencError(
            f"{folder}: the run cannot be resumed with other settings than its own: {'; '.join(differ[:3])}{more}. "
            "Remove them (or restore configs/), or start another run without resume."
        )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested settings as dotted key -> value."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}".lstrip(".")).items()}
