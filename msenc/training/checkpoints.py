"""Checkpoints: when they are written, what they contain, and how a file is replaced without ever being half written.

Checkpoints (callback) -> Trainer.save_checkpoint -> CheckpointFiles (plugin) -> last.ckpt, previous.ckpt, best.ckpt

Two kinds of moments are saved, at which nothing is half done: the start of a batch that begins an optimizer's step
(always that of the last one before a validation), and the start of an epoch. So no gradient has to be kept, and no
validation is cut in two. Lightning's own counters are written as they stand then; what it would restore otherwise is
put right before the first resumed batch.
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

from msenc.files.kinds import short
from msenc.models.pretrained import load_torch_file
from msenc.types import MsencError
from msenc.work.signals import Termination

BASE = ("base_name", "base_fingerprint")
ANOTHER = "Take another checkpoint, or train again."
LAST, PREVIOUS, BEST, UNREADABLE = "last.ckpt", "previous.ckpt", "best.ckpt", "unreadable.ckpt"


# ---------------------------------------------------------------------------------------------------- files


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name, have it on disk, then rename it.

    ``last.ckpt`` becomes ``previous.ckpt`` in the same step, so that one of them is whole at every moment.
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
        _sync_folder(path.parent)
    except OSError as e:
        raise MsencError(f"{path}: cannot be written ({e.strerror}). Is the disk full?") from e


def _keep(path: Path, previous: Path) -> None:
    link = previous.with_name(f".{previous.name}.partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment only the previous one is there
        path.replace(previous)
    else:
        link.replace(previous)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; the checksum of everything in it is verified.

    Raises:
        MsencError: it is cut off, changed, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch.load checks no sums
            if (broken := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"the sum of {broken} is wrong")
        saved = load_torch_file(path, mmap=False)
    except Exception as e:  # zipfile and zlib have types of their own for a broken file
        raise MsencError(f"{path}: cannot be read as a checkpoint ({e}).") from e
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise MsencError(
            f"{path}: no checkpoint of train.py (it holds no state_dict). Expected {BEST}, {LAST} or {PREVIOUS}."
        )
    check_tensors(saved["state_dict"], f"{path}, state_dict")
    average = saved.get("average", {})
    if not isinstance(average, dict) or not average.keys() <= saved["state_dict"].keys():
        raise MsencError(f"{path}, average: found other names than those of state_dict. {ANOTHER}")
    check_tensors(average, f"{path}, average")
    base = saved.get("msenc", {})
    if not isinstance(base, dict) or not all(isinstance(base.get(key, ""), str) for key in BASE):
        raise MsencError(f"{path}, msenc: found {short(base)}, expected {' and '.join(BASE)} as texts. {ANOTHER}")
    if not isinstance(saved.get("global_step", 0), int):
        raise MsencError(f"{path}, global_step: found {short(saved['global_step'])}, expected a number. {ANOTHER}")
    return saved


def check_tensors(state: Mapping[Any, Any], where: str) -> None:
    """Refuse weights that are none: what is no tensor, and NaN or infinity, with which nothing can be learned or said.

    Raises:
        MsencError: names the first.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _is_dense(tensor):
            raise MsencError(f"{where}, {short(name)}: found a {type(tensor).__name__}, expected a tensor. {ANOTHER}")
        if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            number = int((~tensor.isfinite()).sum())
            raise MsencError(
                f"{where}, {name}: found NaN or infinity in {number:,} of {tensor.numel():,} values: the training "
                f"diverged, or the file was changed. {ANOTHER}"
            )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether all values of a tensor are there, each at its place: one number can be said to fill any shape."""
    is_usual = tensor.layout is torch.strided and not tensor.is_quantized and tensor.element_size() <= 8
    return is_usual and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to checkpoint files; `newest` finds the one to resume from, and hands it on when it is loaded."""

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
        """The checkpoint to resume from: ``last.ckpt``, or ``previous.ckpt`` where the last cannot be read.

        Args:
            folder: ``checkpoints/`` of a run.
            say: told when it is not the last one, and why.

        Returns:
            The file and what it holds; None where there is none.

        Raises:
            MsencError: none of those that are there can be read.
        """
        reasons = []
        for path in (folder / LAST, folder / PREVIOUS):
            if not path.is_file():
                continue
            try:
                saved = read_checkpoint(path)
            except MsencError as e:
                reasons.append(str(e))
                continue
            if reasons:
                say(f"{reasons[0]} Resuming from {path}, step {saved['global_step']:,}; the other is {UNREADABLE} now.")
                # The next one to be written must not make this one, the only whole one, give way to it.
                (folder / LAST).replace(folder / UNREADABLE)
            elif path.name == PREVIOUS:
                say(f"{folder / LAST}: missing. Resuming from {path}, step {saved['global_step']:,}.")
            self._read[path] = saved
            return path, saved
        if reasons:
            raise MsencError(f"{' '.join(reasons)} To train from the start, remove {folder}.")
        return None


