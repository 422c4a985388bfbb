"""Do streams arrive? Watches, at every validation, what the connectors say and what it is worth to the LLM.

validation batches -> connector/<stream>/spread, stream/<stream>/used_nats -> progress bar, metrics, warnings
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from msenc.models.alignment import spread
from msenc.training.module import ConversationModule
from msenc.types import Batch, MsencError

CONSTANT = 0.01
"""Spread below which a connector says the same of every utterance: a new one stands above 0.1, a collapsed one below
0.001 (docs/connectors.md)."""

UNUSED = 0.002
"""Nats per token below which exchanging a stream between utterances costs nothing."""


class StreamMonitor(L.Callback):
    """Logs, on the first targets of the validation split, for each stream

    - ``connector/<stream>/spread``: the share of the power of the connector's output that differs between utterances,
      from 0 (all alike) to 1;
    - ``stream/<stream>/used_nats``: by how many nats per target token the loss rises when each utterance is given
      another one's frames. 0 where the LLM takes nothing from the stream. An LLM that trusts it is misled, so this is
      no measure of information; `evaluate.py control=shuffle` is.

    Args:
        targets: targets of the validation split, about, that are looked at; the cost is a forward of these per stream.
    """  # noqa: D415

    def __init__(self, targets: int = 64) -> None:
        if targets < 1:
            raise MsencError(f"callbacks.streams.targets: found {targets}, expected 1 or more.")
        self.targets = targets
        self._reset()

    def _reset(self) -> None:
        self._seen = 0
        self._outputs: dict[str, list[Tensor]] = {}
        self._rises: dict[str, Tensor] = {}  # sum of the rises of the loss, and tokens

    def on_validation_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Look anew."""
        self._reset()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: ConversationModule,
        outputs: Mapping[str, Tensor],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Exchange each stream within the batch, while not enough targets have been seen."""
        if self._seen >= self.targets or not batch.streams:
            return
        self._seen += len(batch.target_ids)
        for stream, queries in module.model.connect(batch).items():
            self._outputs.setdefault(stream, []).append(queries.float().cpu())
            if len(queries) > 1:
                exchanged = module.model(exchange(batch, stream, *queries.shape[:2])).nll
                rise = torch.stack([(exchanged - outputs["nll"]).sum(), exchanged.new_tensor(exchanged.numel())])
                self._rises[stream] = self._rises.get(stream, torch.zeros(2)) + rise.float().cpu()

    def on_validation_epoch_end(self, trainer: L.Trainer, module: ConversationModule) -> None:
        """Log what was found, over all processes."""
        said = []
        for stream in module.model.connectors:
            found = self._outputs.get(stream)
            differs = spread(torch.cat(found)) if found else 0.0
            rise, tokens = module.over_processes(self._rises.get(stream, torch.zeros(2))).tolist()
            used = rise / tokens if tokens else 0.0
            module.log(f"connector/{stream}/spread", differs, sync_dist=True)
            module.log(f"stream/{stream}/used_nats", used)
            said.append(f"{stream} differs {100 * differs:.1f} %, used {used:.4f} nats")
        if said and not trainer.sanity_checking:
            trainer.print(f"epoch {trainer.current_epoch + 1}: {'; '.join(said)}")


def exchange(batch: Batch, stream: str, num_utterances: int, num_queries: int) -> Batch:
    """A batch in whose slots of a stream each utterance is replaced by another one of the batch.

    Args:
        batch: with the stream.
        stream: its name.
        num_utterances: of the stream in the batch, 2 or more; they stand in order of length, so that one half of them
            away lies one of another length.
        num_queries: Q of its connector.
    """
    own = batch.streams[stream]
    other = (own.sources // num_queries + num_utterances // 2) % num_utterances
    sources = other * num_queries + own.sources % num_queries
    return replace(batch, streams={**batch.streams, stream: replace(own, sources=sources)})


def findings(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Stream -> ``spread`` and ``used_nats``, of a run's metrics."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, rest = name.partition("/")
        stream, _, what = rest.partition("/")
        if (kind, what) in (("connector", "spread"), ("stream", "used_nats")):
            found.setdefault(stream, {})[what] = value
    return found


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What is wrong with the streams of a run, by its last metrics, and what to do; empty where all arrive.

    Example:
        >>> warnings({"connector/audio/spread": 0.4, "stream/audio/used_nats": 0.1})
        []
        >>> print(warnings({"connector/audio/spread": 0.0004, "stream/audio/used_nats": 0.0})[0][:59])
        audio: the connector says the same of every utterance (0.04
    """
    said = []
    for stream, found in findings(metrics).items():
        if found.get("spread", 1.0) < CONSTANT:
            said.append(
                f"{stream}: the connector says the same of every utterance ({100 * found['spread']:.2f} % of its output"
                " differs between them), so the LLM cannot use the stream. Align it first (align=words), give the"
                " connectors a lower rate (optimizer.groups.connectors.lr=3e-4), or another model/connector=."
            )
        elif found.get("used_nats", 1.0) < UNUSED:
            said.append(
                f"{stream}: the LLM takes nothing from the stream: with another utterance's in its place the loss rises"
                f" by {found['used_nats']:.4f} nats per token. Align it first (align=words), train longer, or check"
                f" with evaluate.py control=shuffle_{stream} that it tells anything of the replies."
            )
    return said
