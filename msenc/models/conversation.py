"""The conversation model: one connector per stream, and the LLM, which reads their output among its token embeddings.

Batch -> (connector per stream -> token places) -> LLM -> loss of every target token
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from msenc.models.layout import attend_by_layout, attend_causally, check_layout
from msenc.types import Batch, MsencError


@dataclass
class TokenScores:
    """Scores of each of the batch's K target tokens.

    Args:
        nll: (K,) cross entropy in nats, float32 or wider.
        correct: (K,) bool, whether the most likely token is the target.
    """

    nll: Tensor
    correct: Tensor


class ConversationModel(nn.Module):
    """Batch -> TokenScores; `generation` writes replies with it.

    Args:
        llm: a causal LM of transformers, with or without PEFT adapters.
        connectors: stream name -> module (N, T, D), (N, T) -> (N, Q, H).

    Attributes:
        quantization: what the LLM's frozen weights are quantized to (`quantize.quantize`); None: they are not.
        mixed: the type that `computing` computes in where that is safe, as the run was trained; None: that of the
            weights.
    """

    def __init__(self, llm: nn.Module, connectors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.llm = llm
        self.connectors = nn.ModuleDict(connectors)
        self.base_name: str = llm.base_name
        self.base_fingerprint: str = llm.base_fingerprint
        self.quantization: str | None = getattr(llm, "quantization", None)
        self.mixed: torch.dtype | None = None
        self._limits: dict[str, int] | None = None

    def computing(self) -> AbstractContextManager[Any]:
        """The precision of evaluation and of replies: that of the training, in which the best checkpoint was chosen."""
        if self.mixed is None:
            return nullcontext()
        return torch.autocast(next(self.parameters()).device.type, self.mixed)

    def train(self, mode: bool = True) -> "ConversationModel":
        """Parts without a trainable parameter stay in eval mode, so frozen parts have no dropout."""
        super().train(mode)
        for part in (self.llm, *self.connectors.values()):
            if not any(p.requires_grad for p in part.parameters()):
                # transformers recomputes activations only in modules that are in training mode.
                recomputes = any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
                for module in part.modules():
                    if not recomputes or isinstance(module, nn.Dropout):
                        module.training = False
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all trainable parameters; a shared one has its first name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def trainable_parameters(self) -> dict[str, int]:
        """Number of trainable parameters of each part."""
        parts = {"llm": self.llm, **{f"connector.{name}": c for name, c in self.connectors.items()}}
        counted: set[int] = set()  # a shared core belongs to the first of its streams
        counts = {}
        for name, part in parts.items():
            own = [p for p in part.parameters() if p.requires_grad and id(p) not in counted]
            counted.update(id(p) for p in own)
            counts[name] = sum(p.numel() for p in own)
        return counts

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings with the connectors' outputs in the media slots.

        Returns:
            (B, L, H) in the type of the LLM's embeddings.
        """
        embeds = self.llm.get_input_embeddings()(batch.input_ids)  # (B, L, H)
        shape = embeds.shape
        flat = embeds.reshape(-1, shape[-1])  # (B*L, H)
        # The class's own methods here: a sharded model's (`training.sharding`) gather weights, and let them go after.
        for name, queries in ConversationModel.connect(self, batch).items():
            stream = batch.streams[name]
            filled = queries.flatten(0, 1)[stream.sources].to(flat.dtype)  # (P, H)
            flat = flat.index_put((stream.places,), filled)
        return flat.reshape(shape)

    def connect(self, batch: Batch) -> dict[str, Tensor]:
        """Stream -> its connector's output for each utterance of the batch, (N, Q, H)."""
        found = {}
        for name, stream in batch.streams.items():
            connector = self.connectors[name]
            dtype = next(connector.parameters()).dtype
            queries = []
            for features, lengths in zip(stream.features, stream.lengths, strict=True):
                index = torch.arange(features.shape[1], device=features.device)
                mask = index[None, :] < lengths[:, None]  # (N, T)
                queries.append(connector(features.to(dtype), mask))  # (N, Q, H) of the group
            found[name] = torch.cat(queries)
        return found

    def forward(self, batch: Batch) -> TokenScores:
        """Cross entropy of every target token, given the same context as in its single sample.

        Raises:
            MsencError: the batch is packed, and the LLM does not follow the layout's mask.
        """
        embeds = ConversationModel.embed(self, batch)
        with self._logits_only_at(batch.predictors):
            logits = (
                self._attend_by_layout(embeds, batch) if batch.segments else attend_causally(self.llm, embeds, batch)
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (1, K, V)
        nll = cross_entropy(logits[0], batch.labels, reduction="none")
        for name in self.connectors.keys() - batch.streams.keys() if self.training else ():
            # No turn of this batch has the stream: its connector gets a gradient of zero, not none, since a frozen
            # LLM would leave nothing to differentiate, and DDP waits for every parameter.
            nll = nll + 0.0 * sum(p.sum() for p in self.connectors[name].parameters() if p.requires_grad)
        return TokenScores(nll=nll, correct=logits[0].argmax(-1) == batch.labels)

    def check_layout(self) -> None:
        """Refuse an LLM for which packed rows differ from single samples; checked once, before the first batch.

        Raises:
            MsencError: says what to choose instead.
        """
        if self._limits is None:
            self.llm.attention_kernel, self._limits = check_layout(self.llm)

    def _attend_by_layout(self, embeds: Tensor, batch: Batch) -> Tensor:
        self.check_layout()
        longest = max(max(s.trunk, *(cut + tokens for tokens, cut in s.branches), 0) for s in batch.segments)
        for key, most in self._limits.items():
            if longest > most:
                raise MsencError(
                    f"the LLM's {key} is {most} tokens, and this batch has samples of {longest}, which would not be "
                    "computed as it was trained. Use model.layout=sample, or lower data.max_history_tokens."
                )
        return attend_by_layout(self.llm, embeds, batch, self.llm.attention_kernel)

    @contextmanager
    def _logits_only_at(self, predictors: Tensor) -> Iterator[None]:
        """Give the output layer only the K hidden states that predict a target: its input becomes (1, K, H).

        A vocabulary is large, and most tokens of a row predict no target. A hook keeps whatever else the
        model does to its logits (scaling, soft caps, adapters).
        """
        head = self.llm.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[predictors][None],))
        try:
            yield
        finally:
            hook.remove()
