"""What is measured of the machine while a run trains: tokens per second, memory."""

import resource
import time
from typing import Any

import lightning as L
import torch

from msenc.runs.record import gpu_memory
from msenc.tracking.trackers import Tracker
from msenc.types import Batch


class Measures(L.Callback):
    """Sends tokens per second and peak memory to a run's trackers while it trains, between its other log entries.

    ``speed/tokens_per_s``: positions that the LLM computes (text and query vectors, no padding), of all processes,
    validation and checkpoints before it left out; ``memory/peak_mib`` of the first process, ``memory/peak_gpu_mib``.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._tokens: Any = 0
        self._since = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count from here."""
        self._begin()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count from here."""
        self._begin()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count, and send when the other metrics of a step are."""
        is_padded = batch.attention_mask is not None
        self._tokens = self._tokens + (batch.attention_mask.sum() if is_padded else batch.input_ids.numel())
        if not trainer._logger_connector.should_update_logs:
            return
        tokens = float(module.over_processes(torch.as_tensor(self._tokens, dtype=torch.float32)))
        measures = {
            "speed/tokens_per_s": tokens / max(time.monotonic() - self._since, 1e-9),
            "memory/peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if (gpu := gpu_memory()) is not None:
            measures["memory/peak_gpu_mib"] = float(gpu)
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.log_measures(measures, trainer.fit_loop.epoch_loop._batches_that_stepped)
        self._begin()