# ---------------------------------------------------------------------------------------------------- random numbers


def random_state() -> dict[str, Any]:
    """The state of every generator that the process shares: Python's, NumPy's, torch's on the CPU and its GPU."""
    version, python, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": (version, torch.tensor(python), gauss),
        "numpy": {**numpy, "state": {**numpy["state"], "key": torch.tensor(numpy["state"]["key"].tolist())}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------- when


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` (everything that resuming needs) and ``best.ckpt`` (weights alone).

    Args:
        dirpath: the folder.
        every_minutes: at the next optimizer's step after so many; None: only where the others say so.
        every_n_steps: after every n-th optimizer's step; None: likewise. Every epoch's end is saved in any case,
            after its validation.
        monitor: the metric that decides which validation was the best; None keeps none.
        mode: ``min`` or ``max``.

    Attributes:
        best_score: the best value of `monitor` so far.
        termination: the process's, which the callback holds back while it trains.
        on_saved: called after each time ``last.ckpt`` was written.
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
        self.termination = Termination()  # one that nobody enters asks for nothing
        self.on_saved: Callable[[], object] = lambda: None
        self._resume: dict[str, Any] | None = None
        self._saved_at = (0, 0.0)

    # ------------------------------------------------------------------------------------------------ what

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save, and its counters as of the moment between two steps."""
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
        """Keep what has to wait for the first batch."""
        self._resume = checkpoint["resume"]
        self.best_score = self._resume["best_score"]

    def _restore(self, trainer: L.Trainer, batch_idx: int) -> None:
        """Just before the first resumed batch, when every iterator has been made and every check has run."""
        resume, self._resume = self._resume, None
        if batch_idx != resume["batch"]:
            raise RuntimeError(f"resumed at batch {batch_idx} of the epoch, the checkpoint is of {resume['batch']}")
        if len(resume["random_states"]) != trainer.world_size:
            raise MsencError(
                f"the checkpoint is of {len(resume['random_states'])} processes, this run has {trainer.world_size}. "
                "Continue it with as many devices as it had."
            )
        set_random_state(resume["random_states"][trainer.global_rank])
        trainer.callback_metrics.update({k: v.to(trainer.strategy.root_device) for k, v in resume["metrics"].items()})
        # Lightning counts one too many where a validation came right before.
        trainer.fit_loop.epoch_loop._batches_that_stepped = resume["steps_logged"]
        self._saved_at = (trainer.global_step, time.monotonic())

    # ------------------------------------------------------------------------------------------------ when

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on, signals wait for a good moment; Lightning, which has taken SIGTERM over, would not wait."""
        self._saved_at = (trainer.global_step, time.monotonic())
        self.termination.listen()
        self.termination.is_held = True
        if self._resume is not None:
            # Lightning forgets to where the number of batches was asked for, as schedules do, before it restores.
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
        """Whether one of the processes says so: all have to save, and to leave, at the same step."""
        return trainer.strategy.reduce_boolean_decision(value, all=False) if trainer.world_size > 1 else value

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        if self._any(trainer, self.termination.is_asked):
            self.termination.leave()

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:  # what was logged before a checkpoint is on disk before it
            logger.save()
            if hasattr(logger.experiment, "flush"):
                logger.experiment.flush()
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self._saved_at = (trainer.global_step, time.monotonic())
        self.on_saved()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A validation can be repeated: a signal ends it at once, and the checkpoint of a step before stands."""
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
        """Save the end, and what the training came to: there is nothing left to resume then."""
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
    """Why a training stopped, where it was then, and its last metrics; plain values."""
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
    """Turn the counters of a moment between two steps, in which Lightning has announced the next, into those before.

    At a batch's start it has counted the batch as ready, at an epoch's start the epoch, while the batches of the
    epoch before still count as the current ones. Its code for restarting takes all this for a step that was cut off.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    is_between_epochs = epochs["total"]["started"] == epochs["total"]["completed"]
    for progress in (epochs, batches) if is_between_epochs else (batches,):
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["completed"]
    batches["is_last_batch"] = False
    if is_between_epochs:
        batches["current"] = dict.fromkeys(batches["current"], 0)
