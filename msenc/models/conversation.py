"""The composed model: one connector per stream, and the LLM that reads their outputs between its own tokens.

Batch -> (connector per stream -> token places) -> LLM -> loss of every target token
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from msenc.models.attention import layout_mask
from msenc.types import PADDING, Batch, MsencError


@dataclass
class TokenScores:
    """What a forward says of each of the batch's K target tokens, in row-major order.

    Args:
        nll: (K,) float32 cross entropy in nats.
        correct: (K,) bool, whether the likeliest token is the target.
        kinds: (K,) index into `prompt.TOKEN_KINDS`.
        targets: (K,) index into `Batch.target_ids`.
    """

    nll: Tensor
    correct: Tensor
    kinds: Tensor
    targets: Tensor


class ConversationModel(nn.Module):
    """Batch -> TokenScores; batch of histories -> replies.

    Args:
        llm: a causal LM of transformers, with or without PEFT adapters.
        connectors: stream name -> module (N, T, D), (N, T) -> (N, Q, H).
    """

    def __init__(self, llm: nn.Module, connectors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.llm = llm
        self.connectors = nn.ModuleDict(connectors)
        self.base_fingerprint: str = llm.base_fingerprint

    def train(self, mode: bool = True) -> "ConversationModel":
        """Parts without a trainable parameter stay in eval mode: what is frozen has no dropout either."""
        super().train(mode)
        for part in (self.llm, *self.connectors.values()):
            if not any(p.requires_grad for p in part.parameters()):
                # transformers recomputes activations only in modules that are in training mode.
                recomputes = any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
                for module in part.modules():
                    if not recomputes or isinstance(module, nn.Dropout):
                        module.training = False
        return self

    def trainable_parameters(self) -> dict[str, int]:
        """Number of trainable parameters of each part."""
        parts = {"llm": self.llm, **{f"connector.{name}": c for name, c in self.connectors.items()}}
        counted: set[int] = set()  # a core that is tied belongs to the first of its streams
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
        for name, stream in batch.streams.items():
            connector = self.connectors[name]
            dtype = next(connector.parameters()).dtype
            index = torch.arange(stream.features.shape[1], device=stream.features.device)
            mask = index[None, :] < stream.lengths[:, None]  # (N, T)
            queries = connector(stream.features.to(dtype), mask)  # (N, Q, H)
            queries = queries.reshape(-1, shape[-1])[stream.sources].to(flat.dtype)  # (P, H)
            flat = flat.index_put((stream.places,), queries)
        return flat.reshape(shape)

    def forward(self, batch: Batch) -> TokenScores:
        """Cross entropy of every target token, given all that its single sample would show it."""
        self._check_window(batch.input_ids.shape[1])
        labels = batch.labels[:, 1:]
        predicting = torch.nn.functional.pad(labels != -100, (0, 1))  # (B, L): tokens whose next one is a target
        mask = layout_mask(batch.branch, batch.cut)  # (B, 1, L, L)
        embeds = self.embed(batch)
        if self.llm.config._attn_implementation != "sdpa":
            # Only SDPA takes a bool mask; the others add theirs to the scores.
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(embeds.dtype).min
            )
        with self._logits_only_where(predicting):
            logits = self.llm(
                inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
            ).logits[0]  # (K, V)
        wanted = labels[predicting[:, :-1]]  # (K,)
        is_target = batch.labels != -100
        nll = cross_entropy(logits.float(), wanted, reduction="none")
        for name in self.connectors.keys() - batch.streams.keys() if self.training else ():
            # No turn of this batch has the stream: its connector gets a gradient of zero, not none, since a frozen
            # LLM would leave nothing to differentiate, and DDP waits for every parameter.
            nll = nll + 0.0 * sum(p.sum() for p in self.connectors[name].parameters() if p.requires_grad)
        return TokenScores(
            nll=nll,
            correct=logits.argmax(-1) == wanted,
            kinds=batch.kinds[is_target],
            targets=batch.targets[is_target],
        )

    @contextmanager
    def _logits_only_where(self, predicting: Tensor) -> Iterator[None]:
        """Hand the output layer only the K hidden states that predict a target: its input becomes (1, K, H).

        A vocabulary is wide, and most tokens of a row predict nothing that counts. A hook keeps whatever else the
        model does to its logits (scaling, soft caps, adapters).
        """
        head = self.llm.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][predicting][None],))
        try:
            yield
        finally:
            hook.remove()

    def _check_window(self, length: int) -> None:
        config = self.llm.config
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True) and length > window:
            raise MsencError(
                f"the LLM attends to a sliding window of {window} tokens, and this batch has rows of {length}: its "
                "masks would not be the ones it was trained with. Lower data.max_history_tokens, or use an LLM "
                "without a sliding window."
            )

    @torch.inference_mode()
    def generate(self, batch: Batch, generation_config: object) -> list[list[int]]:
        """Write the reply of every row.

        Args:
            batch: left-padded rows without targets, one branch each (`collate` with ``padding_side="left"``).
            generation_config: transformers' GenerationConfig.

        Returns:
            Per row the new token ids, without the end token and what follows it.
        """
        end = generation_config.eos_token_id
        ids = self.llm.generate(
            inputs_embeds=self.embed(batch),
            attention_mask=(batch.branch != PADDING).long(),
            generation_config=generation_config,
        ).tolist()
        return [row[: row.index(end)] if end in row else row for row in ids]
