"""Hydra's hooks at both ends of a sweep."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from msenc.config.messages import refusal


class Sweep(Callback):
    """Gives a multirun its folder before its first job, and its report after the last.

    Jobs record their failures and return (`pipelines.train`), because Hydra skips the second hook when one raises.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this once per sweep, with the config that all jobs start from."""
        from msenc.pipelines.sweep import begin_sweep

        if not config.plan:
            _call(begin_sweep, config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this once per sweep."""
        from msenc.pipelines.sweep import end_sweep

        if not config.plan:
            _call(end_sweep, config)


def _call(function: Callable[[DictConfig], None], config: DictConfig) -> None:
    """Call a hook; Hydra would turn what it raises into a warning, and go on."""
    try:
        function(config)
    except Exception as e:
        if (text := refusal(e)) is None:
            traceback.print_exc()
        sys.exit(text or 1)
