"""Decodes many replies at once, from histories that are encoded once, by transformers' `generate`.

Batch of trunks -> key-value cache -> one row of it per reply, cut at its history -> `generate` -> token ids
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from msenc.models.conversation import ConversationModel
from msenc.types import Batch, MsencError

# Processors are created here, not by `generate`: it would skip the first tokens of a left-padded row when penalizing
# repetitions, fill in its own defaults (top_k=50), and draw from one generator for all rows.
PENALTIES = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
"""Settings that narrow the distribution before a token is drawn, in the order in which transformers applies them."""
COUNTS = ("no_repeat_ngram_size", "top_k")
"""Those that take a whole number, 0 for none."""
SEARCH = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "early_stopping")
DECODING_KEYS = ("batch_size", "do_sample", *SEARCH, *PENALTIES, *WARPERS)
"""Settings of transformers' GenerationConfig with which a reply does not depend on the rest of its batch."""


@dataclass(frozen=True)
class Wanted:
    """A reply to generate.

    Args:
        dialogue: the dialogue's id; it seeds the reply's draws together with `turn` and `alternative`.
        turn: the turn to generate.
        alternative: number of the reply among those to the same history.
        row: the batch's row with its history.
        cut: number of the row's tokens that it sees: instruction and turns.
        response: tokens that ask for the reply; they follow the history.
    """

    dialogue: str
    turn: int
    alternative: int
    row: int
    cut: int
    response: tuple[int, ...]


@dataclass(frozen=True)
class Decoding:
    """Decoding settings, from `read_decoding`.

    Args:
        search: handled by `generate` itself: lengths, beams, end token.
        processors: change the scores of the next token, in order.
        is_sampled: draw from the resulting distribution; else take the most likely token.
        batch_size: replies decoded at once.
        seed: of the draws.
    """

    search: GenerationConfig
    processors: tuple[LogitsProcessor, ...]
    is_sampled: bool
    batch_size: int
    seed: int


def read_decoding(settings: Mapping[str, Any], end_id: int, pad_id: int, seed: int) -> Decoding:
    """Settings as in ``configs/decoding``; None counts as absent.

    Args:
        settings: keys of `DECODING_KEYS`.
        end_id: the token that ends a reply.
        pad_id: any token; fills the positions after a reply's end.
        seed: of the draws.

    Raises:
        MsencError: an unknown or missing setting, or settings that do not go together.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given.keys() - set(DECODING_KEYS):
        raise MsencError(f"decoding.{key}: no such setting. Expected some of {', '.join(DECODING_KEYS)}.")
    for key in ("batch_size", "max_new_tokens"):
        if not isinstance(given.get(key), int) or given[key] < 1:
            raise MsencError(f"decoding.{key}: found {given.get(key)}, expected a whole number of 1 or more.")
    is_sampled = given.get("do_sample", False)
    if is_sampled and given.get("num_beams", 1) > 1:
        raise MsencError("decoding: do_sample=true draws one token at a time, so num_beams must be 1 or absent.")
    idle = [key for key in WARPERS if key in given and not is_sampled]
    if idle:
        raise MsencError(
            f"decoding.{idle[0]}={given[idle[0]]} has no effect if do_sample is false. Set do_sample=true, or "
            f"{idle[0]}=null."
        )
    processors = []
    for key, make in {**PENALTIES, **WARPERS}.items():
        if key not in given or (key in COUNTS and given[key] == 0):
            continue
        try:
            processors.append(make(given[key] if key in COUNTS else float(given[key])))
        except (TypeError, ValueError) as e:
            raise MsencError(f"decoding.{key}={given[key]}: {e}") from e
    return Decoding(
        search=GenerationConfig(
            **{key: given[key] for key in SEARCH if key in given}, eos_token_id=end_id, pad_token_id=pad_id
        ),
        processors=tuple(processors),
        is_sampled=is_sampled,
        batch_size=given["batch_size"],
        seed=seed,
    )


@torch.inference_mode()
def write_from_trunks(
    model: ConversationModel, batch: Batch, wanted: Sequence[Wanted], decoding: Decoding
) -> list[list[int]]:
    """Generate replies to histories, many of which share a row; each row passes through the LLM once.

    Args:
        model: in eval mode.
        batch: right-padded rows that start with a trunk; tokens after a row's longest history are not used.
        wanted: the replies, in any order.
        decoding: how.

    Returns:
        Per reply the new token ids, without the end token.

    Raises:
        MsencError: the LLM's cache cannot be cut at a history, or its sliding window is shorter than needed.
    """
    embeds = model.embed(batch)[:, : max(w.cut for w in wanted)]  # (B, P, H)
    encoded = model.llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    cache = getattr(encoded, "past_key_values", None)
    new = max(len(w.response) for w in wanted) + decoding.search.max_new_tokens
    _check_cache(cache, embeds.shape[1] + new)
    replies: list[list[int]] = [[] for _ in wanted]
    order = sorted(range(len(wanted)), key=lambda i: wanted[i].cut, reverse=True)
    for at in range(0, len(order), decoding.batch_size):
        chosen = order[at : at + decoding.batch_size]
        ids = _continue(model, cache, [wanted[i] for i in chosen], decoding)
        for i, reply in zip(chosen, ids, strict=True):
            replies[i] = reply
    return replies


def _continue(model: ConversationModel, cache: Cache, wanted: Sequence[Wanted], decoding: Decoding) -> list[list[int]]:
    """Decode one batch of replies, each from its own copy of a trunk's keys and values."""
    embedding = model.llm.get_input_embeddings()
    device = embedding.weight.device
    num_seen = max(w.cut for w in wanted)  # P
    num_asked = max(len(w.response) for w in wanted)  # R
    rows = torch.tensor([w.row for w in wanted], device=device).repeat_interleave(decoding.search.num_beams or 1)
    # Plain cache layers throughout: `_check_cache` has verified that no window is exceeded.
    room = num_asked + decoding.search.max_new_tokens
    copies = Cache(layers=[_RoomyLayer(layer, rows, num_seen, room) for layer in cache.layers])
    cuts = torch.tensor([w.cut for w in wanted], device=device)
    starts = torch.tensor([num_asked - len(w.response) for w in wanted], device=device)
    index = torch.arange(num_seen + num_asked, device=device)
    # A gap lies between a history and its response prompt. Keys carry their positions, and `generate` counts those of
    # new tokens over the mask, so the gap shifts nothing.
    mask = (index < cuts[:, None]) | (index >= num_seen + starts[:, None])  # (B, P+R)
    ids = torch.tensor([[0] * (num_asked - len(w.response)) + list(w.response) for w in wanted], device=device)
    # `generate` takes embeddings for cached tokens too, and drops them; by embeddings, because from ids it would count
    # the response prompt as text that must not be repeated.
    embeds = pad(embedding(ids), (0, 0, num_seen, 0))  # (B, P+R, H)
    return _generate(model, wanted, decoding, inputs_embeds=embeds, attention_mask=mask.long(), past_key_values=copies)


