"""Where measures go while training: logs that a resumed run can continue, and the progress."""

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from msenc.files import read_text, write_text
from msenc.types import MsencError
from msenc.work.console import console
from msenc.work.progress import Pace, shows_bars


class TrainingProgress(RichProgressBar):
    """Lightning's bar of epochs and batches; without a terminal, a line a minute and one after each validation.

    Args:
        **options: Lightning's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._pace = Pace()

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Without the name of the log's version, which is none here."""
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Move the bar on, or print a line."""
        super().on_train_batch_end(trainer, module, outputs, batch, index)
        if self.is_enabled and self._pace.is_due():
            self._say(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Remove the bar of the validation, or print a line."""
        super().on_validation_end(trainer, module)
        if self.is_enabled and not trainer.sanity_checking and not shows_bars():
            self._pace.count()
            self._say(trainer, module)

    def _say(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        last = "" if trainer.max_epochs in (None, -1) else f" of {trainer.max_epochs}"
        done, total = trainer.fit_loop.epoch_loop.batch_progress.current.processed, trainer.num_training_batches
        measures = [f"{k} {v:.4g}" for k, v in self.get_metrics(trainer, module).items() if isinstance(v, (int, float))]
        console.print(
            f"epoch {trainer.current_epoch + 1}{last}, batch {done} of {total}, {self._pace.minutes()}: "
            f"{', '.join(measures)}",
            soft_wrap=True,
        )


class CsvLogger(CSVLogger):
    """Lightning's, which deletes an earlier ``metrics.csv``; this one can keep it.

    Args:
        purge_step: continue the existing file, without the rows of this step and later ones (as TensorBoard's
            logger does); None starts a new one.
        **options: Lightning's.
    """

    def __init__(self, purge_step: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if purge_step is not None:
            self._continue(purge_step)

    @rank_zero_only
    def _continue(self, purge_step: int) -> None:
        self._experiment = _KeepingWriter(log_dir=self.log_dir)
        file = Path(self.log_dir) / "metrics.csv"
        if not file.is_file():
            return
        text = read_text(file, "Move it away to continue without it.")
        try:
            reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # the last row may be truncated
            names = list(reader.fieldnames or [])
            rows = [row for row in reader if None not in row and int(row["step"]) < purge_step]
        except (csv.Error, KeyError, ValueError, TypeError) as error:
            raise MsencError(
                f"{file}: not a log of Lightning's ({error!r}). Move it away to continue without it."
            ) from error
        kept = io.StringIO()
        writer = csv.DictWriter(kept, names)
        writer.writeheader()
        writer.writerows(rows)
        write_text(file, kept.getvalue())
        self._experiment.metrics_keys = names


class _KeepingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes existing files."""
