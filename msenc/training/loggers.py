"""Loggers that a resumed run can continue."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from msenc.files import read_text, write_text
from msenc.types import MsencError


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
