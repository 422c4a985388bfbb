"""Do streams reach the LLM? Measures, at every validation, the connectors' output and its use to the LLM.

validation batches -> connector/<stream>/spread, stream/<stream>/used_nats -> progress bar, metrics, warnings
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from msenc.models.alignment import spread
from msenc.models.connector import layer_weights
from msenc.training.module import ConversationModule
from msenc.types import Batch, MsencError

CONSTANT = 0.01
"""Spread below which a connector counts as constant: a new one is above 0.1, a collapsed one below
0.001 (docs/connectors.md)."""

UNUSED = 0.002
"""Rise in nats per token below which a stream counts as unused when it is swapped between utterances."""


class StreamMonitor(L.Callback):
    """Logs for each stream, on the first targets of the validation split:

    - ``connector/<stream>/spread``: the share of the power of the connector's output that differs between utterances,
      from 0 (all alike) to 1;
    - ``stream/<stream>/used_nats``: by how many nats per target token the loss rises when each utterance is given
      another one's frames. 0 if the LLM does not use the stream. An LLM that trusts it is misled, so this does not
      measure information; `evaluate.py control=shuffle` does.
    - ``layers/<stream>/<layer>``: the weight of each of the encoder's layers, where the connector mixes several.

    Args:
        targets: approximate number of validation targets used; costs a forward pass of these per stream.
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
        """Swap each stream within the batch until enough targets have been measured."""
        looks = self._seen < self.targets and bool(batch.streams)
        # Weights that are shared out are gathered for each pass: all processes make it, or none.
        is_joint = isinstance(module.model, FSDPModule)
        if not (module.over_processes(torch.tensor(float(looks))) if is_joint else looks):
            return
        found = module.model.connect(batch)
        self._seen += len(batch.target_ids) if looks else 0
        for stream in module.model.connectors if is_joint else found:
            queries = found[stream] if looks and stream in found else torch.empty(0)
            if len(queries):
                self._outputs.setdefault(stream, []).append(queries.float().cpu())
            if len(queries) > 1:
                exchanged = module.model(exchange(batch, stream, *queries.shape[:2])).nll
                rises = (exchanged - outputs["nll"])[_is_counted(batch)]
                rise = torch.stack([rises.sum(), rises.new_tensor(rises.numel())])
                self._rises[stream] = self._rises.get(stream, torch.zeros(2)) + rise.float().cpu()
            elif is_joint:
                module.model(batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: ConversationModule) -> None:
        """Log the results over all processes."""
        said = []
        weights = layer_weights(module.model.connectors)
        for stream in module.model.connectors:
            found = self._outputs.get(stream)
            differs = spread(torch.cat(found)) if found else 0.0
            rise, tokens = module.over_processes(self._rises.get(stream, torch.zeros(2))).tolist()
            used = rise / tokens if tokens else 0.0
            module.log(f"connector/{stream}/spread", differs, sync_dist=True)
            module.log(f"stream/{stream}/used_nats", used)
            said.append(f"{stream} differs {100 * differs:.1f} %, used {used:.4f} nats")
            for layer, weight in weights.get(stream, {}).items():
                module.log(f"layers/{stream}/{layer}", weight)
            if stream in weights:
                said[-1] += f", layers {', '.join(f'{layer}: {w:.2f}' for layer, w in weights[stream].items())}"
        if said and not trainer.sanity_checking:
            trainer.print(f"epoch {trainer.current_epoch + 1}: {'; '.join(said)}")


def _is_counted(batch: Batch) -> Tensor:
    """Which target tokens are of a reply that the run is to give: what a swap makes likelier of others is no loss."""
    if batch.pairs is None:
        return torch.ones_like(batch.targets, dtype=torch.bool)
    return torch.isin(batch.targets, batch.pairs[:, 0])


def exchange(batch: Batch, stream: str, num_utterances: int, num_queries: int) -> Batch:
    """A batch in which each utterance's frames of a stream are replaced by those of another one in the batch.

    Args:
        batch: with the stream.
        stream: its name.
        num_utterances: of the stream in the batch, 2 or more; they are sorted by length, so that the one half of them
            further on has another length.
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


def warnings(metrics: Mapping[str, Any], aligned: Collection[str] = ()) -> list[str]:
    """Warnings about streams of a run, from its last metrics, with advice; empty if all reach the LLM.

    Args:
        metrics: of the run's last validation.
        aligned: streams whose connector was aligned before training.

    Example:
        >>> warnings({"connector/audio/spread": 0.4, "stream/audio/used_nats": 0.1})
        []
        >>> print(warnings({"connector/audio/spread": 0.0004, "stream/audio/used_nats": 0.0})[0][:68])
        audio: the connector's output is nearly the same for every utterance
    """
    said = []
    for stream, found in findings(metrics).items():
        # Labels that say nothing of what replies need can teach a connector to drop it.
        align = (
            f"other labels (align.labels.{stream}.source=...) or none ('~align.labels.{stream}'), "
            if stream in aligned
            else "alignment first (align=words), "
        )
        if found.get("spread", 1.0) < CONSTANT:
            said.append(
                f"{stream}: the connector's output is nearly the same for every utterance "
                f"({100 * found['spread']:.2f} % of it differs between them), so the LLM cannot use the stream. "
                f"What may help: {align}a lower rate of the connectors (optimizer.groups.connectors.lr=3e-4), another "
                "model/connector=."
            )
        elif found.get("used_nats", 1.0) < UNUSED:
            said.append(
                f"{stream}: the LLM does not use the stream: when it is swapped between utterances, the loss only"
                f" rises by {found['used_nats']:.4f} nats per token. What may help: {align}longer training. Whether the"
                f" stream says anything about the replies: evaluate.py control=shuffle_{stream}."
            )
    return said
