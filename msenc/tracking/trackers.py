"""Where a run is logged: files in its folder, and services, which keep it as one run across kills and resumes.

A service knows the run by ``tracked`` of its ``run.json``; none of them can end the run (`Tracker`).
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from msenc.config.build import build
from msenc.config.secrets import redacted
from msenc.files import read_json, reason_of, write_json
from msenc.runs.overrides import key_of
from msenc.tracking.mlflow import mlflow_name
from msenc.work.processes import is_first_process


class Tracker(Logger):
    """A logger that cannot end a run: its first failure is said, and nothing is sent to it from then on.

    Args:
        name: its key in the config.
        make: builds it; not called in processes that log nothing.
        say: called with what the user should know.
        sent: file with the last step of each metric that a service has got, as it cannot drop what a killed run logged
            after its last checkpoint: the resumed run, which comes to the same values, sends none twice. None for
            files, which are cut back.
        lag_s: how long the service keeps in memory what it gets; so much of it is lost with a killed process.

    Attributes:
        logger: what `make` built; None where there is none.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Logger],
        say: Callable[[str], None],
        sent: Path | None = None,
        lag_s: float = 0.0,
    ) -> None:
        super().__init__()
        self.key = name
        self.logger: Logger | None = None
        self._say = say
        self._sent_file = sent
        self._sent: dict[str, int] = {}
        self._lag_s = lag_s
        self._waiting: list[tuple[float, dict[str, int]]] = []  # when it was sent
        if is_first_process():
            self._try(lambda: self._begin(make))

    def _begin(self, make: Callable[[], Logger]) -> None:
        if self._sent_file is not None and self._sent_file.is_file():
            self._sent = read_json(self._sent_file, dict[str, int])
        self.logger = make()
        if isinstance(self.logger, WandbLogger):
            _remove_links(Path(self.logger.experiment.dir).parent)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a service, its library or the disk has to say
            self.logger = None
            self._say(
                f"logger.{self.key}: failed, and gets nothing from here on ({type(error).__name__}: "
                f"{redacted(reason_of(error))[:300]}). The run goes on."
            )
            return None

    def call(self, function: Callable[[Any], Any]) -> Any:
        """What a function returns for the logger; None where there is none, or it failed."""
        return None if self.logger is None else self._try(lambda: function(self.logger))

    @property
    def name(self) -> str | None:
        """The logger's."""
        return self.call(lambda logger: logger.name)

    @property
    def version(self) -> int | str | None:
        """The logger's."""
        return self.call(lambda logger: logger.version)

    @property
    def save_dir(self) -> str | None:
        """The logger's."""
        return self.call(lambda logger: logger.save_dir)

    @property
    def experiment(self) -> Any:
        """The logger's."""
        return self.call(lambda logger: logger.experiment)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send numbers, those of a step once."""
        at = step or 0
        new = {name: value for name, value in metrics.items() if at > self._sent.get(name, -1)}
        if not new or self.logger is None:
            return
        self.call(lambda logger: logger.log_metrics(new, step=step))
        if self._sent_file is not None:
            self._waiting.append((time.monotonic(), dict.fromkeys(new, at)))
            self._try(self._note_sent)

    def _note_sent(self) -> None:
        until = time.monotonic() - self._lag_s
        arrived = [steps for sent, steps in self._waiting if sent <= until]
        if arrived:
            self._waiting = self._waiting[len(arrived) :]
            for steps in arrived:
                self._sent.update(steps)
            write_json(self._sent_file, self._sent)

    def log_measures(self, measures: Mapping[str, float], step: int) -> None:
        """Send what is measured of the machine; not to the CSV file, which a resumed run makes equal to the byte."""
        if not isinstance(self.logger, CSVLogger):
            self.log_metrics(measures, step)

    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Send settings."""
        self.call(lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def log_graph(self, model: L.LightningModule, input_array: torch.Tensor | None = None) -> None:
        """Send the model, where the logger's settings ask for that."""
        self.call(lambda logger: logger.log_graph(model, input_array))

    def save(self) -> None:
        """Write out what waits in memory."""

        def save(logger: Logger) -> None:
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
            if self._waiting:  # what a checkpoint follows is not logged again
                time.sleep(max(self._waiting[-1][0] + self._lag_s - time.monotonic(), 0.0))
                self._note_sent()

        self.call(save)

    def finalize(self, status: str) -> None:
        """Lightning ends its loggers with each call of its trainer; what ends the run is `close`."""
        self.save()

    def close(self, status: str) -> None:
        """End: ``success``, ``failed`` or ``interrupted``."""

        def close(logger: Logger) -> None:
            if isinstance(logger, WandbLogger):  # which would be the next job's, too
                logger.experiment.finish(exit_code={"success": 0, "failed": 1}.get(status, os.EX_TEMPFAIL))
            else:
                logger.finalize(status)

        self.call(close)
        self.logger = None


def _remove_links(folder: Path) -> None:
    """W&B links a log of its own in the user's cache; a run's folder has no links that lead elsewhere."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            path.unlink()


CSV, TENSORBOARD = "msenc.training.loggers.CsvLogger", "lightning.pytorch.loggers.TensorBoardLogger"
WANDB, MLFLOW = "lightning.pytorch.loggers.WandbLogger", "msenc.tracking.mlflow.MlflowLogger"
QUIETLY = {
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "symlink": False,  # a run's folder has no links
    "x_disable_meta": True,  # the command line, with what it may hold
    "quiet": True,
    "x_transaction_log_flush_interval": 0.25,  # seconds
    "finish_timeout": 60,
    "init_timeout": 60,
}
"""Settings of W&B: it gets what msenc sends, and a server that is gone holds nobody up."""
WANDB_LAG_S = 1.0
"""Within which its own process has written what it gets; that process ends with ours, even if killed."""
CONTINUED = {
    WANDB: {"project", "entity", "offline", "prefix"},
    MLFLOW: {"experiment_name", "tracking_uri", "save_dir"},
    TENSORBOARD: {"name", "version", "prefix"},
}
"""Of a run's stored config, which may be a stranger's: the loggers that an evaluation adds to, and their keys."""


def open_trackers(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    folder: Path,
    say: Callable[[str], None],
    purge_step: int | None = None,
) -> list[Tracker]:
    """The loggers of a run that begins to train, or is resumed.

    Args:
        config: plain, of the run.
        record: its ``run.json``, with ``tracked``.
        folder: the run's.
        say: called with warnings.
        purge_step: steps from here on are logged anew; None for a run that begins.

    Raises:
        MsencError: an existing log cannot be continued.
    """
    trackers = []
    for name, node in config["logger"].items():
        if not node:
            continue
        target = node["_target_"]
        given = _given(node, record)
        if purge_step is not None and target in (CSV, TENSORBOARD):
            given["purge_step"] = purge_step
        is_file = target.endswith((".CsvLogger", ".CSVLogger", ".TensorBoardLogger"))
        if is_file and is_first_process():
            logger = build({**node, **given}, f"logger.{name}")  # what it refuses, the user can mend
            tracker = Tracker(name, lambda logger=logger: logger, say)
        else:
            make = _builder({**node, **given}, f"logger.{name}")
            lag_s = WANDB_LAG_S if target == WANDB else 0.0
            tracker = Tracker(name, make, say, folder / "logs" / f"{name}.sent.json", lag_s)
        if target == MLFLOW:
            tracker.call(lambda logger: logger.begin())
        tracker.log_hyperparams(hyperparameters(config, record))
        trackers.append(tracker)
    return trackers


def reopen_trackers(
    config: Mapping[str, Any], record: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> list[Tracker]:
    """The loggers of a run that has trained, for what comes after.

    Args:
        config: plain, as stored.
        record: its ``run.json``.
        folder: the run's, where its logs are now.
        say: called with warnings.
    """
    trackers = []
    for name, node in (config.get("logger") or {}).items():
        target = (node or {}).get("_target_")
        if target not in CONTINUED or "tracked" not in record:
            continue
        own = {key: value for key, value in node.items() if key in {"_target_", *CONTINUED[target]}}
        if target == TENSORBOARD and not (folder / str(own.get("name")) / str(own.get("version"))).is_dir():
            continue
        given = _given(own, record) | ({"create": False} if target == MLFLOW else {"save_dir": str(folder)})
        trackers.append(Tracker(name, _builder({**own, **given}, f"logger.{name}"), say))
    return trackers


@contextmanager
def closing_trackers(trackers: Sequence[Tracker]) -> Iterator[None]:
    """End them with the body, as it ended."""
    status = "failed"
    try:
        yield
        status = "success"
    except (KeyboardInterrupt, SystemExit):
        status = "interrupted"
        raise
    finally:
        for tracker in trackers:
            tracker.close(status)


def _builder(node: Mapping[str, Any], place: str) -> Callable[[], Logger]:
    return lambda: build(node, place)


def _given(node: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What a logger is told of the run, but for what its config sets."""
    tracked, overrides = record["tracked"], record.get("overrides", [])
    target = node["_target_"]
    if target == TENSORBOARD:
        given: dict[str, Any] = {"default_hp_metric": False}
    elif target == WANDB:
        tags = [text[:64] for override in overrides if (text := redacted_override(override))]
        given = {"name": tracked["name"], "group": tracked["group"], "tags": list(dict.fromkeys(tags))}
        if not node.get("version"):
            given["id"] = tracked["id"]
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    elif target == MLFLOW:
        tags = {mlflow_name(key_of(o)): redacted_override(o).partition("=")[2][:5000] for o in overrides}
        tags |= {"sweep": tracked["group"]} if tracked["group"] else {}
        given = {"run_name": tracked["name"], "key": tracked["id"], "tags": tags}
    else:
        return {}
    given = {key: value for key, value in given.items() if node.get(key) is None}
    if target == WANDB:
        given["settings"] = {**QUIETLY, **(node.get("settings") or {})}
    return given


def redacted_override(override: str) -> str:
    """An override without a secret."""
    key, equals, value = override.partition("=")
    return f"{key}{equals}{redacted(value, key_of(override))}"


NOT_SETTINGS = ("logger", "paths", "plugins", "urls", "plan", "dry_run", "detach", "resume")


def hyperparameters(config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings as flat names and plain values, and what it was made with."""
    settings = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
    facts = {key: record.get(key) for key in ("commit", "machine", "task_hash", "trainable_parameters")}
    return redacted(_flatten_dict({**settings, "run": facts}, "."))
