"""Checkpoints: when they are written, what they contain, and how files are replaced atomically.

Checkpoints (callback) -> Trainer.save_checkpoint -> CheckpointFiles (plugin) -> last.ckpt, previous.ckpt, best.ckpt

Checkpoints are written at two points, where nothing is in progress: at the start of a batch that begins an optimizer
step (always the last one before a validation), and at the start of an epoch. So no gradients have to be saved, and no
validation is split. Lightning's counters are saved as of that point; what it would restore differently is corrected
before the first resumed batch.
"""

import math
import os
import random
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from msenc.files import remove, sync_folder
from msenc.files.kinds import short
from msenc.models.pretrained import ANOTHER, check_tensors, load_torch_file
from msenc.training.sharding import LAST, PREVIOUS, read_folder, read_meta
from msenc.types import MsencError
from msenc.work.processes import is_first_process
from msenc.work.signals import Termination

BASE = ("base_name", "base_fingerprint")
BEST, UNREADABLE = "best.ckpt", "unreadable.ckpt"


# ---------------------------------------------------------------------------------------------------- files


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name, flush it to disk, then rename it.

    ``last.ckpt`` becomes ``previous.ckpt`` in the same step, so that one of them is complete at any time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # a link of this name would be written through
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.is_file():
            _keep(path, path.with_name(PREVIOUS))
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as e:
        raise MsencError(f"{path}: cannot be written ({e.strerror}). Is the disk full?") from e


