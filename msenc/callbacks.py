"""Hydra's hook at the end of a sweep."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepEnd(Callback):
    """When the last job of a multirun has returned: print the report, and fail if a job failed.

    Jobs record their failures and return (`pipelines.train`), because Hydra skips this hook when one raises.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this once per sweep."""
        from msenc.pipelines.report import end_sweep

        if not config.plan:
            end_sweep(Path(config.hydra.sweep.dir))