class _RoomyLayer(DynamicLayer):
    """A copy of some rows of a layer's keys and values, with room for all that will come.

    DynamicLayer copies the whole past for every appended token, which took a quarter of the decoding time.

    Args:
        layer: the trunks' keys and values, (B, heads, L, d).
        rows: the trunk of each reply.
        length: tokens of the trunks to copy.
        room: maximum number of tokens to be appended.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor, length: int, room: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.rooms = []
        for past in (layer.keys, layer.values):
            space = past.new_empty(len(rows), past.shape[1], length + room, past.shape[3])
            space[:, :, :length] = past[:, :, :length][rows]
            self.rooms.append(space)
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (space[:, :, :length] for space in self.rooms)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new, d); returns all keys and values."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for space, states in zip(self.rooms, (key_states, value_states), strict=True):
            space[:, :, start:stop] = states
        self._show(stop)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows, for beam search."""
        length = self.get_seq_length()
        for space in self.rooms:
            space[:, :, :length] = space[:, :, :length][beam_idx]


@torch.inference_mode()
def write_from_rows(
    model: ConversationModel, batch: Batch, wanted: Sequence[Wanted], decoding: Decoding
) -> list[list[int]]:
    """Generate replies to separate histories: the reference implementation, for any LLM.

    Args:
        model: in eval mode.
        batch: left-padded rows of instruction, turns and response prompt.
        wanted: the reply of each row.
        decoding: how; all rows are decoded at once.

    Returns:
        Per row the new token ids, without the end token.
    """
    mask = batch.attention_mask.long()  # (B, L)
    return _generate(model, wanted, decoding, inputs_embeds=model.embed(batch), attention_mask=mask)


def _generate(model: ConversationModel, wanted: Sequence[Wanted], decoding: Decoding, **inputs: Any) -> list[list[int]]:
    processors = LogitsProcessorList(decoding.processors)
    if decoding.is_sampled:
        processors.append(_Draw(_uniforms(wanted, decoding), inputs["inputs_embeds"].device))
    search = copy.deepcopy(decoding.search)
    search.eos_token_id = sorted(_ends(model, decoding))
    ids = model.llm.generate(**inputs, generation_config=search, logits_processor=processors).tolist()
    return [list(takewhile(lambda id: id not in search.eos_token_id, row)) for row in ids]


def _ends(model: ConversationModel, decoding: Decoding) -> set[int]:
    """The end token of training, and those in the LLM's own generation config: chat models have several."""
    own = model.llm.generation_config.eos_token_id
    return {decoding.search.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])}


def _uniforms(wanted: Sequence[Wanted], decoding: Decoding) -> np.ndarray:
    """(B, max_new_tokens) numbers in [0, 1): each reply has its own random stream, independent of other replies."""
    return np.stack(
        [
            np.random.default_rng([decoding.seed, w.turn, w.alternative, *w.dialogue.encode()]).random(
                decoding.search.max_new_tokens
            )
            for w in wanted
        ]
    )


class _Draw(LogitsProcessor):
    """Keep only one token, drawn from the scores' distribution, so that greedy search selects it.

    By inversion of the distribution function: one number per token. Gumbel noise would need one per token of the
    vocabulary.
    """

    def __init__(self, uniforms: np.ndarray, device: torch.device) -> None:
        self.uniforms = torch.from_numpy(uniforms).to(device)  # (B, max_new_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, new tokens so far), (B, V) -> (B, V), -inf but for the token that was drawn."""
        cumulative = scores.double().softmax(-1).cumsum(-1)  # (B, V)
        height = self.uniforms[:, input_ids.shape[1], None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, height, right=True)  # (B, 1): the first that rises above
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _check_cache(cache: Any, length: int) -> None:
    """Refuse LLMs for which a cache with gaps would give wrong results."""
    way_out = "model.layout=sample generates each reply from its own history."
    for layer in getattr(cache, "layers", [cache]):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise MsencError(
                f"the LLM's cache is a {type(layer).__name__}, which cannot be cut at a history; replies that "
                f"share one need keys and values of every token. {way_out}"
            )
        if layer.is_sliding and length > layer.sliding_window:
            raise MsencError(
                f"the LLM attends to a sliding window of {layer.sliding_window} tokens, and histories with their "
                f"replies take up to {length}. {way_out} Or lower data.max_history_tokens."
            )