def _keep(path: Path, previous: Path) -> None:
    link = previous.with_name(f".{previous.name}.partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment, only the previous one exists
        path.replace(previous)
    else:
        link.replace(previous)


def read_checkpoint(path: Path, whole: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and verify its checksums.

    Args:
        path: a file, or a folder that processes which share out a model have written.
        whole: read a folder's tensors, too; otherwise only what they stand in.

    Raises:
        MsencError: it is truncated, modified, or not a checkpoint.
    """
    try:
        if is_folder := path.is_dir():
            saved = read_meta(path)
            saved = read_folder(path) if whole else saved
        else:
            with zipfile.ZipFile(path) as file:  # torch.load verifies no checksums
                if (broken := file.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
            saved = load_torch_file(path, mmap=False)
    except Exception as e:  # zipfile, zlib and safetensors raise their own types for a broken file
        raise MsencError(f"{path}: cannot be read as a checkpoint ({e}).") from e
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise MsencError(
            f"{path}: not a checkpoint of train.py (it has no state_dict). Expected {BEST}, {LAST} or {PREVIOUS}."
        )
    has_tensors = whole or not is_folder
    if has_tensors:
        check_tensors(saved["state_dict"], f"{path}, state_dict")
    for key in ("average", "reference"):
        tensors = saved.get(key, {})
        if not isinstance(tensors, dict) or not tensors.keys() <= saved["state_dict"].keys():
            raise MsencError(f"{path}, {key}: its names differ from those of state_dict. {ANOTHER}")
        if has_tensors:
            check_tensors(tensors, f"{path}, {key}")
    base = saved.get("msenc", {})
    if not isinstance(base, dict) or not all(isinstance(base.get(key, ""), str) for key in BASE):
        raise MsencError(f"{path}, msenc: found {short(base)}, expected the strings {' and '.join(BASE)}. {ANOTHER}")
    if not isinstance(saved.get("global_step", 0), int):
        raise MsencError(f"{path}, global_step: found {short(saved['global_step'])}, expected a number. {ANOTHER}")
    return saved


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint I/O; `newest` finds the checkpoint to resume from, and loading it reads it only once."""

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[Path, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See `write_checkpoint`."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `read_checkpoint`."""
        return self._read.pop(Path(path), None) or read_checkpoint(Path(path))

    def newest(self, folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to resume from: ``last.ckpt``, or ``previous.ckpt`` if the last one cannot be read.

        Args:
            folder: ``checkpoints/`` of a run.
            say: called with a message if it is not the last one.

        Returns:
            The file and its content; None if there is none.

        Raises:
            MsencError: none of the existing ones can be read.
        """
        reasons = []
        for path in (folder / LAST, folder / PREVIOUS):
            if not path.exists():
                continue
            try:
                saved = read_checkpoint(path, whole=False)
            except MsencError as e:
                reasons.append(str(e))
                continue
            if reasons:
                say(
                    f"{reasons[0]} Resuming from {path}, step {saved['global_step']:,}; renamed the other {UNREADABLE}."
                )
                if is_first_process():
                    # The next checkpoint must not displace this one, the only intact one.
                    remove(folder / UNREADABLE)
                    (folder / LAST).replace(folder / UNREADABLE)
            elif path.name == PREVIOUS:
                say(f"{folder / LAST}: missing. Resuming from {path}, step {saved['global_step']:,}.")
            if path.is_file():
                self._read[path] = saved
            return path, saved
        if reasons:
            raise MsencError(f"{' '.join(reasons)} To train from the start, remove {folder}.")
        return None


# ---------------------------------------------------------------------------------------------------- random numbers


def random_state() -> dict[str, Any]:
    """The state of all global generators of the process: Python's, NumPy's, torch's on the CPU and its GPU."""
    version, python, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": (version, torch.tensor(python), gauss),
        "numpy": {**numpy, "state": {**numpy["state"], "key": torch.tensor(numpy["state"]["key"].tolist())}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------- when


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` (everything needed to resume) and ``best.ckpt`` (only weights).

    Args:
        dirpath: the folder.
        every_minutes: save at the next optimizer step after this time; None: no limit by time.
        every_n_steps: save after every n-th optimizer step; None: never. The end of every epoch is always saved,
            after its validation.
        monitor: the metric that selects the best validation; None saves no best checkpoint.
        mode: ``min`` or ``max``.

    Attributes:
        best_score: the best value of `monitor` so far.
        termination: the process's handler, deferred by the callback while it trains.
        on_saved: called each time ``last.ckpt`` has been written.
    """

    def __init__(
        self,
        dirpath: str,
        every_minutes: float | None = 10,
        every_n_steps: int | None = None,
        monitor: str | None = "val/loss",
        mode: str = "min",
    ) -> None:
        if mode not in ("min", "max"):
            raise MsencError(f"callbacks.checkpoints.mode: found {mode!r}, expected min or max.")
        if (every_n_steps or 1) < 1 or (every_minutes or 0) < 0:
            raise MsencError(
                f"callbacks.checkpoints: found every_n_steps={every_n_steps}, every_minutes={every_minutes}; expected "
                "numbers above 0, or null."
            )
        self.folder = Path(dirpath)
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None
        self._outcome: dict[str, Any] | None = None
        self.termination = Termination()  # never entered, so it never requests termination
        self.on_saved: Callable[[], object] = lambda: None
        self._resume: dict[str, Any] | None = None
        self._saved_at = (0, 0.0)

    # ------------------------------------------------------------------------------------------------ what

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save, and its counters as of the point between two steps."""
        states = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        loops = checkpoint["loops"]["fit_loop"]
        _settle(loops)
        checkpoint["resume"] = {
            "random_states": states,
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "steps_logged": loops["epoch_loop.state_dict"]["_batches_that_stepped"],
            "batch": loops["epoch_loop.batch_progress"]["current"]["completed"],
            "loader": trainer.train_dataloader.state_dict(),
            "best_score": self.best_score,
            "outcome": self._outcome,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state that can only be restored at the first batch."""
        self._resume = checkpoint["resume"]
        self.best_score = self._resume["best_score"]

    def _restore(self, trainer: L.Trainer, batch_idx: int) -> None:
        """Restore just before the first resumed batch, after all iterators are created and all checks have run."""
        resume, self._resume = self._resume, None
        if batch_idx != resume["batch"]:
            raise RuntimeError(f"resumed at batch {batch_idx} of the epoch, the checkpoint is of {resume['batch']}")
        states = resume["random_states"]
        set_random_state(states[trainer.global_rank % len(states)])
        if len(states) != trainer.world_size:
            trainer.print(
                f"The checkpoint is from {len(states)} processes, this run has {trainer.world_size}: from here on, "
                "sums are rounded in another order, and dropout draws other numbers."
            )
            for _ in range(trainer.global_rank // len(states)):  # no two processes draw the same
                torch.manual_seed(int(torch.randint(2**62, ())))
        trainer.callback_metrics.update({k: v.to(trainer.strategy.root_device) for k, v in resume["metrics"].items()})
        # Lightning counts one too many if a validation came right before.
        trainer.fit_loop.epoch_loop._batches_that_stepped = resume["steps_logged"]
        self._saved_at = (trainer.global_step, time.monotonic())

    # ------------------------------------------------------------------------------------------------ when

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on, signals are deferred to a safe point; Lightning's own handler of SIGTERM would not wait."""
        self._saved_at = (trainer.global_step, time.monotonic())
        self.termination.listen()
        self.termination.is_held = True
        if self._resume is not None:
            # Lightning forgets to if the number of batches was requested before it restores, as schedules do.
            trainer.train_dataloader.load_state_dict(self._resume["loader"])

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the epoch that has just ended, its validation included."""
        if trainer.global_step > self._saved_at[0]:
            self._save(trainer)
        self._leave_if_asked(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Save between two steps, if it is time."""
        if self._resume is not None:
            self._restore(trainer, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients are being gathered
        if self._any(trainer, self.termination.is_asked or self._is_due(trainer)) or _validates_after(trainer):
            if trainer.global_step > self._saved_at[0]:
                self._save(trainer)
            self._leave_if_asked(trainer)

    def _is_due(self, trainer: L.Trainer) -> bool:
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            return True
        return self.every_minutes is not None and time.monotonic() - self._saved_at[1] >= 60 * self.every_minutes

    def _any(self, trainer: L.Trainer, value: bool) -> bool:
        """Whether any process says so: all have to save and exit at the same step."""
        return trainer.strategy.reduce_boolean_decision(value, all=False) if trainer.world_size > 1 else value

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        if self._any(trainer, self.termination.is_asked):
            self.termination.leave()

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:  # what was logged before a checkpoint is on disk before it is
            logger.save()
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self._saved_at = (trainer.global_step, time.monotonic())
        self.on_saved()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A validation can be repeated: a signal ends it at once, and the checkpoint of a step before remains."""
        self.termination.is_held = False
        if self.termination.is_asked:
            self.termination.leave()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the weights if they are the best so far."""
        if trainer.sanity_checking:
            return
        self.termination.is_held = True
        if self.monitor is None:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MsencError(
                f"callbacks.checkpoints.monitor={self.monitor}: no such metric. Found: "
                f"{', '.join(sorted(trainer.callback_metrics))}."
            )
        score = trainer.callback_metrics[self.monitor].item()
        sign = 1 if self.mode == "min" else -1
        if not math.isnan(score) and (self.best_score is None or sign * score < sign * self.best_score):
            self.best_score = score
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the end state and how training ended; nothing is left to resume then."""
        self._outcome = training_outcome(trainer)
        self._save(trainer)
        self.termination.is_held = False
        self._leave_if_asked(trainer)


def _validates_after(trainer: L.Trainer) -> bool:
    """Whether a validation follows the optimizer's step that begins: it may last, and a signal may end it."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if not loop._should_check_val_epoch() or every in (None, math.inf):
        return False
    done = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return every - done % every <= trainer.accumulate_grad_batches


def training_outcome(trainer: L.Trainer) -> dict[str, Any]:
    """Why and where training stopped, and its last metrics, as plain values."""
    if trainer.global_step == trainer.max_steps:
        reason = "trainer.max_steps reached"
    else:
        is_whole = trainer.current_epoch == trainer.max_epochs
        reason = "all epochs done" if is_whole else "stopped before its last epoch"
    return {
        "stop_reason": reason,
        "device": str(trainer.strategy.root_device),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


def _settle(loops: dict[str, Any]) -> None:
    """Turn the counters between two steps, when Lightning has already counted the next, back into those before it.

    At the start of a batch it has counted the batch as ready, at the start of an epoch the epoch, while the batches of
    the previous epoch still count as current. Its restart code would take this for an interrupted step.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    is_between_epochs = epochs["total"]["started"] == epochs["total"]["completed"]
    for progress in (epochs, batches) if is_between_epochs else (batches,):
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["completed"]
    batches["is_last_batch"] = False
    if is_between_epochs:
        batches["current"] = dict.fromkeys(batches["current"], 0)
