"""Hydra callback at the start and end of a sweep."""

import sys
import traceback
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from msenc.config.messages import refusal


class Sweep(Callback):
    """Sets a multirun's folder before its first job, and writes its report after the last.

    Jobs record their failures and return (`pipelines.train`), because Hydra skips the second hook when one raises.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this once per sweep, with the config that all jobs start from."""
        _call("begin_sweep", config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this once per sweep."""
        _call("end_sweep", config)


def _call(name: str, config: DictConfig) -> None:
    """Call a function of `pipelines.sweep`; Hydra would turn its exceptions into warnings and continue."""
    try:
        from msenc.pipelines import sweep

        if not config.plan:
            getattr(sweep, name)(config)
        elif name == "begin_sweep":
            sweep.plan_search(config)
    except Exception as e:
        if (text := refusal(e)) is None:
            traceback.print_exc()
        sys.exit(text or 1)
